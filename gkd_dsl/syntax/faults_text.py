"""Faults of characters: quotes, separators of other languages, signs that only look right."""

from __future__ import annotations

import re
import unicodedata

from gkd_dsl.syntax.faults import SKIP, Fault, Plan

_QUOTES = {"\u201c": '"', "\u201d": '"', "\u201e": '"', "\u00ab": '"', "\u00bb": '"'}
_APOSTROPHES = "'\u2018\u2019\u201a`"
_LOOKALIKES = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": "*", "\u22c5": "*", "\u00f7": "/", "\uff08": "(",
    "\uff09": ")", "\uff0c": ",", "\uff1d": "=", "\u2192": "->", "\u2190": "<-", "\u2264": "<=", "\u2265": ">=",
    "\u2260": "!=", "\u2026": "...",
}  # fmt: skip
_SPACES = "\u00a0\u2002\u2003\u2009\u200b\u3000\u2028\u2029\x0b"
_ADVICE = {
    "!": "the negation is `not`",
    "|": "a pipe is `|>`, the disjunction `or`",
    "^": "there is no power; write `x * x`",
    "@": "there are no decorators",
    "$": "nothing is interpolated; values come from `param`",
    "?": "there is no such operator",
    "~": "the negation is `not`",
    "\\": "a line goes on by itself inside brackets and before an operator",
}


def bad_character(f: Fault) -> Plan | None:
    """A character that starts nothing in the language."""
    if f.kind != "BAD":
        return None
    character = f.word
    end_of_line = re.compile(r"[^\r\n]*").match(f.text, f.start)
    line_end = end_of_line.end() if end_of_line is not None else f.end
    if character == '"':
        f.error(
            "E0112",
            "this text is never closed",
            'no `"` follows on this line',
            end=max(f.end, f.start + len(f.text[f.start : line_end].rstrip())),
            notes=("a text ends on the line where it starts; `\\n` stands for a line end inside it",),
        )
        return SKIP
    if character in _APOSTROPHES or character in _QUOTES:
        return _quotes(f, character, line_end)
    if character == ";":
        return _semicolon(f, line_end)
    if character in _SPACES:
        name = unicodedata.name(character, f"U+{ord(character):04X}").lower()
        f.error(
            "E0113",
            f"this blank is a {name}",
            f"U+{ord(character):04X}",
            fix=f.fix("write a plain blank", f.start, f.end, " "),
        )
        return Plan(rewrite=(f.start, f.end, " "), at=f.start)
    if character in _LOOKALIKES:
        plain = _LOOKALIKES[character]
        f.error(
            "E0113",
            f"`{character}` is not `{plain}`",
            f"U+{ord(character):04X}: write `{plain}`",
            fix=f.fix(f"write `{plain}`", f.start, f.end, plain),
        )
        return Plan(rewrite=(f.start, f.end, plain), at=f.start) if len(plain) == 1 else SKIP
    if character == "!" and f.reader.can("NOT") and f.text[f.end : f.end + 1] not in ("", "="):
        f.error("E0113", "`!` is not in the language", _ADVICE["!"], fix=f.fix("write `not`", f.start, f.end, "not "))
        return Plan(at=f.end)
    shown = f"`{character}`" if character.isprintable() else f"the character U+{ord(character):04X}"
    advice = _ADVICE.get(character, "not in the language" if character.isprintable() else "a control character")
    if character.isalpha():
        advice = "names are made of the letters a to z and A to Z, digits and `_`"
    f.error("E0113", f"{shown} is not in the language", advice)
    return SKIP


def _quotes(f: Fault, character: str, line_end: int) -> Plan:
    line = f.text[f.start : line_end]
    closing = re.compile(r"['\"`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u00ab\u00bb]").search(line, 1)
    if closing is None:
        f.error("E0113", f"`{character}` does not open a text", 'texts stand in `"..."`')
        return SKIP
    end = f.start + closing.end()
    inner = line[1 : closing.start()]
    f.error(
        "E0113",
        f"`{character}` does not open a text",
        'texts stand in `"..."`',
        end=end,
        fix=f.fix('write `"`', f.start, end, f'"{inner}"'),
    )
    if "\\" in inner:
        return SKIP
    return Plan(rewrite=(f.start, end, f'"{inner}"'), at=f.start)


def _semicolon(f: Fault, line_end: int) -> Plan:
    rest = f.text[f.end : line_end].strip()
    last = not rest or rest.startswith("#")
    f.error(
        "E0113",
        "`;` is not in the language",
        "the line end ends a statement",
        fix=f.fix("remove it" if last else "break the line", f.start, f.end, "" if last else "\n"),
    )
    return Plan(rewrite=(f.start, f.end, " " if last or f.reader.open_here else "\n"), at=f.start)
