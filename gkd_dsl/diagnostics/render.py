"""Diagnostics as a person reads them, and as a program does."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Iterable
from typing import Any

from gkd_dsl.diagnostics.model import Diagnostic, Diagnostics, Fix, Label
from gkd_dsl.diagnostics.snippet import gutter_width, snippet, wrapped
from gkd_dsl.text import Source, Span

_COLORS = {"error": "31", "warning": "33", "note": "36", "help": "32", "gutter": "34"}


def sort(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """In the order of their places; what has no place stands first, equal places keep their order."""
    return sorted(diagnostics, key=lambda d: (d.span.source.name, d.span.start) if d.span is not None else ("", -1))


def render_text(diagnostics: Diagnostics | Iterable[Diagnostic], *, color: bool = False, width: int = 100) -> str:
    """Each diagnostic with the user's own lines, and a last line that counts them; empty where there is none."""
    found = sort(diagnostics)
    if not found:
        return ""
    paint = _painter(color)
    parts = [_one(diagnostic, paint, width) for diagnostic in found]
    return "\n\n".join([*parts, summary(found)]) + "\n"


def summary(diagnostics: Iterable[Diagnostic]) -> str:
    """`2 errors, 1 warning`."""
    counts = {"error": 0, "warning": 0, "note": 0}
    for diagnostic in diagnostics:
        counts[diagnostic.severity] += 1
    return ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for word, n in counts.items() if n)


def _painter(color: bool) -> Any:
    def paint(text: str, role: str) -> str:
        return f"\x1b[1;{_COLORS[role]}m{text}\x1b[0m" if color and text else text

    return paint


def _one(diagnostic: Diagnostic, paint: Any, width: int) -> str:
    head = paint(f"{diagnostic.severity}[{diagnostic.code}]", diagnostic.severity)
    lines = [f"{head}: {diagnostic.message}"]
    gutter = gutter_width(diagnostic.labels)
    if diagnostic.labels:
        lines += snippet(diagnostic.labels, paint, diagnostic.severity)
    for note in diagnostic.notes:
        if note.span is None:
            lines += wrapped(" " * gutter + " = ", note.text, width)
            continue
        lines.append(f"{paint('note', 'note')}: {note.text}")
        lines += snippet((Label(note.span, "", primary=False),), paint, "note")
    if diagnostic.fix is not None:
        lines += _help(diagnostic.fix, paint)
    return "\n".join(lines)


def _help(fix: Fix, paint: Any) -> list[str]:
    """The fix, with each line that it changes (`~`), adds (`+`) or takes away (`-`)."""
    lines = [f"{paint('help', 'help')}: {fix.title}"]
    by_source: dict[Source, list[Any]] = {}
    for edit in fix.edits:
        by_source.setdefault(edit.span.source, []).append(edit)
    for source, edits in by_source.items():
        fixed = apply_fix(source.text, Fix(fix.title, tuple(edits)))
        lines += [paint(f"  {sign} {line}".rstrip(), "help") for sign, line in _changes(source.text, fixed)]
    return lines


def _changes(before: str, after: str) -> list[tuple[str, str]]:
    old, new = before.splitlines(), after.splitlines()
    # An edit touches few lines: what is alike at both ends need not be searched through.
    head = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    old, new = old[head:], new[head:]
    tail = next(
        (i for i, (a, b) in enumerate(zip(reversed(old), reversed(new), strict=False)) if a != b),
        min(len(old), len(new)),
    )
    old, new = old[: len(old) - tail], new[: len(new) - tail]
    found: list[tuple[str, str]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "insert":
            found += [("+", line) for line in new[c:d]]
        elif kind == "delete":
            found += [("-", line) for line in old[a:b]]
        elif kind == "replace":
            # As many new lines as old ones are changes, those most like them; the others are added.
            changed = _nearest(old[a:b], new[c:d])
            found += [("~" if index in changed else "+", line) for index, line in enumerate(new[c:d])]
            found += [("-", line) for line in old[a + (d - c) : b]]
    return [(sign, _visible(line)) for sign, line in found]


def _nearest(old: list[str], new: list[str]) -> set[int]:
    """Which of the new lines are the old ones, changed."""
    if len(old) >= len(new) or len(new) > 20:
        return set(range(min(len(old), len(new))))
    found: set[int] = set()
    for line in old:
        left = [index for index in range(len(new)) if index not in found]
        found.add(max(left, key=lambda i: (difflib.SequenceMatcher(None, line[:200], new[i][:200]).ratio(), -i)))
    return found


def _visible(line: str) -> str:
    return "".join(c if c == "\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in line)


def apply_fix(text: str, fix: Fix) -> str:
    """The text after the edits of a fix; of edits that overlap the first in the text is made."""
    done = len(text) + 1
    for edit in sorted(fix.edits, key=lambda e: (e.span.start, e.span.end), reverse=True):
        if edit.span.end <= done:
            text = text[: edit.span.start] + edit.text + text[edit.span.end :]
            done = edit.span.start
    return text


def render_json(diagnostics: Diagnostics | Iterable[Diagnostic]) -> str:
    """A list of objects, one a diagnostic, in the order of their places."""
    return json.dumps([as_data(diagnostic) for diagnostic in sort(diagnostics)], indent=2, ensure_ascii=False) + "\n"


def as_data(diagnostic: Diagnostic) -> dict[str, Any]:
    """A diagnostic as plain data: lines and columns from 1, offsets in characters from 0."""
    return {
        "code": diagnostic.code,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        "labels": [{**_place(label.span), "text": label.text, "primary": label.primary} for label in diagnostic.labels],
        "notes": [
            {"text": note.text, **({"place": _place(note.span)} if note.span is not None else {})}
            for note in diagnostic.notes
        ],
        "fix": None
        if diagnostic.fix is None
        else {
            "title": diagnostic.fix.title,
            "edits": [{**_place(edit.span), "text": edit.text} for edit in diagnostic.fix.edits],
        },
    }


def _place(span: Span) -> dict[str, Any]:
    return {
        "file": span.source.name,
        "start": _point(span.source, span.start),
        "end": _point(span.source, span.end),
    }


def _point(source: Source, offset: int) -> dict[str, int]:
    line, column = source.position(offset)
    return {"line": line, "column": column, "offset": offset}
