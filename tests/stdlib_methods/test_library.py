"""The library as data: headers, the costs of a method, and its example."""

import pytest

from gkd_dsl import library
from gkd_dsl.cost import costs
from gkd_dsl.fitting import fitting
from gkd_dsl.meaning.check import check_text
from gkd_dsl.syntax import parse
from gkd_dsl.text import Source

NAMES = library.names()
EACH = pytest.mark.parametrize("name", NAMES)


@EACH
def test_a_header_says_all(name: str) -> None:
    info = library.describe(name)
    for field in library.FIELDS:
        assert getattr(info, field) or field == "arxiv", field
    assert info.remarks
    roles = [role for role, _ in info.roles]
    assert "teacher" in roles or info.several
    assert roles.count("student") == 1
    assert all(param.doc for param in info.params)
    assert all(param.within or param.type != "float" for param in info.params)
    assert info.losses


@EACH
def test_its_stages_are_those_of_the_header(name: str) -> None:
    stages = dict.fromkeys(cost.stage.split(".")[0] for cost in costs(name))
    assert tuple(stages) == library.describe(name).stage_names


@EACH
def test_the_example_checks_over_models_that_fit(name: str, tmp_path) -> None:
    found = fitting(name)
    found.specimens.build(library.describe(name), tmp_path)
    checked = check_text(found.text, f"{name}.gkd", root=tmp_path)
    assert [(d.code, d.message) for d in checked.diagnostics.errors] == []
    assert not list(checked.later)


@EACH
def test_the_file_parses_without_a_fault(name: str) -> None:
    _, diagnostics = parse(Source(name, library.method_text(name)))
    assert not list(diagnostics)


def test_code_in_the_remarks_stays_as_it_is_written() -> None:
    remarks = library.describe("glmd").remarks.splitlines()
    at = remarks.index("    student s = truncated(t, layers = every(2)) {")
    assert remarks[at + 1 : at + 3] == ["      vocabulary = kept(50%, source = corpus)", "    }"]
    assert all(not field.startswith(" ") for field in (library.describe("pd").paper, library.describe("pd").title))


def test_costs_by_hand() -> None:
    first, last = costs("tinybert")
    assert first.projected == 768 * 768 + 768
    assert dict(first.forwards[0].taps) == {"hidden": 7, "attn.scores": 6}
    assert first.forwards[1].paths == ("hidden[0, 2, .., 12]", "layer[1, 3, .., 11].attn.scores")
    assert [str(part) for part in first.beside] == ["projection W, 590,592 parameters"]
    assert last.projected == 0
    (only,) = costs("pkd")
    assert [dict(forward.taps) for forward in only.forwards] == [{"hidden": 5, "logits": 1}] * 2
    assert [(forward.model, forward.trains, forward.blocks, forward.of) for forward in only.forwards] == [
        ("s", True, 6, 6), ("t", False, 12, 12),
    ]  # fmt: skip
    assert only.extra == 1


def test_an_unknown_method_has_no_costs() -> None:
    with pytest.raises(KeyError):
        costs("kdd")


@EACH
def test_what_a_header_says_of_teachers_is_what_the_method_takes(name: str) -> None:
    info = library.describe(name)
    teachers = sum(role == "teacher" for role, _ in info.roles)
    assert (info.teachers == "1") == (teachers == 1 and not info.several)
