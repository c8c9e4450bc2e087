"""The library as data: headers, the page of a method, and its example."""

import json

import pytest
from typer.testing import CliRunner

from gkd_dsl import library
from gkd_dsl.cli.main import application
from gkd_dsl.meaning.check import check_text
from gkd_dsl.syntax import parse
from gkd_dsl.text import Source

NAMES = ("distilbert", "kd", "minilm", "minilmv2", "pkd", "tinybert")
EACH = pytest.mark.parametrize("name", NAMES)


def test_every_file_is_a_method() -> None:
    assert [info.name for info in library.library()] == list(NAMES)


@EACH
def test_a_header_says_all(name: str) -> None:
    info = library.describe(name)
    for field in library.FIELDS:
        assert getattr(info, field), field
    assert info.remarks
    assert [role for role, _ in info.roles] == ["teacher", "student"]
    assert all(param.doc for param in info.params)
    assert all(param.within or param.type == "int" for param in info.params)


@EACH
def test_its_stages_are_those_of_the_header(name: str) -> None:
    info = library.describe(name)
    assert [cost.stage for cost in library.costs(name)] == [stage.strip() for stage in info.stages.split(",")]


@EACH
def test_the_example_checks_over_models_that_fit(name: str, tmp_path) -> None:
    info = library.describe(name)
    library._specimens(tmp_path, library._head(info))
    found = check_text(info.example, f"{name}.gkd", root=tmp_path)
    assert [d.code for d in found.diagnostics] == []


@EACH
def test_the_file_parses_without_a_fault(name: str) -> None:
    _, diagnostics = parse(Source(name, library.method_text(name)))
    assert not list(diagnostics)


def test_costs_by_hand() -> None:
    first, last = library.costs("tinybert")
    assert first.projected == 768 * 768 + 768
    assert dict(first.forwards[0].taps) == {"hidden": 7, "attn.scores": 6}
    assert last.projected == 0
    (only,) = library.costs("pkd")
    assert [dict(forward.taps) for forward in only.forwards] == [{"hidden": 5, "logits": 1}] * 2
    assert [(forward.model, forward.trains, forward.blocks, forward.of) for forward in only.forwards] == [
        ("s", True, 6, 6), ("t", False, 12, 12),
    ]  # fmt: skip


def test_the_page_and_its_json() -> None:
    page = CliRunner().invoke(application(), ["methods", "tinybert"])
    assert page.exit_code == 0
    for words in ("1909.10351", "separate_weight", "projections: 590,592 parameters", "use tinybert(t -> s) as m"):
        assert words in page.stdout
    data = json.loads(CliRunner().invoke(application(), ["methods", "kd", "--json"]).stdout)
    assert data["costs"][0]["stage"] == "task"
    assert data["example"] == library.describe("kd").example


def test_an_unknown_method_has_no_costs() -> None:
    with pytest.raises(KeyError):
        library.costs("kdd")
