"""Texts to syntax trees."""

from __future__ import annotations

import re
from typing import Any, cast

from gkd_dsl.diagnostics import Diagnostics, Edit, Fix, SpecError
from gkd_dsl.syntax import ast
from gkd_dsl.syntax.build import ExpressionBuilder
from gkd_dsl.syntax.build_file import FileBuilder
from gkd_dsl.syntax.recover import read
from gkd_dsl.text import Source, Span

VERSION = 1
"""The version of the language that this parser reads."""

# A string, closed or cut off at its line end, is matched first so that a `#` inside it starts no comment.
_COMMENT = re.compile(r'"(?:[^"\\\r\n]|\\[^\r\n])*"?|(#[^\r\n]*)')


def parse(source: Source) -> tuple[ast.File, Diagnostics]:
    """The tree of all that could be read of a file, and what is wrong with the rest. Never raises."""
    diagnostics = Diagnostics()
    tree = read(source, "file", diagnostics)
    items: list[Any] = FileBuilder(source, diagnostics).lines(tree.children if tree is not None else [])
    header = _header(source, items, diagnostics)
    diagnostics.found.sort(key=lambda found: found.span.start if found.span is not None else 0)
    declared = tuple(item for item in items if not isinstance(item, ast.Header))
    return ast.File(source, header, declared, comments(source)), diagnostics


def comments(source: Source) -> tuple[ast.Comment, ...]:
    """The comments of a text, in order."""
    return tuple(
        ast.Comment(Span(source, match.start(1), match.end(1)))
        for match in _COMMENT.finditer(source.text)
        if match[1] is not None
    )


def parse_expression(text: str, name: str) -> ast.Expr:
    """The expression in a text, such as the value of `--set`; `SpecError` where it is none."""
    source, diagnostics = Source(name, text), Diagnostics()
    tree = read(source, "expr", diagnostics)
    found = ExpressionBuilder(source, diagnostics).expression(tree) if tree is not None else None
    return cast("ast.Expr", _whole(found, diagnostics))


def parse_signature(text: str, name: str) -> ast.Signature:
    """The signature of an operator or a data source; `SpecError` where the text is none."""
    source, diagnostics = Source(name, text), Diagnostics()
    tree = read(source, "signature", diagnostics)
    builder = ExpressionBuilder(source, diagnostics, in_signature=True)
    found = builder.signature(tree) if tree is not None else None
    return cast("ast.Signature", _whole(found, diagnostics))


def _whole(found: Any, diagnostics: Diagnostics) -> Any:
    if not diagnostics.ok:
        raise SpecError(diagnostics)
    assert found is not None
    return found


def _header(source: Source, items: list[Any], diagnostics: Diagnostics) -> ast.Header | None:
    header: ast.Header | None = None
    for index, item in enumerate(items):
        if not isinstance(item, ast.Header):
            continue
        if index > 0:
            diagnostics.error("E0101", "`gkd 1` stands once, before everything else", item.span, "not here")
        header = header or item
    first = re.search(r"\S", _COMMENT.sub(lambda m: " " * len(m[0]) if m[1] is not None else m[0], source.text))
    begins = first.start() if first is not None else 0
    if header is None and not re.match(r"\ufeff?gkd\b", source.text[begins:]):
        diagnostics.error(
            "E0101",
            "the first line is not `gkd 1`",
            Span(source, begins, min(len(source.text), begins + 1)) if first is not None else Span(source, 0, 0),
            "`gkd 1` expected before this",
            notes=["it says which version of the language the file is written in"],
            fix=Fix("insert the header", (Edit(Span(source, 0, 0), f"gkd {VERSION}\n"),)),
        )
    elif header is not None and header.version != VERSION:
        number = Span(source, header.span.end - len(header.span.text.split()[-1]), header.span.end)
        diagnostics.error(
            "E0103",
            f"version {header.version} of the language is not known",
            number,
            f"this gkd reads version {VERSION}",
            fix=Fix(f"write `{VERSION}`", (Edit(number, str(VERSION)),)),
        )
    return header
