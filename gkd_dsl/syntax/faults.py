"""What is wrong at a place in the text, in words, and how reading goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lark import Token

from gkd_dsl.diagnostics import Edit, Fix, Label
from gkd_dsl.diagnostics.suggest import did_you_mean
from gkd_dsl.syntax import scan, words

if TYPE_CHECKING:
    from gkd_dsl.syntax.recover import Reader

_OPENS = {"LPAR": "(", "LSQB": "[", "LBRACE": "{"}
_CLOSES = {"LPAR": ("RPAR", ")"), "LSQB": ("RSQB", "]"), "LBRACE": ("RBRACE", "}")}
_MATCH = {"RPAR": "LPAR", "RSQB": "LSQB", "RBRACE": "LBRACE"}


@dataclass(frozen=True)
class Plan:
    """How reading goes on: tokens the text lacks, where to read on, or to skip the statement."""

    put: tuple[tuple[str, str], ...] = ()
    at: int | None = None
    skip: bool = False
    pop: int = 0
    rewrite: tuple[int, int, str] | None = None


SKIP = Plan(skip=True)


class Fault:
    """One token that cannot stand where it stands, and what is around it."""

    def __init__(self, reader: Reader, token: Token) -> None:
        self.reader = reader
        self.token = token
        self.kind = token.type
        self.word = str(token)
        self.start = token.start_pos or 0
        self.end = token.end_pos if token.end_pos is not None else self.start + len(token)
        self.line = reader.line
        self.previous = reader.line[-1] if reader.line else None
        self.text = reader.text
        if self.kind == "_NL":
            self.end = self.start

    @property
    def at_end(self) -> bool:
        """Whether the line, the block or the file ends here."""
        return self.kind in ("_NL", "$END", "RBRACE")

    @property
    def first(self) -> str:
        """The first word of the statement."""
        return str(self.line[0]) if self.line else self.word

    @property
    def first_on_line(self) -> bool:
        """Whether nothing but blanks stands before it."""
        begin = self.text.rfind("\n", 0, self.start) + 1
        return not self.text[begin : self.start].strip(" \t")

    def after_previous(self) -> int:
        """The place right behind the last token."""
        return self.end_of(self.previous) if self.previous is not None else self.start

    @staticmethod
    def end_of(token: Token) -> int:
        """The place right behind a token."""
        return token.end_pos if token.end_pos is not None else (token.start_pos or 0) + len(token)

    def named(self) -> str:
        """The token in words."""
        if self.kind == "_NL":
            return "the end of the line"
        if self.kind == "$END":
            return "the end of the file" if self.reader.whole_file else "the end"
        word = self.word if len(self.word) <= 40 else self.word[:37] + "..."
        return f"`{word}`"

    def error(
        self,
        code: str,
        message: str,
        label: str,
        *,
        start: int | None = None,
        end: int | None = None,
        labels: tuple[Label, ...] = (),
        notes: tuple[str, ...] = (),
        fix: Fix | None = None,
    ) -> None:
        """Report it, at the token where no other place is given."""
        span = self.reader.span(self.start if start is None else start, self.end if end is None else end)
        self.reader.diagnostics.error(code, message, span, label, labels=labels, notes=notes, fix=fix)

    def fix(self, title: str, start: int, end: int, text: str) -> Fix:
        """A fix of one edit."""
        return Fix(title, (Edit(self.reader.span(start, end), text),))


def diagnose(reader: Reader, token: Token) -> Plan:
    """Report what is wrong at `token`; gives how to go on."""
    from gkd_dsl.syntax import faults_expression, faults_text

    fault = Fault(reader, token)
    looks: tuple[Callable[[Fault], Plan | None], ...] = (
        too_deep,
        unclosed_block,
        faults_text.bad_character,
        closer,
        at_statement_start,
        unclosed,
        faults_expression.foreign,
        faults_expression.slices,
        faults_expression.operators,
        faults_expression.dangling,
        missing_assignment,
        missing_type,
        missing_duration,
        missing_block,
        missing_comma,
        missing_name,
        trailing,
    )
    for look in looks:
        plan = look(fault)
        if plan is not None:
            return plan
    accepts = reader.accepts()
    expected = words.expected(accepts, in_block=bool(reader.block))
    fault.error("E0120", f"{fault.named()} cannot stand here", f"expected {expected}")
    return SKIP


def too_deep(f: Fault) -> Plan | None:
    """More brackets inside one another than the language allows."""
    if f.kind not in _OPENS or len(f.reader.brackets) < 100:
        return None
    f.error("E0118", "brackets nest more than 100 levels deep", "too deep", notes=("name parts of it with `let`",))
    return SKIP


def unclosed_block(f: Fault) -> Plan | None:
    """A declaration where a block's `}` is missing."""
    if f.line or not f.reader.brackets or not f.reader.block_is_unclosed(f.token):
        return None
    opener = f.reader.brackets[-1][0]
    f.error(
        "E0110",
        "`{` is never closed",
        f"`}}` expected before this `{f.word}`",
        labels=(f.reader.opened(opener),),
        fix=f.fix("close the block", f.start, f.start, "}\n"),
    )
    return Plan(put=(("RBRACE", "}"), ("_NL", "\n")))


