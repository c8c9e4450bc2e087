"""What a text means: precedence, literals, places, soft keywords."""

from __future__ import annotations

from pathlib import Path

import pytest
from trees import plain, spans

from gkd_dsl.diagnostics import SpecError
from gkd_dsl.syntax import ast, parse, parse_expression, parse_signature, print_expression, print_file, print_signature
from gkd_dsl.text import Source

SPECS = sorted((Path(__file__).parent / "specs").glob("*.gkd"))


def expr(text: str) -> ast.Expr:
    return parse_expression(text, "<test>")


@pytest.mark.parametrize(
    ("line", "code", "again"),
    [
        ("loss a = kl(s.x <- t.x, temperature = 2.0, temperature = 8.0)", "E0241", "temperature = 8.0"),
        ("use kd(t -> s, T = 1, alpha = 2, T = 1) as k", "E0241", "T = 1"),
        ('student s = hf("a", num_labels = 2, num_labels = 3)', "E0241", "num_labels = 3"),
        ("loss f(a: model, a: model) = kl(a.x <- t.x)", "E0245", "a"),
        ("method m(teacher t, student t) {}", "E0245", "t"),
        ("method m(teacher t, T: float = 1.0, T: float = 2.0) {}", "E0245", "T"),
        ("loss a[i, j, i] = kl(s.x <- t.x)", "E0245", "i"),
        ("loss a = sum(kl(s.x <- t.x) for (i, i) in p)", "E0245", "i"),
        ("method m(teacher t) {\n  total = a\n  total = b\n}", "E0245", "total"),
        ("pass p = s(batch) {\n  grad = keep\n  grad = discard\n}", "E0245", "grad"),
        ("policy p = selector(x) {\n  reward = a\n  reward = b\n}", "E0245", "reward"),
    ],
)
def test_what_stands_twice_is_not_read_once(line: str, code: str, again: str) -> None:
    (found,) = parse(Source("f", f"gkd 1\n{line}\n"))[1]
    assert found.code == code
    assert found.span is not None
    assert found.span.text == again
    assert found.span.start > line.index(again.split(" = ")[0]) + len("gkd 1\n")


def test_what_may_stand_twice() -> None:
    text = 'gkd 1\nloss a = sum(f(x, y = 1) * g(y = 1) for (_, _) in p)\nstudent s = hf("a") {\n  adapter = peft("b")\n  adapter = lora()\n}\n'  # fmt: skip
    assert list(parse(Source("f", text))[1]) == []


@pytest.mark.parametrize(
    ("text", "grouped"),
    [
        ("a & b != c", "a & (b != c)"),
        ("a != b & c == d", "(a != b) & (c == d)"),
        ("a or b and c & d", "a or (b and (c & d))"),
        ("not a == b and c", "(not (a == b)) and c"),
        ("a & not b", "a & (not b)"),
        ("a + b * -c.d[1](2)", "a + (b * (-(((c.d)[1])(2))))"),
        ("a - b - c", "(a - b) - c"),
        ("a / b * c", "(a / b) * c"),
        ("s.x |> W <- t.x + 1", "(s.x |> W) <- (t.x + 1)"),
        ("a < b or a >= b", "(a < b) or (a >= b)"),
        ("- - a", "-(-a)"),
    ],
)
def test_precedence(text: str, grouped: str) -> None:
    assert plain(expr(text)) == plain(expr(grouped))


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("10%", 10.0, "percent"),
        ("0.5 epochs", 0.5, "epochs"),
        ("1 epoch", 1.0, "epochs"),
        ("500 steps", 500.0, "steps"),
        ("2M tokens", 2e6, "tokens"),
        ("500 k steps", 5e5, "steps"),
        ("1.5B tokens", 1.5e9, "tokens"),
        ("1_000 steps", 1000.0, "steps"),
    ],
)
def test_durations(text: str, value: float, unit: str) -> None:
    found = expr(text)
    assert isinstance(found, ast.Duration)
    assert (found.value, found.unit) == (value, unit)


@pytest.mark.parametrize(
    ("text", "value"), [("5e-5", 5e-5), ("1_000", 1000), ("1_0.2_5", 10.25), ("1E3", 1000.0), ("007", 7)]
)
def test_numbers(text: str, value: float) -> None:
    found = expr(text)
    assert isinstance(found, ast.Number)
    assert found.value == value
    assert type(found.value) is type(value)


