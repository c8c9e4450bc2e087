"""Lines of a source with marks under them."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gkd_dsl.diagnostics.model import Label
from gkd_dsl.text import Source

_TAB = 4
_CUT = 160
"""Lines longer than this are shown around their marks only."""


@dataclass(frozen=True)
class _Mark:
    """A label on one line: columns of the screen, from 0."""

    start: int
    end: int
    sign: str
    text: str


def wrapped(lead: str, text: str, width: int) -> list[str]:
    """A note behind its `= `, broken at blanks."""
    lines = textwrap.wrap(text, max(40, width - len(lead)), break_long_words=False, break_on_hyphens=False) or [""]
    return [lead + lines[0], *(" " * len(lead) + line for line in lines[1:])]


def gutter_width(labels: Sequence[Label]) -> int:
    """How wide the line numbers are."""
    return max((len(str(label.span.source.position(label.span.end)[0])) for label in labels), default=1)


def snippet(labels: Sequence[Label], paint: Any, severity: str) -> list[str]:
    """The place of the first label, and the marked lines of each source that labels stand in."""
    sources: list[Source] = []
    for label in labels:
        if label.span.source not in sources:
            sources.append(label.span.source)
    gutter = gutter_width(labels)
    lines: list[str] = []
    for source in sources:
        own = [label for label in labels if label.span.source is source]
        lines.append(" " * gutter + paint("-->", "gutter") + f" {own[0].span}")
        lines.append(" " * gutter + paint(" |", "gutter"))
        lines += _lines(source, own, gutter, paint, severity)
    return lines


def _lines(source: Source, labels: Sequence[Label], gutter: int, paint: Any, severity: str) -> list[str]:
    marks: dict[int, list[tuple[int, int, Label, str]]] = {}
    shown: set[int] = set()
    for label in labels:
        first, column = source.position(label.span.start)
        last, end = source.position(max(label.span.start, label.span.end))
        size = len(source.line(first))
        if last == first:
            marks.setdefault(first, []).append((column - 1, max(end - 1, column), label, label.text))
        else:
            # Over several lines: from its start to the line's end, and what stands in its last line.
            marks.setdefault(first, []).append((column - 1, max(size, column), label, ""))
            if end == 1 and last > first + 1:
                last, end = last - 1, len(source.line(last - 1)) + 1
            text = source.line(last)
            blank = len(text) - len(text.lstrip())
            marks.setdefault(last, []).append((min(blank, end - 1), max(end - 1, blank + 1), label, label.text))
            shown.update(range(first, last + 1) if last - first <= 3 else (first, last))
        shown.update((first, last))
    found: list[str] = []
    previous: int | None = None
    for number in sorted(shown):
        if previous is not None and number > previous + 1:
            found.append(" " * gutter + paint(" ...", "gutter"))
        previous = number
        text, columns = _displayed(source.line(number), [m[:2] for m in marks.get(number, [])])
        found.append(paint(f"{number:>{gutter}} |", "gutter") + (f" {text}" if text else ""))
        on_line = [
            _Mark(columns(start), max(columns(end), columns(start) + 1), "^" if label.primary else "-", words)
            for start, end, label, words in marks.get(number, [])
        ]
        found += [
            " " * gutter + paint(" |", "gutter") + " " + paint(row, severity if "^" in row else "gutter")
            for row in _rows(on_line)
        ]
    return found


def _rows(marks: list[_Mark]) -> list[str]:
    """The signs below a line, the last text behind them, each other text on a row of its own, from right to left."""
    if not marks:
        return []
    ordered = sorted(marks, key=lambda mark: (mark.start, mark.end))
    cells = [" "] * max(mark.end for mark in marks)
    for mark in sorted(ordered, key=lambda mark: mark.sign == "^"):
        cells[mark.start : mark.end] = mark.sign * (mark.end - mark.start)
    row = "".join(cells)
    waiting = [mark for mark in ordered if mark.text]
    if waiting and waiting[-1].end == len(row):
        row = f"{row} {waiting.pop().text}"
    rows = [row.rstrip()]
    for index in range(len(waiting) - 1, -1, -1):
        bars = [" "] * waiting[index].start
        for other in waiting[:index]:
            if other.start < len(bars):
                bars[other.start] = "|"
        rows.append("".join(bars) + waiting[index].text)
    return rows


def _displayed(line: str, spans: list[tuple[int, int]]) -> tuple[str, Any]:
    """A line as it is shown, and the way from a character to its column on the screen."""
    start, end = 0, len(line)
    if len(line) > _CUT and spans:
        low, high = min(s for s, _ in spans), max(e for _, e in spans)
        start = max(0, low - 40)
        end = min(len(line), max(high, low) + 40)
        end = min(end, start + 2 * _CUT)
    elif len(line) > _CUT:
        end = _CUT
    lead, tail = "... " if start else "", " ..." if end < len(line) else ""
    shown: list[str] = []
    columns: list[int] = [0] * (start + 1)
    at = len(lead)
    for character in line[start:end]:
        columns.append(at)
        text, size = _cell(character, at - len(lead))
        shown.append(text)
        at += size
    columns = [len(lead)] * start + columns[start + 1 :] + [at]

    def column(index: int) -> int:
        # A mark behind the end of the line stands right behind it.
        return columns[index] if index < len(columns) else at + (index - len(columns) + 1 if not tail else 0)

    return f"{lead}{''.join(shown)}{tail}".rstrip(), column


def _cell(character: str, at: int) -> tuple[str, int]:
    """What is shown of a character, and how many columns it takes."""
    if character == "\t":
        size = _TAB - at % _TAB
        return " " * size, size
    if ord(character) < 127:
        return (character, 1) if ord(character) >= 32 else ("\ufffd", 1)
    category = unicodedata.category(character)
    if category in ("Mn", "Me", "Cf"):
        return (character, 0) if category != "Cf" else ("", 0)
    if category in ("Cc", "Cs", "Zl", "Zp"):
        return "\ufffd", 1
    return character, 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
