"""Faults inside expressions: habits from other languages, slices, operators without an operand."""

from __future__ import annotations

from gkd_dsl.syntax import words
from gkd_dsl.syntax.faults import SKIP, Fault, Plan

_COMPARISONS = ("EQUALS", "DIFFERS", "AT_MOST", "AT_LEAST", "LESS", "MORE")
_INFIX = {
    "PLUS", "MINUS", "STAR", "SLASH", "PERCENT", "AMPERSAND", "AND", "OR", *_COMPARISONS, "INTO", "FROM_TEACHER",
    "TO_STUDENT", "UP_TO", "THROUGH", "ASSIGN", "NOT", "IN", "WHEN", "WITH", "FROM", "TO", "AT", "MINIMIZE", "TRAIN",
    "FREEZE", "EVALUATE", "DOT",
}  # fmt: skip


def foreign(f: Fault) -> Plan | None:
    """Conditionals, lambdas, unpacking, powers, dictionaries, list comprehensions."""
    previous = f.previous
    if f.kind == "STAR" and not f.reader.can("STAR"):
        return _stars(f)
    if f.kind == "SLASH" and previous is not None and previous.type == "SLASH":
        hint = "a comment starts with `#`; there is no whole division"
        return _refuse(f, hint, previous.start_pos, "`//` is not an operator")
    if f.word in ("if", "else", "elif") and f.line:
        return _refuse(f, words.FOREIGN["if"], None, f"there is no `{f.word}` in an expression")
    if previous is not None and str(previous) == "lambda":
        return _refuse(f, words.FOREIGN["lambda"], previous.start_pos, "there is no `lambda`", f.end_of(previous))
    if f.word == "is" and f.line:
        return _refuse(f, "`==` compares", None, "there is no `is`")
    if f.kind == "IN" and f.line:
        return _refuse(f, "membership cannot be asked for", None, "`in` is not an operator")
    if f.kind == "FOR" and f.line:
        note = "as in `sum(mse(...) for (i, j) in uniform(s.layer, t.layer))`"
        return _refuse(f, "a `for` stands directly inside a call", None, "this `for` is in the wrong place", note=note)
    if f.kind == "LBRACE" and f.reader.can("LPAR") and f.reader.can("INT"):
        return _refuse(f, "settings with names are a call, as in `adamw(lr = 5e-5)`", None, "there are no dictionaries")
    return None


def _refuse(
    f: Fault, label: str, start: int | None, message: str, end: int | None = None, *, note: str | None = None
) -> Plan:
    f.error("E0116", message, label, start=start, end=end, notes=(note,) if note else ())
    return SKIP


def _stars(f: Fault) -> Plan | None:
    previous = f.previous
    if previous is not None and previous.type == "STAR":
        return _refuse(f, "there is no power; write `x * x`", previous.start_pos, "`**` is not an operator")
    if previous is not None and previous.type in ("LPAR", "COMMA"):
        end = f.end + (f.text[f.end : f.end + 1] == "*")
        return _refuse(f, "write every argument out", f.start, "arguments cannot be unpacked", end)
    return None


def slices(f: Fault) -> Plan | None:
    """`[1:3]`, `1..3`, `a: 3` in a call."""
    opener = f.reader.open_here[-1] if f.reader.open_here else None
    if f.kind == "COLON" and opener is not None:
        following = f.text[f.end : f.end + 1]
        if opener.type == "LSQB":
            whole = f.previous is not opener and following not in ("]", ",", "")
            f.error(
                "E0115",
                "`:` does not slice",
                "write `lo ..< hi`, without its end, or `lo ..= hi`, with it",
                fix=f.fix("write `..<`", f.start, f.end, " ..< ") if whole else None,
            )
            return Plan(put=(("UP_TO", "..<"),), at=f.end) if whole else SKIP
        if (
            f.previous is not None
            and f.previous.type == "NAME"
            and (f.reader.mark is not None or f.first not in ("method", "loss"))
        ):
            f.error(
                "E0105",
                "`:` stands where `=` belongs",
                "a named argument reads `name = value`",
                fix=f.fix("write `=`", f.start, f.end, " ="),
            )
            return Plan(put=(("ASSIGN", "="),), at=f.end)
        return None
    dots = f.kind == "ELLIPSIS" or (f.kind == "DOT" and f.previous is not None and f.previous.type == "DOT")
    if not dots or not f.line:
        return None
    start = f.start if f.kind == "ELLIPSIS" else (f.previous.start_pos or 0) if f.previous is not None else f.start
    end = f.end + (f.text[f.end : f.end + 1] == ".")
    f.error(
        "E0115",
        f"`{f.text[start:end]}` is not a range",
        "write `..<`, without the last, or `..=`, with it",
        start=start,
        end=end,
        fix=f.fix("write `..<`", start, end, "..<"),
    )
    return Plan(put=(("UP_TO", "..<"),), at=end, pop=0 if f.kind == "ELLIPSIS" else 1)


