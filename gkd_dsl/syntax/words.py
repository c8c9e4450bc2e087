"""Keywords by where they stand, and the parser's expectations in words."""

from __future__ import annotations

from collections.abc import Iterable

ANYWHERE = ("project", "loss", "metric", "mask", "let", "use", "run", "pass", "counter", "policy", "stage")
"""Statements of the top level and of blocks."""

TOP_ONLY = ("teacher", "student", "model", "data", "param", "method", "import", "dim", "runtime")
"""Declarations of the top level."""

BLOCK_ONLY = ("train", "freeze", "minimize", "total", "evaluate", "keep")
"""Statements of a stage or a method."""

PASS_ONLY = ("replace", "swap", "add")
"""Changes inside a pass."""

TOP = (*TOP_ONLY, *ANYWHERE)
BLOCK = (*BLOCK_ONLY, *ANYWHERE)
STATEMENTS = (*TOP, *BLOCK_ONLY, *PASS_ONLY)

HOME = {
    **dict.fromkeys(TOP_ONLY, "at the top level"),
    **dict.fromkeys(PASS_ONLY, "inside a pass"),
    "train": "inside a stage",
    "freeze": "inside a stage",
    "minimize": "inside a stage",
    "evaluate": "inside a stage",
    "keep": "inside a stage",
    "total": "inside a method",
    "stage": "at the top level or inside a method",
}

NAMED = (
    "teacher", "student", "model", "data", "mask", "project", "loss", "metric", "let", "param", "method",
    "stage", "pass", "counter", "policy",
)  # fmt: skip
"""Keywords with a name right behind."""

WITH_VALUE = ("teacher", "student", "model", "data", "mask", "project", "loss", "metric", "let", "pass", "policy")
"""Keywords of `keyword name = value`."""

FOREIGN = {
    "if": "the language has no conditionals; `when`, `select(...)` and schedules say what changes",
    "elif": "the language has no conditionals; `when`, `select(...)` and schedules say what changes",
    "else": "the language has no conditionals; `when`, `select(...)` and schedules say what changes",
    "while": "the language has no loops; `sum(... for i in ...)` goes over layers",
    "for": "a `for` stands inside a call, as in `sum(... for i in ...)`, or in `stage x for 3 epochs`",
    "def": "the language has no functions of its own; `method` and `loss name(m: model) = ...` come nearest",
    "lambda": "the language has no functions without a name",
    "class": "the language has no classes",
    "return": "nothing is returned; a method names its losses and may give a `total`",
    "try": "the language has no exceptions",
    "with": "`with` stands only in `replace ... with ...`",
    "assert": "the checker asserts; there is no statement for it",
    "print": "`gkd explain` prints; there is no statement for it",
    "del": "nothing is deleted",
    "global": "names need no such statement",
    "async": "there is nothing asynchronous in the language",
    "yield": "there are no generators in the language",
}
"""Words of other languages, and what to say of them."""

_OPERATORS = {
    "PLUS", "MINUS", "STAR", "SLASH", "PERCENT", "AMPERSAND", "AND", "OR", "EQUALS", "DIFFERS", "AT_MOST", "AT_LEAST",
    "LESS", "MORE", "INTO", "FROM_TEACHER", "DOT", "UP_TO", "THROUGH",
}  # fmt: skip
_SYMBOLS = {
    "ASSIGN": "=", "COLON": ":", "COMMA": ",", "LPAR": "(", "RPAR": ")", "LSQB": "[", "RSQB": "]", "LBRACE": "{",
    "RBRACE": "}", "TO_STUDENT": "->", "ELLIPSIS": "...", "FROM_TEACHER": "<-",
}  # fmt: skip
_WORDS = {
    "FOR", "EACH", "IN", "AS", "USE", "FROM", "TO", "ADVANCE", "WHEN", "EVERY", "BEST", "BY", "WITH", "AT", "WHERE",
    "PYTHON",
}  # fmt: skip


def expected(accepts: Iterable[str], *, in_block: bool) -> str:
    """What may stand at a place, in words: `a name, or `)``."""
    accepts = set(accepts) - {"MISSING"}
    found: list[str] = []
    if {"STAGE", "LOSS"} & accepts or "REPLACE" in accepts:
        found.append("a statement" if in_block else declarations())
        accepts -= {"NAME", "_NL"}
    if "NAME" in accepts:
        found.append("an expression" if "INT" in accepts and "LPAR" in accepts else "a name")
    elif "INT" in accepts:
        found.append("a number")
    elif "STRING" in accepts:
        found.append("a text in double quotes")
    if "DURATION" in accepts and "INT" not in accepts:
        found.append("a duration such as `3 epochs`")
    if {"PLUS", "STAR"} <= accepts:
        found.append("an operator")
    opens = "an expression" in found
    for name, symbol in _SYMBOLS.items():
        if (
            name in accepts
            and not (opens and name in ("LPAR", "LSQB"))
            and not (name in _OPERATORS and "PLUS" in accepts)
        ):
            if "an operator" in found and name in ("LPAR", "LSQB"):
                continue
            found.append(f"`{symbol}`")
    found += [f"`{name.lower()}`" for name in sorted(accepts & _WORDS)]
    if "_NL" in accepts or "$END" in accepts:
        found.append("the end of the line")
    if not found:
        found = [f"`{name.lower()}`" for name in sorted(accepts)]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]


def declarations() -> str:
    """The declarations of the top level, in words."""
    return "a declaration: teacher, student, model, data, param, project, loss, metric, mask, let, use, stage, ..."


def statements(kind: str) -> str:
    """The statements of a block, in words."""
    if kind == "pass":
        return "a change: replace, swap, add, or a setting such as `grad = discard`"
    if kind == "runtime":
        return "a setting such as `precision = bf16`, or `teacher t { ... }`"
    if kind in ("teacher", "student", "model", "policy", "placement"):
        return "a setting such as `name = value`"
    if kind == "method":
        return "a statement: project, loss, metric, mask, let, use, pass, total, stage, ..."
    return "a statement: train, freeze, minimize, loss, let, evaluate, keep, or a setting such as `optim = adamw(...)`"