# --- brackets ---


def closer(f: Fault) -> Plan | None:
    """`)`, `]` or `}` where another closer, or none, belongs; or the end of the text."""
    brackets = f.reader.brackets
    if f.kind == "$END" and brackets:
        return _left_open(f, f.after_previous() if f.reader.open_here else len(f.text.rstrip()))
    if f.kind not in _MATCH:
        return None
    if not brackets:
        f.error(
            "E0111",
            f"`{f.word}` closes nothing",
            f"no `{_OPENS[_MATCH[f.kind]]}` is open here",
            fix=f.fix(f"remove `{f.word}`", f.start, f.end, "") if f.kind != "RBRACE" else None,
        )
        if f.kind == "RBRACE":
            f.reader.extra_braces = f.reader.left_open() + 1
        return Plan(at=f.end)
    opener = brackets[-1][0]
    if opener.type == _MATCH[f.kind]:
        return None
    kind, symbol = _CLOSES[opener.type]
    outer = any(token.type == _MATCH[f.kind] for token, _ in brackets)
    if f.kind == "RBRACE":
        return _left_open(f, f.after_previous())
    if opener.type == "LBRACE" or not outer:
        wrong = f"`{symbol}`" if opener.type != "LBRACE" else f"no `{_OPENS[_MATCH[f.kind]]}`"
        f.error(
            "E0111",
            f"`{f.word}` closes nothing",
            f"{wrong} expected here" if opener.type != "LBRACE" else f"{wrong} is open here",
            labels=(f.reader.opened(opener),) if opener.type != "LBRACE" else (),
            fix=f.fix(f"write `{symbol}`", f.start, f.end, symbol)
            if opener.type != "LBRACE"
            else f.fix(f"remove `{f.word}`", f.start, f.end, ""),
        )
        return Plan(put=((kind, symbol),), at=f.end) if opener.type != "LBRACE" else Plan(at=f.end)
    place = f.start
    if opener.type == "LSQB":
        # `s.hidden[1 <- t.hidden[3]`: an index holds no pair, so it was meant to end before the arrow.
        inside = [token for token in f.line if (token.start_pos or 0) > (opener.start_pos or 0)]
        arrow = next((index for index, token in enumerate(inside) if token.type == "FROM_TEACHER"), 0)
        place = f.end_of(inside[arrow - 1]) if arrow else place
    f.error(
        "E0110",
        f"`{opener}` is never closed",
        f"`{symbol}` expected before this `{f.word}`",
        labels=(f.reader.opened(opener),),
        fix=f.fix(f"insert `{symbol}`", place, place, symbol),
    )
    return Plan(put=((kind, symbol),)) if place == f.start else SKIP


def _left_open(f: Fault, place: int) -> Plan:
    """Report the innermost open bracket at the place where its closer was expected; close what is open there."""
    opener = f.reader.brackets[-1][0]
    open_here = f.reader.open_here
    if open_here:
        opener = open_here[0]
    kind, symbol = _CLOSES[opener.type]
    missing = "".join(_CLOSES[token.type][1] for token in reversed(open_here)) or "\n}"
    put = tuple(_CLOSES[token.type] for token in reversed(open_here))
    f.error(
        "E0110",
        f"`{opener}` is never closed",
        f"`{symbol}` expected here",
        start=place,
        end=place,
        labels=(f.reader.opened(opener),),
        fix=f.fix(f"insert `{symbol}`", place, place, missing) if f.reader.can(*(k for k, _ in put)) else None,
    )
    if open_here:
        return Plan(put=put, at=place)
    return Plan(put=((kind, symbol),))


