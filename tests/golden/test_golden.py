"""One folder a code: what a bad file is told, and that the fix makes it good."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from importlib import resources
from pathlib import Path

import pytest
from codes_at_run_time import WHILE_RUNNING

from gkd_dsl.diagnostics import Diagnostics
from gkd_dsl.diagnostics.catalogue import codes, explain
from gkd_dsl.diagnostics.render import apply_fix, render_json, render_text
from gkd_dsl.syntax import parse
from gkd_dsl.text import Source

HERE = Path(__file__).parent
CASES = sorted(path.name for path in HERE.iterdir() if re.fullmatch(r"[EW]\d{4}\w*", path.name))
UPDATE = bool(os.environ.get("GKD_UPDATE_GOLDEN"))
FULL = importlib.util.find_spec("gkd_dsl.meaning.check") is not None


def check(path: Path) -> Diagnostics:
    if FULL:
        from gkd_dsl.meaning.check import check_path

        checked = check_path(path)
        # What checks but does not run in this version is told apart, and shown at `run`.
        return Diagnostics([*checked.diagnostics, *checked.later])
    return parse(Source(str(path), path.read_text(encoding="utf-8"), path))[1]


def compare(path: Path, text: str) -> None:
    if UPDATE:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path} differs; GKD_UPDATE_GOLDEN=1 rewrites it"


@pytest.mark.parametrize("case", CASES)
def test_bad_file(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE / case)
    found = check(Path("bad.gkd"))
    code = case[:5]
    assert code in {diagnostic.code for diagnostic in found}
    for diagnostic in found:
        assert diagnostic.span is None or not os.path.isabs(diagnostic.span.source.name)
    compare(HERE / case / "expected.txt", render_text(found))
    compare(HERE / case / "expected.json", render_json(found))


@pytest.mark.parametrize("case", CASES)
def test_fix(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE / case)
    fixed = Path("fixed.gkd").read_text(encoding="utf-8")
    left = [f"{d.span}: {d.code} {d.message}" for d in check(Path("fixed.gkd")).found if d.severity != "note"]
    assert left == []
    bad = Path("bad.gkd").read_text(encoding="utf-8")
    assert bad != fixed
    first = next(d for d in check(Path("bad.gkd")) if d.code == case[:5])
    if first.fix is not None and all(edit.span.source.name == "bad.gkd" for edit in first.fix.edits):
        assert apply_fix(bad, first.fix) == fixed


def raised() -> set[str]:
    """The codes that the package's source mentions."""
    found: set[str] = set()
    for package in ("gkd_dsl", "gkd_dsl.runtime"):
        for root in map(Path, importlib.import_module(package).__path__):
            for path in root.rglob("*.py"):
                found |= set(re.findall(r'"([EW]0\d{3})"', path.read_text(encoding="utf-8")))
    return found


def test_every_code_has_a_page() -> None:
    assert sorted(raised() - set(codes())) == []


def test_every_page_has_a_code() -> None:
    assert sorted(set(codes()) - raised()) == []


def test_every_code_has_a_case_or_arises_while_running() -> None:
    cases = {case[:5] for case in CASES}
    assert sorted(raised() - cases - set(WHILE_RUNNING)) == []
    assert all(len(reason) > 20 for reason in WHILE_RUNNING.values())
    assert sorted(set(WHILE_RUNNING) - raised()) == []


@pytest.mark.parametrize("code", sorted(codes()))
def test_page_has_its_parts(code: str) -> None:
    text = explain(code)
    assert re.match(r"# \S.*\n\n", text)
    for part in ("## Cause", "## Example", "## Fix"):
        assert text.count(f"\n{part}\n") == 1
    assert text.count("```") >= 4


def test_the_pages_are_package_data() -> None:
    assert resources.files("gkd_dsl.diagnostics").joinpath("codes/E0110.md").is_file()
