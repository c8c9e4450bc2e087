"""The syntax tree: what was written, every node with its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gkd_dsl.text import Source, Span


@dataclass(frozen=True, eq=False)
class Node:
    """Anything with a place."""

    span: Span


@dataclass(frozen=True, eq=False)
class Ident(Node):
    """A name at the place where it is written."""

    text: str


# --- expressions -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Name(Node):
    """`s`, `T`, `uniform`."""

    id: str


@dataclass(frozen=True, eq=False)
class Number(Node):
    """An integer or a decimal number; `value` keeps which."""

    value: int | float


@dataclass(frozen=True, eq=False)
class Duration(Node):
    """`10%`, `500 steps`, `3 epochs`, `2M tokens`. A percent's value is 10, not 0.1."""

    value: float
    unit: Literal["percent", "steps", "epochs", "tokens"]


@dataclass(frozen=True, eq=False)
class String(Node):
    """`"text"`; `value` has its escapes resolved."""

    value: str


@dataclass(frozen=True, eq=False)
class Bool(Node):
    """`true` or `false`."""

    value: bool


@dataclass(frozen=True, eq=False)
class List(Node):
    """`[a, b]`."""

    items: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Attr(Node):
    """`base.name`."""

    base: Expr
    name: Ident


@dataclass(frozen=True, eq=False)
class Index(Node):
    """`base[args]`."""

    base: Expr
    args: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Arg(Node):
    """One argument of a call; `name` is set for a keyword argument."""

    name: Ident | None
    value: Expr


@dataclass(frozen=True, eq=False)
class Call(Node):
    """`func(args)`."""

    func: Expr
    args: tuple[Arg, ...]


@dataclass(frozen=True, eq=False)
class Unary(Node):
    """`-value` or `not value`."""

    op: Literal["-", "not"]
    value: Expr


@dataclass(frozen=True, eq=False)
class Binary(Node):
    """Two operands; `%` only in the `where` of a signature."""

    op: Literal["+", "-", "*", "/", "%", "&", "==", "!=", "<", "<=", ">", ">=", "and", "or"]
    op_span: Span
    left: Expr
    right: Expr


@dataclass(frozen=True, eq=False)
class Pipe(Node):
    """`value |> block`."""

    value: Expr
    block: Expr


@dataclass(frozen=True, eq=False)
class Pair(Node):
    """`student_side <- teacher_side`."""

    left: Expr
    right: Expr
    arrow: Span


@dataclass(frozen=True, eq=False)
class Arrow(Node):
    """`a -> b`, only as an argument: `ramp(0 -> 1)`, `linear(s.H -> t.H)`, `use kd(t -> s)`."""

    left: Expr
    right: Expr


@dataclass(frozen=True, eq=False)
class Range(Node):
    """`lo ..< hi` or `lo ..= hi`."""

    lo: Expr
    hi: Expr
    inclusive: bool


@dataclass(frozen=True, eq=False)
class Comprehension(Node):
    """`element for (i, j) in iterable`, only as an argument; `binders` holds at least one name."""

    element: Expr
    binders: tuple[Ident, ...]
    iterable: Expr


@dataclass(frozen=True, eq=False)
class Missing(Node):
    """Stands where an expression could not be read; already reported."""


Expr = (
    Name
    | Number
    | Duration
    | String
    | Bool
    | List
    | Attr
    | Index
    | Call
    | Unary
    | Binary
    | Pipe
    | Pair
    | Arrow
    | Range
    | Comprehension
    | Missing
)


# --- types, as written in `param`, formals and operator signatures -----------------------------


@dataclass(frozen=True, eq=False)
class DimExpr(Node):
    """`H`, `s.H`, `64`, or `...` (any leading axes)."""

    text: str


@dataclass(frozen=True, eq=False)
class TypeExpr(Node):
    """`float`, `Float[B, L, s.H]`; `dims` is None where no brackets are written."""

    name: Ident
    dims: tuple[DimExpr, ...] | None


@dataclass(frozen=True, eq=False)
class SignatureArg(Node):
    """`x: Float[..., H]`, with `<- y: T` a student-teacher pair; a default makes it optional."""

    name: Ident
    type: TypeExpr
    teacher: SignatureArg | None
    default: Expr | None
    within: Range | None


@dataclass(frozen=True, eq=False)
class Signature(Node):
    """`name(args) -> type [where condition, ...]`, the text of an operator or a data source."""

    name: Ident
    args: tuple[SignatureArg, ...]
    result: TypeExpr
    where: tuple[Expr, ...] = ()


# --- declarations ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Header(Node):
    """`gkd 1`."""

    version: int


@dataclass(frozen=True, eq=False)
class ImportAs(Node):
    """`import "path" as name`."""

    path: String
    alias: Ident


@dataclass(frozen=True, eq=False)
class ImportUse(Node):
    """`import "path" use a, b`."""

    path: String
    names: tuple[Ident, ...]


@dataclass(frozen=True, eq=False)
class ImportPython(Node):
    """`import python "module or ./file.py" as name`."""

    path: String
    alias: Ident


@dataclass(frozen=True, eq=False)
class Param(Node):
    """`param name: type = default in range "doc"`."""

    name: Ident
    type: TypeExpr
    default: Expr | None
    within: Range | None
    doc: str | None


@dataclass(frozen=True, eq=False)
class DimDecl(Node):
    """`dim a, b`."""

    names: tuple[Ident, ...]


@dataclass(frozen=True, eq=False)
class Let(Node):
    """`let name = value`; with indices a family."""

    name: Ident
    indices: tuple[Ident, ...]
    value: Expr


@dataclass(frozen=True, eq=False)
class Setting(Node):
    """`key = value` inside a block."""

    name: Ident
    value: Expr