def unclosed(f: Fault) -> Plan | None:
    """A `(` or `[` that a new statement, further down, shows to be unclosed."""
    open_here = f.reader.open_here
    if not open_here:
        return None
    begin = open_here[0].start_pos or 0
    newline = scan.next_statement(f.text, begin, f.end)
    if newline is None and f.first_on_line and scan.statement_end(f.text, f.start, len(open_here)).depth > 0:
        newline = f.text.rfind("\n", 0, f.start)
        newline -= newline > 0 and f.text[newline - 1] == "\r"
    if newline is None:
        return None
    before = [token for token in f.line if (token.start_pos or 0) < newline]
    place = f.end_of(before[-1]) if before else newline
    # Only what was open before that line is unclosed.
    still = [token for token in open_here if (token.start_pos or 0) < newline]
    opener = still[0]
    symbol = _CLOSES[opener.type][1]
    put = tuple(_CLOSES[token.type] for token in reversed(still))
    whole = len(before) == len(f.line) and f.reader.can(*(kind for kind, _ in put))
    f.error(
        "E0110",
        f"`{opener}` is never closed",
        f"`{symbol}` expected here",
        start=place,
        end=place,
        labels=(f.reader.opened(opener),),
        fix=f.fix(f"insert `{symbol}`", place, place, "".join(text for _, text in put)) if whole else None,
    )
    return Plan(put=put, at=newline) if whole else Plan(skip=True, at=newline)


# --- the start of a statement ---


def at_statement_start(f: Fault) -> Plan | None:
    """A statement that is not one, or not one of this place."""
    block = f.reader.block
    if not f.line:
        token, following = f.token, f.text[f.end : f.end + 200].lstrip(" \t")
    elif (
        len(f.line) == 1 and f.line[0].type == "NAME" and f.kind not in ("ASSIGN", "$END") and not f.reader.can("PLUS")
    ):
        token, following = f.line[0], f.text[f.start : f.start + 200]
    else:
        return None
    word, start, end = str(token), token.start_pos or 0, f.end_of(token)
    if token.type in ("_NL", "$END"):
        return None
    if word in words.FOREIGN and (token.type == "NAME" or word in ("for", "with")):
        f.error("E0116", f"`{word}` is not a statement", words.FOREIGN[word], start=start, end=end)
        return SKIP
    if not word[:1].isalpha() and word[:1] != "_":
        f.error(
            "E0102",
            f"a statement cannot start with `{word}`",
            f"expected {words.statements(block) if block else words.declarations()}",
            start=start,
            end=end,
        )
        return SKIP
    if word in words.HOME or word == "gkd" or word in words.STATEMENTS:
        return _misplaced(f, word, start, end, block)
    if following.startswith("=") and not following.startswith("==") and not block:
        f.error(
            "E0104",
            f"the setting `{word}` stands outside a block",
            "settings belong inside a stage or `runtime`",
            start=start,
            end=end,
            notes=("`let name = ...` gives a value a name",),
            fix=f.fix("make it a `let`", start, start, "let "),
        )
        return Plan(put=(("LET", "let"),))
    valued = f.line and (f.kind in ("NAME", "INT", "FLOAT", "STRING") or f.word[:1].isalpha())
    if valued and not did_you_mean(word, words.STATEMENTS, 1):
        return None  # A setting without its `=`.
    return _unknown(f, word, start, end, block, following)


def _misplaced(f: Fault, word: str, start: int, end: int, block: str) -> Plan:
    home = words.HOME.get(word, "at the top level" if word != "gkd" else "on the first line")
    name = "gkd 1" if word == "gkd" else word
    place = f"in the block of `{block}`" if block and block != "block" else "at the top level"
    f.error("E0104", f"`{name}` belongs {home}", f"not {place}", start=start, end=end)
    return SKIP


def _unknown(f: Fault, word: str, start: int, end: int, block: str, following: str) -> Plan:
    legal = {"": words.TOP, "pass": words.PASS_ONLY, "runtime": ("teacher", "student", "model")}.get(block, words.BLOCK)
    if block in ("teacher", "student", "model", "policy"):
        legal = ()
    near = did_you_mean(word, (*legal, "gkd") if not block else legal, 1)
    elsewhere = [] if near else did_you_mean(word, words.STATEMENTS, 1)
    label = f"did you mean `{near[0]}`?" if near else "not a keyword"
    notes = [f"expected {words.statements(block) if block else words.declarations()}"]
    if elsewhere:
        notes.append(f"`{elsewhere[0]}` belongs {words.HOME.get(elsewhere[0], 'elsewhere')}")
    if following.startswith("(") and not near:
        label = "a call alone is no statement"
        notes.append("give its value a name, as in `loss name = ...` or `let name = ...`")
    f.error(
        "E0102",
        f"unknown statement `{word}`",
        label,
        start=start,
        end=end,
        notes=tuple(notes),
        fix=f.fix(f"write `{near[0]}`", start, end, near[0]) if near else None,
    )
    if near and not f.line and near[0] != "gkd":
        # Read the rest as what was meant: its own faults are worth reporting, its names worth having.
        return Plan(put=((near[0].upper(), near[0]),), at=end)
    return SKIP


