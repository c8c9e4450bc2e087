"""Which data sources there are, and the arguments of each: one table for the checker, the runtime and the docs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, Literal

from gkd_dsl import schedules
from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.syntax import ast

ArgType = Literal["text", "int", "float", "bool", "list", "ratio", "ratio_or_text"]


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()


@dataclass(frozen=True)
class SourceArg:
    """One argument. A `ratio` is kept as a number in 0..1; `None` stands for "not given"."""

    name: str
    type: ArgType
    default: AttrValue | _Required
    doc: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None

    @property
    def required(self) -> bool:
        """Whether a call must give it."""
        return isinstance(self.default, _Required)

    def __str__(self) -> str:
        """As it is written in a signature."""
        head = f"{self.name}: {self.type}"
        return head if isinstance(self.default, _Required) else f"{head} = {_literal(self.default, self.type)}"


@dataclass(frozen=True)
class SourceKind:
    """A source: its arguments in the order of a call, and what its rows hold.

    `result` is `rows` (named columns) or `text` (one text a row).
    """

    name: str
    args: tuple[SourceArg, ...]
    result: Literal["rows", "text"]
    doc: str

    @property
    def signature(self) -> str:
        """The source as one line of the signature language."""
        return f"{self.name}({', '.join(str(arg) for arg in self.args)}) -> {self.result}"

    def arg(self, name: str) -> SourceArg | None:
        """The argument of this name."""
        return next((arg for arg in self.args if arg.name == name), None)


@dataclass(frozen=True)
class SourceProblem:
    """What is wrong with a source, at one of its arguments.

    arg      the argument ("path", "label"); one that was not written takes the place of the call
    message  what was found
    near     names that may have been meant, best first
    hint     what to write or do, as one clause
    kind     "argument" (name or type), "file", "column" or "row"
    """

    arg: str
    message: str
    near: tuple[str, ...] = ()
    hint: str | None = None
    kind: Literal["argument", "file", "column", "row"] = "argument"


TASKS = ("auto", "classification", "regression", "masked_lm", "causal_lm", "sentences")

_FIELDS = (
    SourceArg("text", "text", "text", "the column with the text"),
    SourceArg("text_pair", "text", "", "the column with a second text, for sentence pairs"),
    SourceArg("label", "text", "", "the column with the label"),
    SourceArg("prompt", "text", "", "causal models: the column with the prompt, which is not learned"),
    SourceArg("completion", "text", "", "causal models: the column with what follows the prompt; replaces `text`"),
)

_FILE = (
    SourceArg("path", "text", REQUIRED, "a file, or a pattern of files (`texts/*.txt`), from the folder of the spec"),
)

_ENCODING = (SourceArg("encoding", "text", "utf-8", "how the file is encoded; a byte order mark is dropped"),)

COMMON: Final = (
    SourceArg("task", "text", "auto", "what the rows are made into; auto follows the student's head", TASKS),
    SourceArg("labels", "list", (), "the labels in the order of the classes; without it sorted, or 0, 1, 2, ..."),
    SourceArg("threshold", "float", None, "two classes from a number: above is 1, below 0, equal rows are left out"),
    SourceArg("held_out", "ratio_or_text", 0.1, "the share of rows never trained on, or a file or split of its own"),
    SourceArg("limit", "int", None, "use only this many rows, drawn by `seed`", low=1),
    SourceArg("shuffle", "bool", True, "a new order of the rows every epoch"),
    SourceArg(
        "seed", "int", 0, "draws the held-out rows, the same in every stage; the order is the stage's seed", low=0
    ),
    SourceArg("max_length", "int", None, "tokens a row is cut to, unless the stage says; else 128", low=2),
    SourceArg("mask_probability", "ratio", 0.15, "masked models: the share of tokens to predict", low=0.0, high=1.0),
    SourceArg("add_eos", "bool", True, "causal models: end a text that is not cut with the end-of-text token"),
    SourceArg("workers", "int", None, "processes that tokenise; else by the number of rows and cores", low=1),
)

_UNLABELLED = tuple(arg for arg in COMMON if arg.name not in ("labels", "threshold"))

SOURCES: Final[dict[str, SourceKind]] = {
    kind.name: kind
    for kind in (
        SourceKind(
            "csv",
            (
                *_FILE,
                *_FIELDS,
                SourceArg("delimiter", "text", "auto", 'what stands between cells; auto is a tab for `.tsv`, else ","'),
                SourceArg("columns", "list", (), "the names of the columns, for a file without a header line"),
                SourceArg("quoting", "bool", True, 'whether `"` puts a cell in quotes; false takes it as a character'),
                *_ENCODING,
                *COMMON,
            ),
            "rows",
            "A table of comma- or tab-separated cells.",
        ),
        SourceKind("jsonl", (*_FILE, *_FIELDS, *_ENCODING, *COMMON), "rows", "One JSON object a line."),
        SourceKind(
            "text",
            (
                *_FILE,
                SourceArg("by", "text", "line", "what one row is", ("line", "paragraph", "file")),
                *_ENCODING,
                *_UNLABELLED,
            ),
            "text",
            "Plain text: one text a line, a paragraph (blank lines between), or a file.",
        ),
        SourceKind(
            "hf_dataset",
            (
                SourceArg("path", "text", REQUIRED, "a hub id, or a folder: data files or `Dataset.save_to_disk`"),
                SourceArg("name", "text", "", "the configuration of a hub data set"),
                SourceArg("split", "text", "train", "the split to train on"),
                SourceArg("revision", "text", "", "a branch, tag or commit of the hub data set"),
                *_FIELDS,
                *COMMON,
            ),
            "rows",
            "A data set of the Hugging Face hub or in a folder.",
        ),
    )
}


def source_kind(signature: ast.Signature, doc: str = "") -> SourceKind:
    """The kind that a registered source declares; the common arguments come with it.

    A result of `text` means rows that are strings, `rows` mappings from column names. An argument that
    the source declares itself replaces the common one of that name. Raises ValueError with what is wrong.
    """
    result = signature.result.name.text
    if result not in ("text", "rows"):
        raise ValueError(f"a source gives `text` or `rows`, not `{result}`")
    own = []
    for arg in signature.args:
        type_name = arg.type.name.text
        if type_name not in _READS:
            raise ValueError(f"the argument `{arg.name.text}` has type `{type_name}`; a source takes {_listed(_READS)}")
        default = REQUIRED if arg.default is None else _constant(arg.default)
        own.append(SourceArg(arg.name.text, type_name, default, ""))  # type: ignore[arg-type]
    names = {arg.name for arg in own}
    rest = (*_FIELDS, *COMMON) if result == "rows" else _UNLABELLED
    return SourceKind(
        signature.name.text,
        (*own, *(arg for arg in rest if arg.name not in names)),
        result,  # type: ignore[arg-type]
        doc,
    )


def bind_source(
    kind: SourceKind, positional: Sequence[object], named: Mapping[str, object]
) -> tuple[dict[str, AttrValue], list[SourceProblem]]:
    """The arguments of a call by name, defaults filled in, and what is wrong with it.

    Values are plain Python ones; a ratio may be a `schedules.Span` in percent.
    """
    args: dict[str, AttrValue] = {}
    problems: list[SourceProblem] = []
    if len(positional) > len(kind.args):
        problems.append(SourceProblem("", f"`{kind.name}` takes {len(kind.args)} arguments, {len(positional)} given"))
    pairs: list[tuple[str, object]] = [(arg.name, value) for arg, value in zip(kind.args, positional, strict=False)]
    by_place = {name for name, _ in pairs}
    for name in named:
        if name in by_place:
            problems.append(SourceProblem(name, f"`{name}` is given twice, by its place and by its name"))
    pairs += [(name, value) for name, value in named.items() if name not in by_place]
    for name, value in pairs:
        arg = kind.arg(name)
        if arg is None:
            names = [each.name for each in kind.args]
            near = tuple(get_close_matches(name, names, 2, 0.6))
            problems.append(
                SourceProblem(name, f"`{kind.name}` has no argument `{name}`", near, f"it takes {_listed(names)}")
            )
            continue
        args[name], problem = _read(arg, value)
        if problem:
            problems.append(problem)
    for arg in kind.args:
        if arg.name in args:
            continue
        if isinstance(arg.default, _Required):
            problems.append(SourceProblem(arg.name, f"`{kind.name}` needs `{arg.name}`: {arg.doc or arg.type}"))
        else:
            args[arg.name] = arg.default
    return args, problems


def filled(kind: SourceKind, args: Mapping[str, AttrValue]) -> dict[str, AttrValue]:
    """The arguments with defaults filled in, values left as they are."""
    defaults = {arg.name: arg.default for arg in kind.args if not isinstance(arg.default, _Required)}
    return {**defaults, **args}


_READS: Final[dict[str, str]] = {
    "text": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "ratio": "a share such as 10%",
    "ratio_or_text": "a share such as 10%, or a text",
}


def _read(arg: SourceArg, value: object) -> tuple[AttrValue, SourceProblem | None]:
    """The value as the argument's type takes it, or the problem."""
    if isinstance(value, schedules.Constant):
        value = value.amount
    if value is None and arg.default is None:
        return None, None
    if value is None and arg.type == "ratio_or_text":
        return 0.0, None
    converted = _converted(arg.type, value)
    if isinstance(converted, _Required):
        return None, SourceProblem(arg.name, f"`{arg.name}` is {_READS[arg.type]}, not {_shown(value)}")
    return converted, _out_of_range(arg, converted)


