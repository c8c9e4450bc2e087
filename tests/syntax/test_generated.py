"""Texts made from the grammar parse; texts broken at random never raise."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.lark import from_lark
from lark import Lark
from trees import plain, spans

from gkd_dsl.diagnostics.render import render_json, render_text
from gkd_dsl.syntax import ast, grammar, parse, print_expression, print_file
from gkd_dsl.syntax.parser import parse_expression
from gkd_dsl.text import Source

_TEXTS = [path.read_bytes().decode() for path in sorted((Path(__file__).parent / "specs").glob("*.gkd"))]


def _strategy(start: str) -> st.SearchStrategy[str]:
    built = Lark(grammar.grammar_text(), parser="lalr", start=start, postlex=grammar.Newlines())
    explicit = _explicit(built)
    return from_lark(built, start=start, explicit={name: explicit[name] for name in explicit if name in _names(built)})


def _names(built: Lark) -> set[str]:
    return {terminal.name for terminal in built.terminals} | {"MISSING"}


def _explicit(built: Lark) -> dict[str, st.SearchStrategy[str]]:
    found: dict[str, st.SearchStrategy[str]] = {}
    for terminal in built.terminals:
        if terminal.pattern.type == "str":
            # A word takes blanks around it, so that it does not grow together with its neighbours.
            found[terminal.name] = st.just(f" {terminal.pattern.value} ")
    found["NAME"] = st.sampled_from([" a ", " b ", " s ", " layer ", " loss ", " mask ", " x1 ", " stage_ "])
    found["INT"] = st.sampled_from([" 0 ", " 12 ", " 1_0 "])
    found["FLOAT"] = st.sampled_from([" 1.5 ", " 5e-5 "])
    found["DURATION"] = st.sampled_from([" 10% ", " 3 epochs ", " 2M tokens "])
    found["STRING"] = st.sampled_from([' "a" ', ' "b # \\" c" '])
    found["_NL"] = st.just("\n")
    found["_BLANK"] = st.just(" ")
    found["_CONTINUED"] = st.just(" ")
    found["COMMENT"] = st.just(" ")
    found["MISSING"] = st.just(" a ")
    return found


_FILES = _strategy("file")
_EXPRESSIONS = _strategy("expr")
_QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def syntax_only(text: str) -> list[str]:
    """The faults of the grammar: those of meaning that the builder reports are of no concern here."""
    _, found = parse(Source("f", text))
    of_meaning = ("E0101", "E0103", "E0104", "E0124", "E0125", "E0241", "E0245")
    return [f"{d.code} {d.message}" for d in found if d.code not in of_meaning]


@_QUICK
@given(_FILES)
def test_generated_files_parse(text: str) -> None:
    assert syntax_only(text) == []


@_QUICK
@given(_FILES)
def test_generated_files_print_and_parse_to_the_same_tree(text: str) -> None:
    file, found = parse(Source("f", text))
    if {"E0124"} & {d.code for d in found}:
        return
    again, _ = parse(Source("f", print_file(file)))
    assert plain(again.items) == plain(file.items)


@_QUICK
@given(_EXPRESSIONS.filter(lambda text: "%" not in text.replace("10%", "")))
def test_generated_expressions_round_trip(text: str) -> None:
    file, found = parse(Source("f", f"gkd 1\nlet x = {text.strip()}"))
    if not found.ok:
        assert {d.code for d in found} <= {"E0125", "E0241", "E0245"}
        return
    (item,) = file.items
    assert isinstance(item, ast.Let)
    assert plain(parse_expression(print_expression(item.value), "f")) == plain(item.value)


@st.composite
def broken(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(_TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        size = draw(st.integers(0, 12))
        piece = draw(
            st.sampled_from(
                [
                    "",
                    "(",
                    ")",
                    "[",
                    "]",
                    "{",
                    "}",
                    '"',
                    "\n",
                    ";",
                    "'",
                    "..",
                    " stage x ",
                    "=",
                    "+",
                    "\x00",
                    "#",
                    "<-",
                    "\r",
                    "é",
                ]
            )
        )
        text = text[:at] + piece + text[at + size :]
    return text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


@settings(max_examples=250, deadline=None)
@given(broken())
def test_broken_texts_never_raise(text: str) -> None:
    source = Source("f", text)
    file, found = parse(source)
    places = spans(file) + [label.span for d in found for label in d.labels]
    places += [edit.span for d in found if d.fix is not None for edit in d.fix.edits]
    assert all(0 <= span.start <= span.end <= len(text) for span in places)
    assert len(found) <= 101
    render_text(found)
    render_json(found)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="gkd1 letx=()[]{}\"'\n+-*<>|.,:#%&stage for3epochs_", max_size=80))
def test_noise_never_raises(text: str) -> None:
    parse(Source("f", text))
