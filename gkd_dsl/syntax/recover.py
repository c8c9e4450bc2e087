from __future__ import annotations
from lark import Tree, UnexpectedInput
from gkd_dsl.syntax.grammar import parser
from gkd_dsl.source import Span

def read(source, start, diagnostics):
    text = source.text.replace("\n", " ") if start != "file" else source.text
    try:
        return parser().parse(text, start=start)
    except UnexpectedInput as e:
        diagnostics.error("E0120", str(e).split("\n")[0], Span(source, max(0, e.pos_in_stream or 0), max(0, e.pos_in_stream or 0) + 1))
        return None