def _converted(wanted: ArgType, value: object) -> AttrValue | _Required:
    """The value where it has the wanted type, else REQUIRED."""
    if isinstance(value, str):
        return value if wanted in ("text", "ratio_or_text") else REQUIRED
    if isinstance(value, bool):
        return value if wanted == "bool" else REQUIRED
    if isinstance(value, list | tuple):
        return tuple(value) if wanted == "list" else REQUIRED
    if isinstance(value, int) and wanted == "int":
        return value
    if isinstance(value, int | float) and wanted == "float":
        return float(value)
    return _ratio(value) if wanted in ("ratio", "ratio_or_text") else REQUIRED


def _ratio(value: object) -> AttrValue | _Required:
    if isinstance(value, schedules.Span) and value.unit == "percent":
        return value.amount / 100.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return REQUIRED


def _out_of_range(arg: SourceArg, value: AttrValue) -> SourceProblem | None:
    if arg.choices and value not in arg.choices:
        near = tuple(get_close_matches(str(value), arg.choices, 2, 0.5))
        return SourceProblem(arg.name, f"`{arg.name}` is not {_shown(value)}", near, f"one of {_listed(arg.choices)}")
    if arg.type in ("ratio", "ratio_or_text") and isinstance(value, float) and not 0.0 <= value < 1.0:
        return SourceProblem(arg.name, f"`{arg.name}` is a share of the rows: at least 0 % and under 100 %")
    if isinstance(value, int | float) and not isinstance(value, bool) and arg.low is not None and value < arg.low:
        return SourceProblem(arg.name, f"`{arg.name}` is {value:g}; the least is {arg.low:g}")
    return None


def _constant(expr: ast.Expr) -> AttrValue:
    """The value of a default: a literal."""
    if isinstance(expr, ast.Number | ast.String | ast.Bool):
        return expr.value
    if isinstance(expr, ast.Duration) and expr.unit == "percent":
        return expr.value / 100.0
    if isinstance(expr, ast.List):
        return tuple(_constant(item) for item in expr.items)
    if isinstance(expr, ast.Unary) and expr.op == "-":
        inner = _constant(expr.value)
        if isinstance(inner, int | float):
            return -inner
    if isinstance(expr, ast.Name) and expr.id == "none":
        return None
    raise ValueError(f"the default `{expr.span.text}` is not a literal")


def _literal(value: AttrValue, type_name: ArgType) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"[{', '.join(_literal(item, type_name) for item in value)}]"
    if type_name in ("ratio", "ratio_or_text") and isinstance(value, float):
        return f"{100 * value:g}%"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return str(value)


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(f"`{name}`" for name in names)
