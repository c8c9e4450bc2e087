"""The plan: all that the runtime needs of a stage, and nothing else. Emitted by the last pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gkd_dsl.graph.nodes import AttrValue, Change, MetricNode, ModelNode, PolicyNode, ProjectNode, StageNode
from gkd_dsl.models.taps import TapPath
from gkd_dsl.schedules import Schedule
from gkd_dsl.types import Dim, LossType, TensorType


@dataclass(frozen=True)
class TapPlan:
    """A tensor to take from a forward; `key` is its name in the step's environment."""

    key: str
    path: TapPath
    type: TensorType


@dataclass(frozen=True)
class ForwardPlan:
    """One forward. `stop_after` is the tap after which nothing more is needed (None: run it whole).

    `inputs` pairs a column with the key of the environment that stands in for the batch's, `values` the slots of
    `changes` with keys. With `discard` its gradient is for operators named `gradient` alone. With `shift` all
    columns that it reads have the rows of other samples.
    """

    key: str
    model: str
    grad: bool
    taps: tuple[TapPlan, ...]
    stop_after: TapPath | None = None
    inputs: tuple[tuple[str, str], ...] = ()
    changes: tuple[Change, ...] = ()
    values: tuple[tuple[str, str], ...] = ()
    discard: bool = False
    shift: int = 0

    @property
    def reads(self) -> tuple[str, ...]:
        """The keys of the environment that it needs."""
        return tuple(key for _, key in (*self.inputs, *self.values))


@dataclass(frozen=True)
class Apply:
    """`key = op(inputs, attrs)`. `inputs` pairs an argument name with a key of the environment.

    For op `project`, input `block` names a projection of the plan. A loss-typed result is the tensor of
    values per position, not reduced; the step reduces it as its `Counted` says. Inputs named `valid`,
    `token_weight` and `sample_weight` of a loss are for that reduction; `valid` is also handed to the operator.
    """

    key: str
    op: str
    inputs: tuple[tuple[str, str], ...]
    attrs: tuple[tuple[str, AttrValue], ...]
    type: TensorType | LossType


@dataclass(frozen=True)
class Run:
    """Run the forward of this key."""

    forward: str


@dataclass(frozen=True)
class Free:
    """Let go of these keys: nothing below reads them."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class HeadPlan:
    """The head of a language model in a forward, applied where its logits are used.

    module  the linear map, by its name in the whole model; it is given the tap `hidden`
    logits  the key of the logits that it stands for; `names` are that and the keys of their detached copies
    scale   the logits are z * scale (z / scale with `divide`), and with `softcap` c they are c * tanh(. / c) of that
    """

    forward: str
    model: str
    module: str
    logits: str
    names: tuple[str, ...]
    hidden: TapPlan
    scale: float = 1.0
    divide: bool = False
    softcap: float | None = None


@dataclass(frozen=True)
class Fused:
    """The losses `terms` over the logits of `student`, in one pass and without these logits.

    `terms` are what the plain program applies; a `teacher` that one of `teachers` stands for is never whole either.
    It gives the sum of each term, and one gradient of the weighted total.
    """

    student: HeadPlan
    teachers: tuple[HeadPlan, ...]
    terms: tuple[Apply, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The keys of the environment that it needs."""
        return self.needs(term.key for term in self.terms)

    def needs(self, keys: Iterable[str]) -> tuple[str, ...]:
        """The keys that these terms need."""
        by_name = {name: head.hidden.key for head in (self.student, *self.teachers) for name in head.names}
        wanted = set(keys)
        found = [by_name.get(key, key) for term in self.terms if term.key in wanted for _, key in term.inputs]
        return tuple(dict.fromkeys(found))


Instruction = Run | Apply | Free | Fused


@dataclass(frozen=True)
class LossPlan:
    """A named loss: sum of coefficient x reduced loss-typed key."""

    name: str
    parts: tuple[tuple[Schedule, str], ...]


@dataclass(frozen=True)
class Counted:
    """Which positions of a loss-typed key count.

    `dims` are its positions. Over each `L` axis a position counts where `valid` (a key that holds
    `Bool[B, L]` or `Bool[B]`; None: every row) is true; over two `L` axes (query, key) where both are, and,
    with `causal`, where the key is not after the query. Other axes multiply the count.
    `token_weight` and `sample_weight` name keys that multiply the values and leave the count alone.
    """

    key: str
    dims: tuple[Dim, ...]
    valid: str | None
    causal: bool = False
    token_weight: str | None = None
    sample_weight: str | None = None


@dataclass(frozen=True)
class CounterPlan:
    """A counter of a stage. `losses` are the monitored losses that its condition reads."""

    name: str
    start: int
    stop: int
    when: Schedule
    losses: tuple[str, ...]


@dataclass(frozen=True)
class PolicyPlan:
    """A policy of a stage; `key` is that of its draws `Float[B, actions]`, `reward` names a monitored loss."""

    key: str
    node: PolicyNode
    reward: str


@dataclass(frozen=True)
class StagePlan:
    """What one stage runs.

    `valid_program` computes every `valid` key from batch columns alone, so that denominators over
    all micro-batches and ranks are known before the first forward; its keys are also there for `program`.
    `program` gives every loss-typed key that `losses` reads; `counted` has one entry for each.
    `weights[i]` is the weight of `losses[i]` in the objective. `columns` are the batch columns read.
    `monitored` are losses that a counter or a policy reads; they may or may not be in the objective too.
    `fuse_logits` says whether losses over a language model's logits may be run fused; `passes.fuse` makes that plan.
    """

    name: str
    stage: StageNode
    models: tuple[ModelNode, ...]
    projections: tuple[ProjectNode, ...]
    forwards: tuple[ForwardPlan, ...]
    valid_program: tuple[Apply, ...]
    counted: tuple[Counted, ...]
    program: tuple[Instruction, ...]
    losses: tuple[LossPlan, ...]
    weights: tuple[Schedule, ...]
    columns: tuple[str, ...]
    metrics: tuple[MetricPlan, ...] = ()
    monitored: tuple[LossPlan, ...] = ()
    counters: tuple[CounterPlan, ...] = ()
    policies: tuple[PolicyPlan, ...] = ()
    fuse_logits: Literal["auto", "on", "off"] = "auto"

    def forward(self, key: str) -> ForwardPlan:
        """The forward of a key."""
        return next(forward for forward in self.forwards if forward.key == key)


@dataclass(frozen=True)
class MetricPlan:
    """A metric with its own program (no gradients): forwards, ops, then the inputs of the accumulator."""

    metric: MetricNode
    forwards: tuple[ForwardPlan, ...]
    program: tuple[Instruction, ...]
    inputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SpecPlan:
    """The whole spec, compiled."""

    stages: tuple[StagePlan, ...]
    backend: Literal["local", "ddp", "gemini"] = "local"
    runtime: tuple[tuple[str, AttrValue], ...] = ()
