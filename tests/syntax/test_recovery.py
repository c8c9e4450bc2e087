"""Many faults at once: each reported where it is, none twice, the rest still read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from lark import Token

from gkd_dsl.diagnostics import Diagnostic
from gkd_dsl.diagnostics.render import apply_fix, render_text
from gkd_dsl.syntax import ast, parse
from gkd_dsl.syntax.grammar import parser
from gkd_dsl.text import Source

HERE = Path(__file__).parent


def faults(text: str) -> list[tuple[str, int, int]]:
    _, found = parse(Source("f.gkd", text))
    return [(d.code, d.span.line, d.span.column) for d in found if d.span is not None]


def only(text: str, header: str = "gkd 1\n") -> Diagnostic:
    _, found = parse(Source("f.gkd", header + text))
    assert len(found) == 1, render_text(found)
    return found.found[0]


def test_seven_faults_in_one_file() -> None:
    source = Source("seven.gkd", (HERE / "specs" / "seven_faults.bad").read_text())
    file, found = parse(source)
    assert [(d.code, d.span.line, d.span.column) for d in found if d.span is not None] == [
        ("E0102", 2, 1),
        ("E0105", 3, 11),
        ("E0110", 4, 41),
        ("E0106", 5, 9),
        ("E0114", 6, 16),
        ("E0105", 8, 9),
        ("E0113", 9, 16),
    ]
    names = [item.name.text for item in file.items if not isinstance(item, ast.Runtime | ast.DimDecl)]
    assert names == ["t", "s", "one", "T", "two", "main", "three"]
    stage = file.items[5]
    assert isinstance(stage, ast.Stage)
    assert [type(node).__name__ for node in stage.body] == ["Setting", "Minimize"]


@pytest.mark.parametrize(
    ("text", "code", "marked"),
    [
        ("studnet s = hf(1)", "E0102", "studnet"),
        ("minimize x", "E0104", "minimize"),
        ("stage a for 1 epoch {\n  teacher t = hf(1)\n}", "E0104", "teacher"),
        ("stage a for 1 epoch {\n  stage b {\n  }\n}", "E0104", "stage"),
        ("stage a for 1 epoch {\n  total = x\n}", "E0104", "total"),
        ("method m(teacher t) {\n  minimize x\n}", "E0104", "minimize"),
        ("method m(teacher t) {\n  lr = 2\n}", "E0104", "lr"),
        ("pass p = s {\n  minimize x\n}", "E0104", "minimize"),
        ("policy p = s {\n  loss x = 1\n}", "E0104", "loss"),
        ("x = 3", "E0104", "x"),
        ("let x 3", "E0105", "3"),
        ("let x == 3", "E0105", "=="),
        ("let x", "E0105", ""),
        ("let y = f(a: 3)", "E0105", ":"),
        ("param T = 2", "E0106", ""),
        ("param T float = 2", "E0106", "float"),
        ("method m(teacher t, T = 2) {\n}", "E0106", ""),
        ("let y = f(a b)", "E0107", "b"),
        ("let y = [1 2]", "E0107", "2"),
        ("let = 3", "E0108", "="),
        ("use m(t -> s) as", "E0108", ""),
        ("let y = f(a\nlet z = 2", "E0110", ""),
        ("let y = f(a,\nlet z = 2", "E0110", ""),
        ("let y = [1, (2]", "E0110", "]"),
        ("stage a {\n  minimize x\n", "E0110", ""),
        ("stage a {\n  minimize f(x\n}", "E0110", ""),
        ("stage a {\n  minimize f(x\n  optim = adamw(lr = 1)\n}", "E0110", ""),
        ("stage a {\n  minimize x\n\nstage b {\n  minimize y\n}", "E0110", "stage"),
        ("let x = 2)", "E0111", ")"),
        ("let x = (2]", "E0111", "]"),
        ("}", "E0111", "}"),
        ('let x = f("abc)', "E0112", '"abc)'),
        ("let x = 'a b'", "E0113", "'a b'"),
        ("let x = \u201ca b\u201d", "E0113", "\u201ca b\u201d"),
        ("let x = 3;", "E0113", ";"),
        ("let x = 3\u00a0+ 2", "E0113", "\u00a0"),
        ("let x = 3 \u2212 2", "E0113", "\u2212"),
        ("let x = 3 ^ 2", "E0113", "^"),
        ("let x = \x00", "E0113", "\x00"),
        ("let x = 1 +", "E0114", "+"),
        ("let x =", "E0114", "="),
        ("let x = f(, 2)", "E0114", ","),
        ("stage a {\n  minimize\n}", "E0114", "minimize"),
        ("let x = .5 + 1", "E0114", "."),
        ("let x = t.layer[1:3]", "E0115", ":"),
        ("let x = t.layer[:3]", "E0115", ":"),
        ("let x = t.layer[1..3]", "E0115", ".."),
        ("let x = t.layer[a...b]", "E0115", "..."),
        ("let x = f(**kwargs)", "E0116", "**"),
        ("let x = 2 ** 3", "E0116", "**"),
        ("let x = f(lambda y: y)", "E0116", "lambda"),
        ("let x = a if b else c", "E0116", "if"),
        ("if a {\n  let x = 2\n}", "E0116", "if"),
        ("while true {\n  x = 2\n}", "E0116", "while"),
        ("let x = a && b", "E0116", "&&"),
        ("let x = {a: 3}", "E0116", "{"),
        ("let x = [i for i in y]", "E0116", "for"),
        ("let x = 9999999999999999999", "E0119", "9999999999999999999"),
        ("let x = a = 3", "E0120", "="),
        ("let x = a -> b", "E0120", "->"),
        ("let x = 2 let y = 3", "E0121", "let"),
        ("let x = 2 y", "E0121", "y"),
        ("let x = 2M", "E0121", "M"),
        ("stage a for 3 {\n}", "E0122", "3"),
        ("stage a for 3 epohs {\n}", "E0122", "epohs"),
        ("stage a for {\n}", "E0122", "{"),
        ("let x = a < b < c", "E0123", "<"),
        ("let x = f(a <- b <- c)", "E0123", "<-"),
        ("let x = f(a = 1, b)", "E0125", "b"),
        ("stage a for 3 epochs\n  minimize x\n}", "E0126", ""),
        ("stage a for 3 epochs\n{\n  minimize x\n}", "E0126", ""),
    ],
)
def test_one_fault_gives_one_error(text: str, code: str, marked: str) -> None:
    found = only(text)
    assert found.code == code, render_text([found])
    assert found.span is not None
    assert found.span.text == marked
    if found.fix is not None:
        _, left = parse(Source("f.gkd", apply_fix("gkd 1\n" + text, found.fix)))
        assert [d.message for d in left] == []


@pytest.mark.parametrize("text", ["let x = 1\n", "# only a remark\nlet x = 1\n"])
def test_header_is_missing(text: str) -> None:
    found = only(text, header="")
    assert found.code == "E0101"
    assert found.fix is not None
    assert faults(apply_fix(text, found.fix)) == []


def test_header_may_be_wrong() -> None:
    assert faults("gkd 2\nlet x = 1\n") == [("E0103", 1, 5)]
    assert faults("gkd 1\nlet x = 1\ngkd 1\n") == [("E0101", 3, 1)]
    assert [code for code, *_ in faults("")] == ["E0101"]


def test_what_the_broken_declare_is_still_declared() -> None:
    text = "gkd 1\nteacher t = hf('a' 'b')\nuse m(t -> ) as tb\nparam T float\nstage a fr 3 {\n  minimize x y\n  lr = 2\n}\n"
    file, found = parse(Source("f", text))
    assert not found.ok
    assert [getattr(getattr(item, "name", None), "text", "?") for item in file.items] == ["t", "tb", "T", "a"] or [
        type(item).__name__ for item in file.items
    ] == ["ModelDecl", "Use", "Param", "Stage"]
    stage = file.items[-1]
    assert isinstance(stage, ast.Stage)
    assert len(stage.body) == 2


def test_no_terminal_names_in_messages() -> None:
    pieces = [
        "let",
        "x",
        "=",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "3",
        '"a"',
        "+",
        "<-",
        "->",
        ",",
        ".",
        "for",
        "in",
        "stage",
        "\n",
        "|>",
        "..<",
        ":",
        "epochs",
        "use",
        "as",
    ]
    draw = random.Random(0)
    for _ in range(400):
        text = "gkd 1\n" + " ".join(draw.choice(pieces) for _ in range(12))
        _, found = parse(Source("f", text))
        for d in found:
            words = " ".join([d.message, *(label.text for label in d.labels), *(note.text for note in d.notes)])
            assert not [name for name in ("LPAR", "RSQB", "_NL", "ASSIGN", "NAME", "UP_TO", "__") if name in words], (
                words
            )


def test_deleting_a_token_is_noticed_near_its_line() -> None:
    draw = random.Random(1)
    near = silent = total = 0
    for path in sorted((HERE / "specs").glob("[phm]*.gkd")):
        text = path.read_text()
        tokens = list(parser().parse(text, start="file").scan_values(lambda v: isinstance(v, Token)))
        for token in draw.sample(tokens, 25):
            broken = text[: token.start_pos] + text[token.end_pos :]
            line = Source("f", text).position(token.start_pos)[0]
            found = faults(broken)
            total += 1
            silent += not found
            near += any(abs(at - line) <= 1 for _, at, _ in found)
    assert near + silent >= 0.95 * total
    assert near >= 0.6 * total


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10_000,
        "let x = " + "(" * 10_000 + "1" + ")" * 10_000,
        "let x = " + "[" * 10_000,
        "let x = " + "-" * 10_000 + "1",
        "let x = " + "not " * 5_000 + "a",
        "let x = a" + ".b" * 5_000,
        "let x = " + "f(" * 10_000,
        "use m(" + "f(" * 90 + "-" * 200 + "1" + ")" * 90 + ") as x",
        "param T: float = 1 in " + "-" * 500 + "1 ..= 2",
        "{" * 5_000,
        "}" * 300,
        "stage a {\n" * 300,
        "\x00" * 1000,
        "\ufeffgkd 1\nlet x = 1",
        "let \U0001d465 = 1\nlet y = \U0001f600",
        "\r\n\r\r\n\t \f",
        '"' * 999,
        ";\n" * 1000,
        "\ud800",
    ],
    ids=range(19),
)
def test_nothing_crashes(text: str) -> None:
    source = Source("f", "gkd 1\n" + text)
    _, found = parse(source)
    assert len(found) <= 101
    for d in found:
        for label in d.labels:
            assert 0 <= label.span.start <= label.span.end <= len(source.text)
    render_text(found)


def test_a_file_of_one_line_of_a_megabyte() -> None:
    text = "gkd 1\nlet x = f(" + f"{'a' * 90} + b, " * 11_000 + "1)"
    file, found = parse(Source("f", text))
    assert found.ok
    assert len(file.items) == 1
    _, found = parse(Source("f", "gkd 1\nlet x = " + "ab $" * 250_000))
    assert len(found) == 1
    assert len(render_text(found)) < 2000
