"""Trees without their places, for comparison."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from gkd_dsl.text import Source, Span


def plain(node: Any) -> Any:
    if isinstance(node, Span | Source):
        return None
    if isinstance(node, tuple):
        return tuple(plain(item) for item in node)
    if is_dataclass(node):
        values = tuple(plain(getattr(node, field.name)) for field in fields(node) if field.name != "comments")
        return (type(node).__name__, *values)
    return node


def spans(node: Any) -> list[Span]:
    if isinstance(node, Span):
        return [node]
    if isinstance(node, tuple):
        return [span for item in node for span in spans(item)]
    if is_dataclass(node) and not isinstance(node, Source):
        return [span for field in fields(node) for span in spans(getattr(node, field.name))]
    return []
