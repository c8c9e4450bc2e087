"""What an expression stands for while a spec is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gkd_dsl import schedules
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.syntax import ast
from gkd_dsl.text import Location, Span
from gkd_dsl.types import Dim, LossType, TensorType

if TYPE_CHECKING:
    from gkd_dsl.graph.nodes import Change, OptimSpec, SourceSpec, TrainTarget
    from gkd_dsl.meaning.scope import Scope


@dataclass(frozen=True)
class Unknown:
    """Stands for what was reported already, or for what a later version runs; agrees with everything."""


UNKNOWN = Unknown()


@dataclass(frozen=True)
class Num:
    """A number. `dim` is set where it is a model's size (`s.H`)."""

    value: int | float
    dim: Dim | None = None


@dataclass(frozen=True)
class Truth:
    """`true` or `false`."""

    value: bool


@dataclass(frozen=True)
class Text:
    """A text in quotes."""

    value: str


@dataclass(frozen=True)
class Word:
    """A bare name where a setting takes one of a few words: `bf16`, `offload`."""

    value: str


@dataclass(frozen=True)
class Items:
    """A list; the pairs of a layer map are lists of two numbers.

    `count` is set where only so many of the items count at any time: losses over a map that is drawn anew.
    """

    items: tuple[Value, ...]
    count: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Drawn:
    """A layer map drawn anew every so often: every pair that may come, when each counts, how many do at once."""

    pairs: tuple[tuple[tuple[int, ...], schedules.Schedule], ...]
    count: int


@dataclass(frozen=True)
class Length:
    """A duration or a percentage: `500 steps`, `10%`."""

    span: schedules.Span


@dataclass(frozen=True)
class Scheduled:
    """A number that changes over a stage."""

    schedule: schedules.Schedule


@dataclass(frozen=True)
class Condition:
    """Something that holds or does not at each step: `i < k`, `stage.progress >= 0.5`."""

    schedule: schedules.Schedule


