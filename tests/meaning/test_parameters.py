"""Parameters: types, ranges, and which value wins."""

from __future__ import annotations

import pytest
from meaning_help import GOLDEN, HARD, SOFT, check, codes, good, inputs, node, spec, stage

from gkd_dsl.graph.nodes import OpNode

TEXT = spec(
    'import "gkd:kd" use kd\n'
    'param T: float = 4.0 in 1.0 ..= 20.0 "softmax temperature"\n'
    "use kd(t -> s, T = T) as k\n" + stage("minimize k.total")
)


def temperature(**options: object) -> object:
    checked = good(TEXT, **options)  # type: ignore[arg-type]
    op = node(checked, inputs(checked, "loss/k/soft")["0"])
    assert isinstance(op, OpNode)
    return op.attr("temperature")


def test_the_default_holds_unless_it_is_set() -> None:
    assert temperature() == 4.0
    assert temperature(params={"T": "2"}) == 2.0
    assert temperature(params={"k.T": "3.5"}) == 3.5
    assert temperature(params={"T": "2", "k.T": "3.5"}) == 3.5


def test_where_a_value_comes_from() -> None:
    checked = good(TEXT, params={"k.alpha": "0.25"})
    origins = {name: (param.value, param.origin.split(" at ")[0]) for name, param in checked.params.items()}
    assert origins == {
        "T": (4.0, "default"),
        "k.T": (4.0, "use"),
        "k.alpha": (0.25, "--set"),
        "k.lr": (5e-05, "default of the method"),
    }


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"T": "40"}, "E0403"),
        ({"k.alpha": "1.5"}, "E0403"),
        ({"T": "10%"}, "E0401"),
        ({"T": '"4"'}, "E0404"),
        ({"T": "s.hiden"}, "E0404"),
        ({"tau": "4"}, "E0407"),
        ({"k.tau": "4"}, "E0407"),
        ({"k": "4"}, "E0407"),
        ({"other.T": "4"}, "E0407"),
    ],
)
def test_a_set_that_does_not_fit(params: dict[str, str], code: str) -> None:
    checked = check(TEXT, params=params)
    assert code in codes(checked)
    assert not checked.ok


def test_a_misspelt_set_offers_the_name() -> None:
    text = TEXT.replace("param T:", "param temperature:").replace("T = T", "T = temperature")
    (found,) = check(text, params={"temprature": "2"}).diagnostics
    assert found.code == "E0407"
    assert "did you mean `temperature`?" in found.message
    (found,) = check(TEXT, params={"k.alhpa": "0.2"}).diagnostics
    assert "did you mean `k.alpha`?" in found.message


def test_a_set_that_is_no_expression_is_reported_where_it_stands() -> None:
    checked = check(TEXT, params={"T": "2 +"})
    assert not checked.ok
    assert {d.span.source.name for d in checked.diagnostics if d.span is not None} == {"--set T"}


def test_a_text_needs_no_quotes_on_the_command_line() -> None:
    text = spec('param data: text\ndata reviews = csv(data, text = "text", label = "label")\n' + HARD + stage("minimize hard"), models='student s = hf("models/student")\n', data="")  # fmt: skip
    checked = good(text, params={"data": "data/reviews.csv"})
    assert checked.stages[0].source is not None
    assert checked.stages[0].source.arg("path") == "data/reviews.csv"
    assert list(check(text).unset) == ["data"]
    assert codes(check(text)) == []
    assert codes(check(text, params={"data": "data/review.csv"})) == ["E0503"]
    assert GOLDEN.joinpath("data/reviews.csv").is_file()


@pytest.mark.parametrize(
    ("declared", "value", "code"),
    [
        ("int", "2", None),
        ("int", "2.5", "E0404"),
        ("bool", "true", None),
        ("bool", "1", "E0404"),
        ("duration", "500 steps", None),
        ("duration", "500", "E0401"),
        ("ratio", "10%", None),
        ("ratio", "0.1", "E0401"),
        ("ratio", "500 steps", "E0401"),
        ("schedule", "ramp(0 -> 1, until = 10%)", None),
        ("schedule", "2", None),
        ("schedule", "[1]", "E0404"),
        ("list", "[1, 2]", None),
        ("list", "1", "E0404"),
        ("text", '"a"', None),
        ("source", "reviews", None),
        ("source", "s", "E0404"),
        ("model", "t", None),
        ("model", "1", "E0404"),
    ],
)
def test_types_of_parameters(declared: str, value: str, code: str | None) -> None:
    checked = check(spec(f"param _p: {declared} = {value}\n" + SOFT + stage("minimize soft")))
    assert codes(checked) == ([] if code is None else [code])


def test_a_schedule_is_bounded_by_its_values() -> None:
    text = "param _w: schedule = ramp(0 -> 2, until = 10%) in 0.0 ..= 1.0\n" + SOFT + stage("minimize soft")
    assert codes(check(spec(text))) == ["E0403"]


def test_an_open_range_leaves_its_end_out() -> None:
    text = "param _p: float = 1.0 in 0.0 ..< 1.0\n" + SOFT + stage("minimize soft")
    assert codes(check(spec(text))) == ["E0403"]
