"""Looks at the raw text around a fault: where a statement ends, which brackets balance."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gkd_dsl.syntax.words import STATEMENTS

_SKIPPED = r'"(?:[^"\\\r\n]|\\[^\r\n])*"?|#[^\r\n]*'
_STEP = re.compile(_SKIPPED + r"|\r?\n|[()\[\]{}]")
_BRACES = re.compile(_SKIPPED + r"|[{}]")
_KEYWORD = "|".join(sorted(STATEMENTS, key=len, reverse=True))
# A line that can only be a new statement: a keyword and a name, or `}`. `mask = m` is an argument.
_STATEMENT = re.compile(
    rf'[ \t]*(?:(?:{_KEYWORD})[ \t]+(?!(?:and|or|in|for)\b)[A-Za-z_"(-]|runtime[ \t]*\{{|(?P<close>\}}))'
)
_BLANKS = re.compile(r"[ \t]*")
_CONTINUED = re.compile(r"[ \t]*(?:[+*/&<>]|-(?!>)|\|>|[=!]=|\.\.[<=]|(?:and|or)[ \t(])")


@dataclass(frozen=True)
class End:
    """Where a statement ends: before a newline, a `{` that opens its block, a `}`, or at the end of the text."""

    at: int
    by: Literal["newline", "open", "close", "end"]
    depth: int = 0


def statement_end(text: str, start: int, depth: int) -> End:
    """The end of the statement around `start`, inside `depth` brackets; unclosed ones end at a new statement."""
    first: int | None = None
    position = start
    while match := _STEP.search(text, position):
        found = match[0]
        position = match.end()
        if found in "([":
            depth += 1
        elif found in ")]":
            depth -= 1
        elif found == "{" and depth <= 0:
            return End(match.start(), "open")
        elif found == "}" and depth <= 0:
            return End(match.start(), "close")
        elif found.endswith("\n") and found[0] in "\r\n":
            if first is None:
                first = match.start()
            if starts_statement(text, match.end()):
                return End(match.start() if depth <= 0 else first, "newline", max(0, depth))
            if depth <= 0 and not _continues(text, match.end()):
                return End(match.start(), "newline")
    if depth > 0 and first is not None:
        return End(first, "newline", depth)
    return End(len(text), "end", max(0, depth))


def _continues(text: str, position: int) -> bool:
    return _CONTINUED.match(text, position) is not None


def starts_statement(text: str, position: int) -> bool:
    """Whether a line that starts at `position` can only be a new statement or the end of a block."""
    return _STATEMENT.match(text, position) is not None


def next_statement(text: str, start: int, end: int) -> int | None:
    """The first line end between two places that a new statement follows."""
    position = start
    while True:
        position = text.find("\n", position, end)
        if position < 0:
            return None
        if starts_statement(text, position + 1):
            return position - 1 if position and text[position - 1] == "\r" else position
        position += 1


def unclosed_braces(text: str) -> int:
    """How many more `{` than `}` a text holds."""
    found = [match[0] for match in _BRACES.finditer(text)]
    return found.count("{") - found.count("}")


def matching_brace(text: str, start: int) -> int | None:
    """The place of the `}` that closes the `{` at `start`."""
    depth = 0
    for match in _BRACES.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None


def indentation(text: str, position: int) -> int:
    """The width of the blanks at the start of the line around a place; a tab counts as one."""
    start = text.rfind("\n", 0, position) + 1
    match = _BLANKS.match(text, start)
    return match.end() - start if match is not None else 0