@dataclass(frozen=True)
class Passed:
    """What a further pass does.

    inputs    which texts it reads, and in a student whose dropout: passes of equal inputs are one
    columns   the tensors that stand in for columns of the batch, whose rows are moved by `shift`
    edges     what its changes read: keys of the graph with their slots
    discard   whether its gradient is for `gradient(...)` alone
    replaced  blocks that another model may stand in for, with its name
    carries   what the gradient of the tensors that enter it reaches; `reads` what they are computed from
    """

    name: str
    inputs: str
    columns: tuple[tuple[str, str], ...] = ()
    changes: tuple[Change, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()
    discard: bool = False
    replaced: tuple[tuple[int, str], ...] = ()
    carries: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    shift: int = 0


@dataclass(frozen=True)
class Model:
    """A model of the spec, or a further pass of one (`forward` is then its own, and `passed` says what it is)."""

    name: str
    info: ModelInfo
    role: str
    forward: str
    defined: Span | None = field(default=None, compare=False)
    passed: Passed | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TapPart:
    """A path into a model that is not a tensor yet: `s.layer`, `s.layer[3].attn`."""

    model: Model
    parts: tuple[tuple[str, tuple[int | str, ...] | None], ...]
    spans: tuple[Span, ...] = field(compare=False, default=())


@dataclass(frozen=True)
class Layers:
    """Some blocks of a model, as an aligner sees them: `s.layer`, `t.layer[1 ..< 5]`."""

    model: Model
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph.

    carries       names of the models, and keys of the projections, that its gradient reaches
    reads         names of the models that it is computed from
    next_token    its L axis predicts the next token (the logits of a causal model)
    causal        a map over two L axes where keys after the query do not count
    from_batch    computed from the batch alone
    tokens        keys of the attention masks of the texts that it is computed from; none: those of the batch
    """

    key: str
    type: TensorType
    carries: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    next_token: bool = False
    causal: bool = False
    from_batch: bool = False
    tokens: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Atom:
    """A loss operator's result: values per position, not reduced."""

    key: str
    type: LossType
    carries: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Term:
    """A weight times a loss; the loss is an atom of the graph or a declared loss."""

    weight: schedules.Schedule
    loss: Atom | NamedLoss


@dataclass(frozen=True)
class NamedLoss:
    """A declared loss."""

    key: str
    name: str
    carries: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Loss:
    """A sum of weighted losses. `partial` marks one with parts that are unknown here."""

    terms: tuple[Term, ...]
    partial: bool = False

    @property
    def carries(self) -> frozenset[str]:
        """The models and projections that its gradient reaches."""
        return frozenset().union(*(term.loss.carries for term in self.terms))


@dataclass(frozen=True)
class Block:
    """A projection."""

    key: str
    name: str
    in_dim: Dim
    out_dim: Dim
    defined: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Family:
    """`loss att[i]`, `project W[i]`, `let w[k]`: made for each index when asked for."""

    name: str
    arity: int
    make: Callable[[tuple[int, ...], Span], Value] = field(compare=False)


@dataclass(frozen=True)
class LossFunction:
    """`loss soft(m: model) = ...`."""

    decl: ast.LossDecl
    scope: Scope = field(compare=False)


@dataclass(frozen=True)
class Policy:
    """A policy and its draws; its reward is read when all losses are known."""

    key: str
    name: str
    pick: Tensor
    decl: ast.Policy = field(compare=False)
    scope: Scope = field(compare=False)


@dataclass(frozen=True)
class Batch:
    """The batch; its columns are tensors, row b of which is that of sample b + `shift`."""

    shift: int = 0


@dataclass(frozen=True)
class Source:
    """A declared data source."""

    spec: SourceSpec


@dataclass(frozen=True)
class Optimiser:
    """`adamw(...)` or `sgd(...)`."""

    spec: OptimSpec


@dataclass(frozen=True)
class Trained:
    """Something to train."""

    target: TrainTarget


@dataclass(frozen=True)
class Metric:
    """A measure over held-out rows."""

    key: str
    name: str


@dataclass(frozen=True)
class Method:
    """A method with the scope of the file that declares it."""

    decl: ast.MethodDecl
    scope: Scope = field(compare=False)


@dataclass(frozen=True)
class Instance:
    """A used method: its named losses, projections, total and stages."""

    name: str
    scope: Scope = field(compare=False)
    total: Loss | None
    stages: tuple[ast.Stage, ...] = field(compare=False, default=())
    location: Location | None = field(compare=False, default=None)
    source: Source | None = field(compare=False, default=None)


@dataclass(frozen=True)
class Module:
    """An imported file: `import "x.gkd" as x`."""

    name: str
    scope: Scope = field(compare=False)


@dataclass(frozen=True)
class PythonModule:
    """`import python "..." as ops`: operators and sources by name, read without running it."""

    name: str
    path: str
    extensions: Mapping[str, object] = field(compare=False, hash=False)


@dataclass(frozen=True)
class Directed:
    """`a -> b` as an argument."""

    left: Value
    right: Value


@dataclass(frozen=True)
class Numbers:
    """A range of whole numbers: `0 ..< s.N`."""

    lo: int
    hi: int


Value = (
    Unknown
    | Num
    | Truth
    | Text
    | Word
    | Items
    | Drawn
    | Length
    | Scheduled
    | Condition
    | Model
    | TapPart
    | Layers
    | Tensor
    | Loss
    | Block
    | Family
    | LossFunction
    | Policy
    | Batch
    | Source
    | Optimiser
    | Trained
    | Metric
    | Method
    | Instance
    | Module
    | PythonModule
    | Directed
    | Numbers
)

_MOST = 4096
"""Numbers of a range that is written out."""

_KINDS: dict[type, str] = {
    Unknown: "a value",
    Num: "a number",
    Truth: "true or false",
    Text: "a text",
    Word: "a word",
    Items: "a list",
    Drawn: "a layer map",
    Length: "a duration",
    Scheduled: "a schedule",
    Condition: "a condition",
    Model: "a model",
    TapPart: "a part of a model",
    Layers: "layers of a model",
    Tensor: "a tensor",
    Loss: "a loss",
    Block: "a projection",
    Family: "a family",
    LossFunction: "a loss function",
    Policy: "a policy",
    Batch: "the batch",
    Source: "a data source",
    Optimiser: "an optimiser",
    Trained: "something to train",
    Metric: "a metric",
    Method: "a method",
    Instance: "a used method",
    Module: "an imported file",
    PythonModule: "an imported Python file",
    Directed: "a direction `a -> b`",
    Numbers: "a range",
}


def kind(value: Value) -> str:
    """What a value is, in words: "a loss", "a number"."""
    if isinstance(value, Length):
        return "a percentage" if value.span.unit == "percent" else f"a duration in {value.span.unit}"
    if isinstance(value, Scheduled) and isinstance(value.schedule, schedules.CounterValue):
        return "a counter"
    return _KINDS[type(value)]


def plural(count: int, one: str, many: str) -> str:
    """ "1 index", "2 indices"."""
    return f"{count} {one if count == 1 else many}"


def digits(number: float) -> str:
    """A number as a fix writes it: all its digits, none of those that a division leaves behind."""
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else f"{number:.12g}"


def shown(value: Value) -> str:
    """What a value is where a whole number belongs: "1.5", "a list"."""
    return f"{value.value:g}" if isinstance(value, Num) else kind(value)


def gated(value: Value) -> str:
    """What to write where a counter is an index."""
    counts = isinstance(value, Scheduled) and schedules.counters(value.schedule)
    return "known in a run only: `sum(gate(i == k) * x[i] for i in ...)`" if counts else ""


def as_schedule(value: Value) -> schedules.Schedule | None:
    """A number or a schedule as a schedule; None for anything else."""
    if isinstance(value, Num):
        return schedules.Constant(float(value.value))
    if isinstance(value, Scheduled):
        return value.schedule
    return None


def plain(value: Value) -> object:
    """The Python value that an attribute of a graph node holds."""
    if isinstance(value, Num | Truth | Text | Word):
        return value.value
    if isinstance(value, Items):
        return tuple(plain(item) for item in value.items)
    if isinstance(value, Length):
        return value.span
    if isinstance(value, Scheduled):
        return value.schedule
    if isinstance(value, Numbers) and value.hi - value.lo <= _MOST:
        return tuple(range(value.lo, value.hi))
    return None