def test_strings() -> None:
    found = expr(r'"a\"b\\c\n\tz\u00e9\U0001f600"')
    assert isinstance(found, ast.String)
    assert found.value == 'a"b\\c\n\tz\u00e9\U0001f600'
    with pytest.raises(SpecError, match="E0117"):
        expr(r'"\q"')


def test_slices_and_families() -> None:
    found = expr("t.layer[j ..< k]")
    assert isinstance(found, ast.Index)
    (part,) = found.args
    assert isinstance(part, ast.Range)
    assert not part.inclusive


def test_places() -> None:
    text = "  (a + b) * c.d "
    found = expr(text)
    assert found.span.text == "(a + b) * c.d"
    assert isinstance(found, ast.Binary)
    assert found.left.span.text == "a + b"
    assert found.op_span.text == "*"
    assert found.right.span.text == "c.d"


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_node_has_its_place(path: Path) -> None:
    source = Source(path.name, path.read_bytes().decode())
    file, _ = parse(source)
    found = spans(file)
    assert len(found) > 10
    assert all(0 <= span.start < span.end <= len(source.text) for span in found)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_printed_files_parse_to_the_same_tree(path: Path) -> None:
    file, _ = parse(Source(path.name, path.read_bytes().decode()))
    text = print_file(file)
    again, found = parse(Source(path.name, text))
    assert [d.message for d in found] == []
    assert plain(again) == plain(file)
    assert print_file(again) == text


def test_comments_are_kept_in_order_with_those_before_a_continuation() -> None:
    text = (Path(__file__).parent / "specs" / "plain.gkd").read_text()
    file, _ = parse(Source("plain.gkd", text))
    expected = [line[line.index("#") :] for line in text.splitlines() if "#" in line]
    assert [comment.span.text for comment in file.comments] == expected
    assert [c.span.start for c in file.comments] == sorted(c.span.start for c in file.comments)


def test_a_hash_in_a_string_is_no_comment() -> None:
    file, found = parse(Source("f", 'gkd 1\nlet a = "x # y" # z\n'))
    assert found.ok
    assert [comment.span.text for comment in file.comments] == ["# z"]


def test_a_continuation_before_an_operator_and_not_before_a_statement() -> None:
    file, found = parse(Source("f", "gkd 1\nlet a = 1\n  + 2\n\n  # between\n  * 3\nlet b = 2\n"))
    assert found.ok
    assert [print_expression(item.value) for item in file.items if isinstance(item, ast.Let)] == ["1 + 2 * 3", "2"]


def test_signatures() -> None:
    text = (
        "kl(student: Float[..., C] <- teacher: Float[..., C], temperature: schedule = 1.0 in 0.01 ..= 1000.0, "
        't2: bool = true, align: text = "exact") -> Loss[...] where H % heads == 0, C > 1'
    )
    found = parse_signature(text, "kl")
    assert found.name.text == "kl"
    assert [arg.name.text for arg in found.args] == ["student", "temperature", "t2", "align"]
    assert found.args[0].teacher is not None
    assert found.args[0].teacher.name.text == "teacher"
    assert [dim.text for dim in found.args[0].type.dims or ()] == ["...", "C"]
    assert found.args[1].within is not None
    assert len(found.where) == 2
    assert print_signature(found) == text
    assert plain(parse_signature(text.replace(", ", ",\n  "), "kl")) == plain(found)
    for wrong in ("kl(", "kl(x) -> Loss", "kl(x: Float[) -> Loss[...]", "kl(x: Float) Loss", ""):
        with pytest.raises(SpecError, match="E01"):
            parse_signature(wrong, "kl")


@pytest.mark.parametrize("wrong", ["", "1 +", "f(", "a b", "7 % 2", "1 ..< 2 ..< 3", "let x = 1", "\x00", "a\n= 2"])
def test_expressions_that_are_none(wrong: str) -> None:
    with pytest.raises(SpecError) as caught:
        expr(wrong)
    assert all(d.span is not None and 0 <= d.span.start <= d.span.end <= len(wrong) for d in caught.value.diagnostics)


def test_ranges_of_set_values() -> None:
    assert isinstance(expr("-1.5"), ast.Unary)
    assert isinstance(expr('["qq", "kk"]'), ast.List)
    assert isinstance(expr("true"), ast.Bool)
