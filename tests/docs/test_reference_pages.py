"""The generated pages are those that the code gives today."""

from __future__ import annotations

import importlib.util
import tempfile
from types import ModuleType

import pytest
from docs_blocks import ROOT

from gkd_dsl import library
from gkd_dsl.diagnostics import catalogue
from gkd_dsl.models.families import FAMILIES
from gkd_dsl.ops import registry
from gkd_dsl.sources import SOURCES


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses of a module look it up by its name.
    importlib.sys.modules["docs_generate"] = module  # type: ignore[attr-defined]
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generate: ModuleType) -> dict[str, str]:
    return generate.pages()


def test_pages_are_not_stale(pages: dict[str, str]) -> None:
    stale = [
        path
        for path, text in pages.items()
        if not (ROOT / "docs" / path).is_file() or (ROOT / "docs" / path).read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run `python docs/generate.py`"


def test_no_page_is_left_over(pages: dict[str, str]) -> None:
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert written - {"methods/families.md"} == {path for path in pages if path.startswith("methods/")}
    drawn = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "images" / "methods").glob("*")}
    assert drawn == {path for path in pages if path.startswith("images/methods/")}


def test_pages_are_the_same_twice(generate: ModuleType, pages: dict[str, str]) -> None:
    assert generate.pages() == pages


def test_everything_is_there(pages: dict[str, str]) -> None:
    for code in catalogue.codes():
        assert f"### {code}: " in pages["reference/diagnostics.md"]
    for name in registry.names():
        assert f"### `{name}` " in pages["reference/operators.md"]
    for name in FAMILIES:
        assert f"## {name} " in pages["reference/taps.md"]
    for name in SOURCES:
        assert f"## `{name}`\n" in pages["reference/sources.md"]
    for name in library.names():
        assert f"`{name}`" in pages["reference/methods.md"]


def test_no_place_of_this_machine_is_in_a_page(pages: dict[str, str]) -> None:
    for path, text in pages.items():
        for word in (str(ROOT), tempfile.gettempdir(), "/home/", "/root/"):
            assert word not in text, f"{word} in {path}"


def test_write_says_what_it_changed(generate: ModuleType, pages: dict[str, str], tmp_path: object) -> None:
    assert sorted(generate.write(tmp_path)) == sorted(pages)
    assert generate.write(tmp_path) == []
