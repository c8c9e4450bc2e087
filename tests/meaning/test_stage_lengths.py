"""How long a stage lasts: written out, or the name of a duration."""

from __future__ import annotations

import pytest
from meaning_help import HARD, STUDENT, check, codes, good, spec, stage

from gkd_dsl.meaning.resolved import resolved_text
from gkd_dsl.schedules import Span
from gkd_dsl.syntax import ast, parse
from gkd_dsl.syntax.printer import print_file
from gkd_dsl.text import Source

LENGTH = 'param length: duration = 3 epochs "how long"\n'
BODY = HARD + stage("minimize hard", duration="length")


def test_a_parameter_gives_the_length_and_can_be_set() -> None:
    text = spec(LENGTH + BODY, models=STUDENT)
    assert good(text).stages[0].duration == Span(3, "epochs")
    assert good(text, params={"length": "500 steps"}).stages[0].duration == Span(500, "steps")


def test_a_parameter_of_a_method_gives_the_length_of_its_stages() -> None:
    method = (
        "method m(student s, epochs: duration = 4 epochs) {\n  loss hard = cross_entropy(s.logits, batch.labels)\n"
        "  stage a for epochs { minimize hard }\n  stage b[i] for epochs each i in 0 ..< 2 { minimize hard }\n}\n"
    )
    run = "run u\n"
    for use, params, wanted in (
        ("use m(s) as u\n", {}, Span(4, "epochs")),
        ("use m(s, epochs = 20 steps) as u\n", {}, Span(20, "steps")),
        ("use m(s) as u\n", {"u.epochs": "2M tokens"}, Span(2e6, "tokens")),
    ):
        found = good(spec(method + use + run, models=STUDENT), params=params)
        assert [s.name for s in found.stages] == ["u.a", "u.b.0", "u.b.1"]
        assert {s.duration for s in found.stages} == {wanted}
    assert codes(check(f"gkd 1\n{method}")) == []


@pytest.mark.parametrize(
    ("param", "code"),
    [
        ("param length: float = 3.0\n", "E0401"),
        ("param length: duration = 10%\n", "E0401"),
        ("param length: duration = 0 steps\n", "E0403"),
        ("", "E0203"),
        ("let length = s.N\n", "E0401"),
    ],
)
def test_a_name_of_something_else_is_told(param: str, code: str) -> None:
    assert codes(check(spec(param + BODY, models=STUDENT))) == [code]


def test_it_is_printed_as_written_and_resolved() -> None:
    text = spec(LENGTH + BODY, models=STUDENT)
    file, _ = parse(Source("spec.gkd", text))
    written = next(item for item in file.items if isinstance(item, ast.Stage))
    assert isinstance(written.duration, ast.Name)
    again = print_file(file)
    assert "stage main for length {" in again
    assert print_file(parse(Source("spec.gkd", again))[0]) == again
    resolved = resolved_text(good(text, params={"length": "7 steps"}))
    assert "param length: duration = 7 steps" in resolved
    assert good(resolved).stages[0].duration == Span(7, "steps")


def test_a_duration_without_a_unit_is_still_told() -> None:
    assert codes(check(spec(HARD + stage("minimize hard", duration="3"), models=STUDENT))) == ["E0122"]
