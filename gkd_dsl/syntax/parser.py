"""Texts to syntax trees."""

from __future__ import annotations

import re
from typing import Any, cast

from lark import Tree

from gkd_dsl.diagnostics import Diagnostics, SpecError
from gkd_dsl.source import Source, Span
from gkd_dsl.syntax import ast
from gkd_dsl.syntax.build import ExpressionBuilder
from gkd_dsl.syntax.build_file import FileBuilder
from gkd_dsl.syntax.recover import read

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
    headers = [item for item in items if isinstance(item, ast.Header)]
    return headers[0] if headers else None
