"""What the page of a method is made of: its plan, its tests, its rows of the tables."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from docs_blocks import ROOT

from gkd_dsl import library
from gkd_dsl.cost import costs

NAMES = library.names()


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_pages_methods", ROOT / "docs" / "pages_methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_pages_methods"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_all_its_parts(made: ModuleType, name: str) -> None:
    info = library.describe(name)
    page = made.method(info)
    for part in (
        f"# {info.title}\n", info.paper.rstrip("."), info.equation, info.needs, "## To use it", "## Cost", "## The file",
        f"![The graph of {name}](../images/methods/{name}.svg)", library.method_text(name).rstrip(),
    ):  # fmt: skip
        assert part in page
    for param in info.params:
        assert f"| `{param.name}` | {param.type} | `{param.default}` |" in page
    for cost in costs(name):
        for forward in cost.forwards:
            assert f"| `{forward.name}` | `{forward.model}` |" in page


@pytest.mark.parametrize("name", NAMES)
def test_a_method_has_tests_of_its_own(made: ModuleType, name: str) -> None:
    lines = made._tested(library.describe(name))
    assert f"`tests/stdlib_methods/test_{name}.py` checks that" in lines
    assert [line for line in lines if line.startswith("- ")]


def test_the_index_lists_all(made: ModuleType) -> None:
    page = made.index()
    assert [page.count(f"| [`{name}`]({name}.md) |") for name in NAMES] == [2] * len(NAMES)
    assert f"\n{len(NAMES)} methods ship" in page


def test_rows_of_results(made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "methods.md"
    table.write_text(
        "# Results\n\n| method | accuracy |\n| --- | ---: |\n| pkd | 0.8 |\n| `kd` | 0.9 |\n\n"
        "| method | time |\n|---|---|\n| **kd** | 1.2 |\n"
    )
    monkeypatch.setattr(made, "RESULTS", table)
    assert made._results(library.describe("kd"))[3:-2] == [
        "| method | accuracy |", "| --- | ---: |", "| `kd` | 0.9 |", "", "| method | time |", "|---|---|", "| **kd** | 1.2 |",
    ]  # fmt: skip
    assert made._results(library.describe("minilm")) == []
    monkeypatch.setattr(made, "RESULTS", tmp_path / "none.md")
    assert made._results(library.describe("kd")) == []


def test_the_navigation_lists_the_pages_and_stays(made: ModuleType) -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert made.navigation(config) == config, "run `python docs/generate.py`"
    assert made.navigation(config.replace("          - methods/kd.md\n", "")) == config
    with pytest.raises(ValueError, match="Method pages"):
        made.navigation("nav:\n")