@dataclass(frozen=True, eq=False)
class ModelDecl(Node):
    """`teacher name = value { settings }`."""

    role: Literal["teacher", "student", "model"]
    name: Ident
    value: Expr
    body: tuple[Stmt, ...]


@dataclass(frozen=True, eq=False)
class DataDecl(Node):
    """`data name = value`."""

    name: Ident
    value: Expr


@dataclass(frozen=True, eq=False)
class MaskDecl(Node):
    """`mask name = value`."""

    name: Ident
    value: Expr


@dataclass(frozen=True, eq=False)
class ProjectDecl(Node):
    """`project name[i] = value`."""

    name: Ident
    indices: tuple[Ident, ...]
    value: Expr


@dataclass(frozen=True, eq=False)
class LossDecl(Node):
    """`loss name = e`, a family `loss name[i] = e`, or a function of passes `loss name(m: model) = e`."""

    name: Ident
    indices: tuple[Ident, ...]
    formals: tuple[Formal, ...] | None
    value: Expr


@dataclass(frozen=True, eq=False)
class MetricDecl(Node):
    """`metric name = value`."""

    name: Ident
    value: Expr


@dataclass(frozen=True, eq=False)
class Formal(Node):
    """A method's parameter: `teacher t` (role set) or `T: float = 2.0 in 1.0 ..= 20.0` (type set)."""

    role: Literal["teacher", "student", "model"] | None
    name: Ident
    type: TypeExpr | None
    default: Expr | None
    within: Range | None
    doc: str | None


@dataclass(frozen=True, eq=False)
class MethodDecl(Node):
    """`method name(formals) "doc" { body }`."""

    name: Ident
    formals: tuple[Formal, ...]
    body: tuple[Stmt, ...]
    doc: str | None


@dataclass(frozen=True, eq=False)
class Use(Node):
    """`use path(args) as name`."""

    target: Expr
    args: tuple[Arg, ...]
    alias: Ident


@dataclass(frozen=True, eq=False)
class Run(Node):
    """`run tb`: all the stages that a used method carries."""

    name: Ident


@dataclass(frozen=True, eq=False)
class Stage(Node):
    """`stage name [i] for duration each i in range { ... }`; a name stands for a duration that is declared."""

    name: Ident
    index: Ident | None
    duration: Duration | Name | None
    each: tuple[Ident, Expr] | None
    body: tuple[Stmt, ...]


@dataclass(frozen=True, eq=False)
class Train(Node):
    """`train targets`."""

    targets: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Freeze(Node):
    """`freeze targets`."""

    targets: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Minimize(Node):
    """`minimize value`."""

    value: Expr


@dataclass(frozen=True, eq=False)
class Total(Node):
    """`total = value`, inside a method."""

    value: Expr


@dataclass(frozen=True, eq=False)
class Evaluate(Node):
    """`evaluate metrics every duration`."""

    metrics: tuple[Expr, ...]
    every: Duration | None


@dataclass(frozen=True, eq=False)
class KeepBest(Node):
    """`keep best by metric`."""

    metric: Ident


@dataclass(frozen=True, eq=False)
class Replace(Node):
    """`replace target with source [for (i, j) in pairs] [when condition]`."""

    target: Expr
    source: Expr
    over: tuple[tuple[Ident, ...], Expr] | None
    when: Expr | None


@dataclass(frozen=True, eq=False)
class Swap(Node):
    """`swap target from source [at positions] [for ...] [when condition]`."""

    target: Expr
    source: Expr
    at: Expr | None
    over: tuple[tuple[Ident, ...], Expr] | None
    when: Expr | None


@dataclass(frozen=True, eq=False)
class AddTo(Node):
    """`add embed = noise`."""

    target: Expr
    value: Expr


@dataclass(frozen=True, eq=False)
class Pass(Node):
    """`pass name = value { changes }`."""

    name: Ident
    value: Expr
    body: tuple[Setting | Replace | Swap | AddTo, ...]


@dataclass(frozen=True, eq=False)
class Counter(Node):
    """`counter k from 1 to s.N advance when condition`."""

    name: Ident
    start: Expr
    stop: Expr
    when: Expr


@dataclass(frozen=True, eq=False)
class Policy(Node):
    """`policy name = value { body }`."""

    name: Ident
    value: Expr
    body: tuple[Stmt, ...]


@dataclass(frozen=True, eq=False)
class Placement(Node):
    """`teacher t { placement = offload }` inside `runtime`."""

    role: Literal["teacher", "student", "model"]
    name: Ident
    body: tuple[Setting, ...]


@dataclass(frozen=True, eq=False)
class Runtime(Node):
    """`runtime { settings and placements }`."""

    body: tuple[Setting | Placement, ...]


Item = (
    ImportAs
    | ImportUse
    | ImportPython
    | Param
    | DimDecl
    | Let
    | ModelDecl
    | DataDecl
    | MaskDecl
    | ProjectDecl
    | LossDecl
    | MetricDecl
    | MethodDecl
    | Use
    | Run
    | Stage
    | Pass
    | Counter
    | Policy
    | Runtime
)

Stmt = (
    Setting
    | Train
    | Freeze
    | Minimize
    | Total
    | ProjectDecl
    | LossDecl
    | MetricDecl
    | MaskDecl
    | Let
    | Use
    | Run
    | Pass
    | Counter
    | Policy
    | Evaluate
    | KeepBest
    | Stage
)


@dataclass(frozen=True, eq=False)
class Comment:
    """A `#` comment, kept apart from the tree so that a printer can put it back."""

    span: Span


@dataclass(frozen=True, eq=False)
class File:
    """A whole file: what could be read of it, and its comments in order."""

    source: Source
    header: Header | None
    items: tuple[Item, ...]
    comments: tuple[Comment, ...]
