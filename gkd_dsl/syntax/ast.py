"""The syntax tree: what was written, every node with its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gkd_dsl.source import Source, Span


@dataclass(frozen=True)
class Node:
    span: Span


@dataclass(frozen=True)
class Ident(Node):
    """A name at the place where it is written."""

    text: str


# --- expressions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Name(Node):
    id: str


@dataclass(frozen=True)
class Number(Node):
    """An integer or a decimal number; `value` keeps which."""

    value: int | float


@dataclass(frozen=True)
class Duration(Node):
    """`10%`, `500 steps`, `3 epochs`, `2M tokens`. A percent's value is 10, not 0.1."""

    value: float
    unit: Literal["percent", "steps", "epochs", "tokens"]


@dataclass(frozen=True)
class String(Node):
    value: str


@dataclass(frozen=True)
class Bool(Node):
    value: bool


@dataclass(frozen=True)
class List(Node):
    items: tuple[Expr, ...]


@dataclass(frozen=True)
class Attr(Node):
    base: Expr
    name: Ident


@dataclass(frozen=True)
class Index(Node):
    base: Expr
    args: tuple[Expr, ...]


@dataclass(frozen=True)
class Arg(Node):
    """One argument of a call; `name` is set for a keyword argument."""

    name: Ident | None
    value: Expr


@dataclass(frozen=True)
class Call(Node):
    func: Expr
    args: tuple[Arg, ...]


@dataclass(frozen=True)
class Unary(Node):
    op: Literal["-", "not"]
    value: Expr


@dataclass(frozen=True)
class Binary(Node):
    """Two operands; `%` only in the `where` of a signature."""

    op: Literal["+", "-", "*", "/", "%", "&", "==", "!=", "<", "<=", ">", ">=", "and", "or"]
    op_span: Span
    left: Expr
    right: Expr


@dataclass(frozen=True)
class Pipe(Node):
    """`value |> block`."""

    value: Expr
    block: Expr


@dataclass(frozen=True)
class Pair(Node):
    """`student_side <- teacher_side`."""

    left: Expr
    right: Expr
    arrow: Span


@dataclass(frozen=True)
class Arrow(Node):
    """`a -> b`, only as an argument: `ramp(0 -> 1)`, `linear(s.H -> t.H)`, `use kd(t -> s)`."""

    left: Expr
    right: Expr


@dataclass(frozen=True)
class Range(Node):
    """`lo ..< hi` or `lo ..= hi`."""

    lo: Expr
    hi: Expr
    inclusive: bool


@dataclass(frozen=True)
class Comprehension(Node):
    """`element for (i, j) in iterable`, only as an argument; `binders` holds at least one name."""

    element: Expr
    binders: tuple[Ident, ...]
    iterable: Expr


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class DimExpr(Node):
    """`H`, `s.H`, `64`, or `...` (any leading axes)."""

    text: str


@dataclass(frozen=True)
class TypeExpr(Node):
    """`float`, `Float[B, L, s.H]`; `dims` is None where no brackets are written."""

    name: Ident
    dims: tuple[DimExpr, ...] | None


@dataclass(frozen=True)
class SignatureArg(Node):
    """`x: Float[..., H]`, with `<- y: T` a student-teacher pair; a default makes it optional."""

    name: Ident
    type: TypeExpr
    teacher: SignatureArg | None
    default: Expr | None
    within: Range | None


@dataclass(frozen=True)
class Signature(Node):
    """`name(args) -> type [where condition, ...]`, the text of an operator or a data source."""

    name: Ident
    args: tuple[SignatureArg, ...]
    result: TypeExpr
    where: tuple[Expr, ...] = ()


# --- declarations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header(Node):
    version: int


@dataclass(frozen=True)
class ImportAs(Node):
    """`import "path" as name`."""

    path: String
    alias: Ident


@dataclass(frozen=True)
class ImportUse(Node):
    """`import "path" use a, b`."""

    path: String
    names: tuple[Ident, ...]


@dataclass(frozen=True)
class ImportPython(Node):
    """`import python "module or ./file.py" as name`."""

    path: String
    alias: Ident


@dataclass(frozen=True)
class Param(Node):
    name: Ident
    type: TypeExpr
    default: Expr | None
    within: Range | None
    doc: str | None


@dataclass(frozen=True)
class DimDecl(Node):
    names: tuple[Ident, ...]


@dataclass(frozen=True)
class Let(Node):
    name: Ident
    indices: tuple[Ident, ...]
    value: Expr