def operators(f: Fault) -> Plan | None:
    """Operators that do not go together, or stand where they mean nothing."""
    previous = f.previous
    if f.kind in _COMPARISONS and _compared(f):
        f.error(
            "E0123",
            "comparisons do not chain",
            "a second comparison",
            notes=("write `a < b and b < c`",),
        )
        return SKIP
    if f.kind == "AMPERSAND" and previous is not None and previous.type == "AMPERSAND":
        start = previous.start_pos or 0
        f.error(
            "E0116",
            "`&&` is not an operator",
            "write `and`",
            start=start,
            fix=f.fix("write `and`", start, f.end, "and"),
        )
        return Plan(at=f.end)
    if f.kind == "FROM_TEACHER" and any(token.type == "FROM_TEACHER" for token in f.line):
        f.error(
            "E0123", "one `<-` to a pair", "a second one", notes=("`student_side <- teacher_side`, once in a call",)
        )
        return SKIP
    if f.kind == "TO_STUDENT" and f.line and not f.reader.can("TO_STUDENT"):
        f.error(
            "E0120",
            "`->` stands only directly inside a call",
            "not here",
            notes=("as in `ramp(0 -> 1)`, `linear(s.H -> t.H)`; a loss compares by `s.x <- t.x`",),
        )
        return SKIP
    if f.kind == "ASSIGN" and previous is not None and previous.type == "ASSIGN" and f.end_of(previous) == f.start:
        f.error(
            "E0105",
            "`==` stands where `=` belongs",
            "write `=`",
            start=previous.start_pos,
            notes=("`==` compares two values",),
            fix=f.fix("write `=`", previous.start_pos or 0, f.end, "="),
        )
        return Plan(at=f.end)
    if f.kind == "ASSIGN" and f.reader.mark is not None and f.reader.can("EQUALS"):
        f.error("E0120", "`=` cannot stand here", "`==` compares", fix=f.fix("write `==`", f.start, f.end, "=="))
        return Plan(put=(("EQUALS", "=="),), at=f.end)
    if f.kind == "DOT" and f.reader.can("INT") and f.text[f.end : f.end + 1].isdigit():
        f.error("E0114", "a number starts with a digit", "write `0.`", fix=f.fix("write `0.`", f.start, f.end, "0."))
        end = f.end
        while end < len(f.text) and (f.text[end].isdigit() or f.text[end] == "_"):
            end += 1
        return Plan(put=(("FLOAT", "0" + f.text[f.start : end].rstrip("_")),), at=end)
    return None


def _compared(f: Fault) -> bool:
    """Whether a comparison stands in this statement before, at this depth of brackets."""
    depth = 0
    for token in reversed(f.line):
        if token.type in ("RPAR", "RSQB"):
            depth += 1
        elif token.type in ("LPAR", "LSQB"):
            depth -= 1
            if depth < 0:
                return False
        elif depth == 0 and token.type in _COMPARISONS:
            return True
        elif depth == 0 and token.type in ("COMMA", "AND", "OR", "AMPERSAND", "ASSIGN"):
            return False
    return False


def dangling(f: Fault) -> Plan | None:
    """An operator, a comma or a keyword without what belongs behind it."""
    previous = f.previous
    if previous is None or not f.reader.can("NAME"):
        return None
    if f.word[:1].isalnum() and f.kind != "DURATION":
        return None
    if previous.type in _INFIX:
        what = "a name" if previous.type == "DOT" else "an expression"
        if f.at_end:
            message, label = f"{what} is missing behind `{previous}`", f"{what} expected behind this"
            f.error("E0114", message, label, start=previous.start_pos, end=f.end_of(previous))
        else:
            f.error("E0114", f"{what} is missing behind `{previous}`", f"{what} expected before {f.named()}")
        return _with_missing(f) if previous.type != "DOT" else SKIP
    if previous.type in ("LPAR", "LSQB", "COMMA") and f.reader.can("INT"):
        f.error("E0114", f"an expression is missing before {f.named()}", f"expected behind `{previous}`")
        return _with_missing(f)
    return None


def _with_missing(f: Fault) -> Plan:
    """Put a missing expression in where that lets the rest be read."""
    kind = f.kind if f.kind != "$END" else "_NL"
    if f.reader.can("MISSING", kind):
        return Plan(put=(("MISSING", ""),))
    return SKIP