# --- what is missing ---


def missing_assignment(f: Fault) -> Plan | None:
    """A declaration without its `=`, or with another sign for it."""
    if f.reader.open_here or not f.reader.can("ASSIGN") or f.reader.mark is not None:
        return None
    if f.kind in ("EQUALS", "COLON", "FROM_TEACHER") and f.reader.can("ASSIGN", "NAME"):
        f.error(
            "E0105",
            f"`{f.word}` stands where `=` belongs",
            "write `=`",
            notes=("`==` compares two values",) if f.kind == "EQUALS" else (),
            fix=f.fix("write `=`", f.start, f.end, "="),
        )
        return Plan(put=(("ASSIGN", "="),), at=f.end)
    if f.at_end:
        f.error(
            "E0105",
            f"`{_head(f)}` has no value",
            f"`= ...` expected behind `{f.previous}`",
            start=f.after_previous(),
            end=f.after_previous(),
        )
        return SKIP
    kind = f.kind if f.kind != "BAD" else "NAME"
    starts = f.reader.can("ASSIGN", kind) or (f.word[:1].isalpha() and f.reader.can("ASSIGN", "NAME"))
    if not starts:
        return None
    f.error(
        "E0105",
        f"`=` is missing in `{_head(f)}`",
        f"`=` expected before {f.named()}",
        fix=f.fix("insert `=`", f.start, f.start, "= "),
    )
    return Plan(put=(("ASSIGN", "="),))


def _head(f: Fault) -> str:
    return " ".join(str(token) for token in f.line[:2])


def missing_type(f: Fault) -> Plan | None:
    """A parameter without `: type`."""
    if not f.reader.can("COLON"):
        return None
    if f.kind == "NAME" and f.reader.can("COLON", "NAME"):
        f.error(
            "E0106",
            f"`:` is missing between `{f.previous}` and its type",
            f"`:` expected before `{f.word}`",
            fix=f.fix("insert `:`", f.after_previous(), f.after_previous(), ":"),
        )
        return Plan(put=(("COLON", ":"),))
    value = f.text[f.end :].lstrip(" \t")[:40]
    guess = _type_of(value) if f.kind == "ASSIGN" else None
    place = f.after_previous()
    f.error(
        "E0106",
        f"the type of `{f.previous}` is missing",
        "`: type` expected here",
        start=place,
        end=place,
        notes=("types: float, int, bool, text, schedule; a parameter reads `param T: float = 4.0`",),
        fix=f.fix(f"declare it as {guess}", place, place, f": {guess}") if guess else None,
    )
    if f.kind in ("ASSIGN", "COMMA", "RPAR"):
        return Plan(put=(("COLON", ":"), ("NAME", guess or "float")))
    return SKIP


def _type_of(value: str) -> str | None:
    if value.startswith('"'):
        return "text"
    if value.startswith(("true", "false")):
        return "bool"
    digits = value.lstrip("-")
    if not digits[:1].isdigit():
        return None
    number = digits.split()[0].rstrip(",)")
    return "int" if number.replace("_", "").isdigit() else "float"


def missing_duration(f: Fault) -> Plan | None:
    """`for 3` without a unit, or `for` without a duration."""
    if f.previous is None or f.previous.type not in ("FOR", "EVERY") or not f.reader.can("DURATION"):
        return None
    if f.kind not in ("INT", "FLOAT"):
        f.error("E0122", f"a duration is missing behind `{f.previous}`", "a duration such as `3 epochs` or `500 steps`")
        return SKIP
    unit_start = f.end + len(f.text[f.end :]) - len(f.text[f.end :].lstrip(" \t"))
    unit = ""
    while unit_start + len(unit) < len(f.text) and f.text[unit_start + len(unit)].isalpha():
        unit += f.text[unit_start + len(unit)]
    near = did_you_mean(unit, ("steps", "step", "epochs", "epoch", "tokens", "token"), 1) if unit != "each" else []
    if unit and near:
        f.error(
            "E0122",
            f"`{unit}` is not a unit of a duration",
            f"did you mean `{near[0]}`?",
            start=unit_start,
            end=unit_start + len(unit),
            fix=f.fix(f"write `{near[0]}`", unit_start, unit_start + len(unit), near[0]),
        )
        return Plan(put=(("DURATION", f"{f.word} {near[0]}"),), at=unit_start + len(unit))
    f.error(
        "E0122",
        f"the duration `{f.word}` has no unit",
        f"`{f.word} epochs`, `{f.word} steps` or `{f.word} tokens`",
        fix=f.fix("count epochs", f.end, f.end, " epochs") if f.previous.type == "FOR" else None,
    )
    known = unit if unit and unit not in ("each",) else ""
    return Plan(put=(("DURATION", f"{f.word} epochs"),), at=unit_start + len(known) if known else f.end)