@dataclass(frozen=True)
class Setting(Node):
    """`key = value` inside a block."""

    name: Ident
    value: Expr


@dataclass(frozen=True)
class ModelDecl(Node):
    role: Literal["teacher", "student", "model"]
    name: Ident
    value: Expr
    body: tuple[Stmt, ...]


@dataclass(frozen=True)
class DataDecl(Node):
    name: Ident
    value: Expr


@dataclass(frozen=True)
class MaskDecl(Node):
    name: Ident
    value: Expr


@dataclass(frozen=True)
class ProjectDecl(Node):
    name: Ident
    indices: tuple[Ident, ...]
    value: Expr


@dataclass(frozen=True)
class LossDecl(Node):
    """`loss name = e`, a family `loss name[i] = e`, or a function of passes `loss name(m: model) = e`."""

    name: Ident
    indices: tuple[Ident, ...]
    formals: tuple[Formal, ...] | None
    value: Expr


@dataclass(frozen=True)
class MetricDecl(Node):
    name: Ident
    value: Expr


@dataclass(frozen=True)
class Formal(Node):
    """A method's parameter: `teacher t` (role set) or `T: float = 2.0 in 1.0 ..= 20.0` (type set)."""

    role: Literal["teacher", "student", "model"] | None
    name: Ident
    type: TypeExpr | None
    default: Expr | None
    within: Range | None
    doc: str | None


@dataclass(frozen=True)
class MethodDecl(Node):
    name: Ident
    formals: tuple[Formal, ...]
    body: tuple[Stmt, ...]
    doc: str | None


@dataclass(frozen=True)
class Use(Node):
    """`use path(args) as name`."""

    target: Expr
    args: tuple[Arg, ...]
    alias: Ident


@dataclass(frozen=True)
class Run(Node):
    """`run tb`: all the stages that a used method carries."""

    name: Ident


@dataclass(frozen=True)
class Stage(Node):
    """`stage name [i] for duration each i in range { ... }`."""

    name: Ident
    index: Ident | None
    duration: Duration | None
    each: tuple[Ident, Expr] | None
    body: tuple[Stmt, ...]


@dataclass(frozen=True)
class Train(Node):
    targets: tuple[Expr, ...]


@dataclass(frozen=True)
class Freeze(Node):
    targets: tuple[Expr, ...]


@dataclass(frozen=True)
class Minimize(Node):
    value: Expr


@dataclass(frozen=True)
class Total(Node):
    value: Expr


@dataclass(frozen=True)
class Evaluate(Node):
    metrics: tuple[Expr, ...]
    every: Duration | None


@dataclass(frozen=True)
class KeepBest(Node):
    metric: Ident


@dataclass(frozen=True)
class Replace(Node):
    """`replace target with source [for (i, j) in pairs] [when condition]`."""

    target: Expr
    source: Expr
    over: tuple[tuple[Ident, ...], Expr] | None
    when: Expr | None


@dataclass(frozen=True)
class Swap(Node):
    """`swap target from source [at positions] [for ...]`."""

    target: Expr
    source: Expr
    at: Expr | None
    over: tuple[tuple[Ident, ...], Expr] | None


@dataclass(frozen=True)
class AddTo(Node):
    """`add embed = noise`."""

    target: Ident
    value: Expr


@dataclass(frozen=True)
class Remap(Node):
    """`remap ids = map`."""

    target: Ident
    value: Expr


@dataclass(frozen=True)
class Pass(Node):
    name: Ident
    value: Expr
    body: tuple[Setting | Replace | Swap | AddTo | Remap, ...]


@dataclass(frozen=True)
class Counter(Node):
    """`counter k from 1 to s.N advance when condition`."""

    name: Ident
    start: Expr
    stop: Expr
    when: Expr


@dataclass(frozen=True)
class Policy(Node):
    name: Ident
    value: Expr
    body: tuple[Stmt, ...]


@dataclass(frozen=True)
class Placement(Node):
    """`teacher t { placement = offload }` inside `runtime`."""

    role: Literal["teacher", "student", "model"]
    name: Ident
    body: tuple[Setting, ...]


@dataclass(frozen=True)
class Runtime(Node):
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


@dataclass(frozen=True)
class Comment:
    """A `#` comment, kept apart from the tree so that a printer can put it back."""

    span: Span


@dataclass(frozen=True)
class File:
    """A whole file: what could be read of it, and its comments in order."""

    source: Source
    header: Header | None
    items: tuple[Item, ...]
    comments: tuple[Comment, ...]