def missing_block(f: Fault) -> Plan | None:
    """A stage, method, policy or `runtime` without `{`."""
    if not f.at_end or not f.reader.can("LBRACE") or f.reader.can("_NL"):
        return None
    place = f.after_previous()
    rest = f.text[place:]
    brace = len(rest) - len(rest.lstrip(" \t\r\n"))
    if rest[brace : brace + 1] == "{":
        f.error(
            "E0126",
            f"the `{{` of `{f.first}` stands on a line of its own",
            "`{` belongs here",
            start=place,
            end=place,
            fix=f.fix("move it up", place, place + brace, " "),
        )
        return Plan(put=(), at=place + brace)
    f.error(
        "E0126",
        f"the block of `{f.first}` is missing",
        "`{` expected here",
        start=place,
        end=place,
        fix=f.fix("open the block", place, place, " {"),
    )
    following = place + brace
    if following < len(f.text) and scan.indentation(f.text, following) > scan.indentation(f.text, place):
        f.reader.extra_braces = f.reader.left_open() + 1
        return Plan(put=(("LBRACE", "{"),))
    return Plan(put=(("LBRACE", "{"), ("RBRACE", "}")))


def missing_comma(f: Fault) -> Plan | None:
    """Two arguments without a comma between."""
    if not f.reader.open_here or f.kind in ("_NL", "$END", "BAD") or not f.reader.can("COMMA"):
        return None
    if not (f.reader.can("COMMA", f.kind) or (f.word[:1].isalpha() and f.reader.can("COMMA", "NAME"))):
        return None
    if f.kind in ("RPAR", "RSQB", "MINUS"):
        return None
    place = f.after_previous()
    suffix = f.previous is not None and f.previous.type in ("INT", "FLOAT") and f.word in ("k", "M", "B")
    f.error(
        "E0107",
        f"`,` is missing between `{_short(f.previous)}` and {f.named()}",
        "`,` expected before this" if not suffix else "`k`, `M` and `B` stand only in durations, as in `2M tokens`",
        fix=f.fix("insert `,`", place, place, ",") if not suffix else None,
    )
    return Plan(put=(("COMMA", ","),)) if not suffix else SKIP


def _short(token: Token | None) -> str:
    text = str(token) if token is not None else ""
    return text if len(text) <= 30 else text[:27] + "..."


def missing_name(f: Fault) -> Plan | None:
    """A declaration without its name."""
    if f.previous is None or not f.reader.can("NAME") or f.reader.can("INT"):
        return None
    accepts = f.reader.accepts() - {"NAME", "_NL"}
    if accepts - {"LPAR", "ELLIPSIS", "RPAR", "PYTHON", "TEACHER", "STUDENT", "MODEL", "RBRACE"}:
        return None
    what = "a type" if f.previous.type == "COLON" else "a name"
    behind = f"`{f.previous}`"
    if f.at_end:
        place = f.after_previous()
        f.error("E0108", f"{what} is missing behind {behind}", f"{what} expected here", start=place, end=place)
    else:
        f.error(
            "E0108",
            f"{f.named()} is not {what}",
            f"{what} expected behind {behind}",
            notes=("names are made of letters, digits and `_`, and start with no digit",),
        )
    return SKIP


def trailing(f: Fault) -> Plan | None:
    """More text where a statement is complete."""
    if f.reader.open_here or not f.reader.can("_NL") or f.at_end or not f.line:
        return None
    if f.word in words.STATEMENTS or f.word == "gkd":
        f.error(
            "E0121",
            "two statements stand on one line",
            f"`{f.word}` starts a new line",
            fix=f.fix("break the line", f.after_previous(), f.start, "\n"),
        )
        if f.reader.block or f.word in words.TOP:
            return Plan(put=(("_NL", "\n"),))
        return SKIP
    if f.previous is not None and f.previous.type in ("INT", "FLOAT") and f.word in ("k", "M", "B"):
        f.error("E0121", f"{f.named()} behind a number", "`k`, `M` and `B` stand only in durations, as in `2M tokens`")
        return SKIP
    label = "an operator or a line end is missing before this"
    if not f.reader.can("PLUS"):
        label = "a new statement starts on a new line"
    f.error("E0121", f"{f.named()} stands behind the end of the statement", label)
    return SKIP
