"""The nodes of the typed graph: frozen values; the networkx graph holds them and their edges.

The graph is a `networkx.MultiDiGraph`. A graph node's id is `node.key`, its only attribute is `node`.
Edges run from producer to consumer and carry `slot`, the consumer's argument name
(`student`, `teacher`, `mask`, `0`, `1`, ...). Keys are stable and readable:

    model/t                 ModelNode
    batch/labels            BatchNode
    t/forward               ForwardNode     (edge from model/t slot "model"; from batch/... slot per input)
    t/layer.5/attn.scores   TapNode         (edge from t/forward slot "forward")
    project/W               ProjectNode
    op/kl.1                 OpNode
    loss/soft, loss/tb/attn LossNode        (edges from loss-typed OpNodes, slots "0", "1", ...)
    metric/acc              MetricNode      (edges from the tensors it reads, by argument name)
    counter/k               CounterNode     (edges from the LossNodes that its condition reads, slots "0", ...)
    policy/pi               PolicyNode      (no inputs: an OpNode `policy` reads it, slot "block", and one tensor per
                                            action, slots "0", ...)
    stage/main              StageNode       (edges from LossNodes "0", ...; from MetricNodes "metric.0", ...;
                                            from the CounterNodes that its schedules read, "counter.k"; from the
                                            PolicyNodes of its objective and their rewards, "policy.pi", "reward.pi")

A further pass is a ForwardNode of its own. Its inputs that are not the batch's columns arrive by edges whose slot is
the column (`input_ids`), the values of its changes by edges with the slots that the change names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.taps import TapPath
from gkd_dsl.schedules import Constant, Schedule, Span
from gkd_dsl.text import Location
from gkd_dsl.types import LossType, TensorType

ALWAYS = Constant(1.0)
"""A condition that holds throughout."""

AttrValue = bool | int | float | str | None | Schedule | tuple["AttrValue", ...]


@dataclass(frozen=True)
class GraphNode:
    """What every node has: its key, and the places in the spec that it comes from."""

    key: str
    locations: tuple[Location, ...] = field(default=(), compare=False, kw_only=True)


@dataclass(frozen=True)
class ModelNode(GraphNode):
    """A model of the spec. `settings` are those of its block."""

    name: str
    role: Literal["teacher", "student", "model"]
    info: ModelInfo
    settings: tuple[tuple[str, AttrValue], ...] = ()


@dataclass(frozen=True)
class BatchNode(GraphNode):
    """A column of the batch: `input_ids`, `attention_mask`, `labels`, ..."""

    column: str
    type: TensorType


@dataclass(frozen=True)
class ReplaceBlock:
    """Block `index` of the forward is run by blocks `layers` of `model`, one after the other, while `when` is not 0.

    The gradient goes through them; their parameters get none. Slot `slot` holds the ModelNode.
    """

    index: int
    model: str
    layers: tuple[int, ...]
    when: Schedule
    slot: str


@dataclass(frozen=True)
class SwapTap:
    """The tensor at `path` takes values of the one in slot `<slot>.source`.

    Slot `<slot>.at` says where: Bool[B, L] (true: take the source's value of the same position) or Int[B, L] (the
    position of the source to take, -1: keep). Without it all of the tensor is taken. It is done while `when` is not 0.
    """

    path: TapPath
    slot: str
    when: Schedule = ALWAYS


@dataclass(frozen=True)
class AddToTap:
    """The tensor in slot `slot` is added to the one at `path`."""

    path: TapPath
    slot: str


Change = ReplaceBlock | SwapTap | AddToTap


def change_slots(change: Change) -> tuple[str, ...]:
    """The slots that a change fills in any case; `<slot>.at` of a swap may be there too."""
    return (f"{change.slot}.source",) if isinstance(change, SwapTap) else (change.slot,)


@dataclass(frozen=True)
class ForwardNode(GraphNode):
    """One forward of a model on one input. With `grad` False it runs under no_grad, in eval mode.

    `changes` are applied in their order. A forward with `discard` keeps its gradient for `gradient(...)` only.
    With `shift`, row b of its texts is that of sample b + shift, and so is every column of the batch that it reads.
    """

    model: str
    inputs: str = "batch"
    grad: bool = True
    changes: tuple[Change, ...] = ()
    discard: bool = False
    shift: int = 0


@dataclass(frozen=True)
class TapNode(GraphNode):
    """A tensor inside a forward."""

    model: str
    path: TapPath
    type: TensorType


@dataclass(frozen=True)
class ProjectNode(GraphNode):
    """A trainable block of parameters beside the student: a linear map over the last axis."""

    name: str
    in_features: int
    out_features: int
    bias: bool = True
    init: str = "default"


@dataclass(frozen=True)
class OpNode(GraphNode):
    """An operator applied to its inputs. `attrs` are its plain arguments, sorted by name.

    `project` is the operator that applies a ProjectNode (slots "x" and "block").
    """

    op: str
    attrs: tuple[tuple[str, AttrValue], ...]
    type: TensorType | LossType

    def attr(self, name: str, default: AttrValue = None) -> AttrValue:
        """An attribute by name."""
        return dict(self.attrs).get(name, default)


@dataclass(frozen=True)
class LossNode(GraphNode):
    """A named loss: sum of `coefficients[i]` x its i-th input, each reduced over its own valid positions."""

    name: str
    coefficients: tuple[Schedule, ...]
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class MetricNode(GraphNode):
    """A measure over a held-out set; never trains. `op` accumulates over batches."""

    name: str
    op: str
    attrs: tuple[tuple[str, AttrValue], ...]
    greater_is_better: bool = True


NO_WARMUP = Span(0.0, "percent")


@dataclass(frozen=True)
class OptimSpec:
    """The optimiser of a stage. `warmup` and `decay` shape the learning rate over the stage."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 5e-5
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    warmup: Span = NO_WARMUP
    decay: Literal["linear", "cosine", "constant"] = "linear"
    clip: float | None = 1.0


@dataclass(frozen=True)
class CounterNode(GraphNode):
    """A whole number from `start` to `stop` that goes up by one after each step in which `when` is not 0."""

    name: str
    start: int
    stop: int
    when: Schedule


@dataclass(frozen=True)
class PolicyNode(GraphNode):
    """Chooses among `actions` for each sample; trained by its own optimiser on a reward that arrives a step later.

    The probability of action k is sigmoid(A x_k + b), with one A and b for all; `hidden` units come between where
    it is not 0. `features` is the width of each x_k. `baseline` is the share of the running mean of the rewards that
    a new reward leaves.
    """

    name: str
    actions: int
    features: int
    hidden: int
    optim: OptimSpec
    baseline: float = 0.9


@dataclass(frozen=True)
class TrainTarget:
    """What a stage trains: a whole model or a part (`body`, `embed`, `head`, `layer.3`), or a projection."""

    kind: Literal["model", "project"]
    name: str
    part: str | None = None


@dataclass(frozen=True)
class EvaluateSpec:
    """Which metrics a stage evaluates, and how often (at its end only where `every` is None)."""

    metrics: tuple[str, ...]
    every: Span | None


@dataclass(frozen=True)
class SourceSpec:
    """A data source: `kind` (`csv`, `jsonl`, `text`, `hf_dataset`, or a registered one) and its arguments."""

    name: str
    kind: str
    args: tuple[tuple[str, AttrValue], ...]
    location: Location | None = field(default=None, compare=False)

    def arg(self, name: str, default: AttrValue = None) -> AttrValue:
        """An argument by name."""
        return dict(self.args).get(name, default)


@dataclass(frozen=True)
class StageNode(GraphNode):
    """One stage: minimise sum of `weights[i]` x the i-th loss, over `trains`, for `duration`."""

    name: str
    order: int
    duration: Span
    source: SourceSpec | None
    weights: tuple[Schedule, ...]
    trains: tuple[TrainTarget, ...]
    optim: OptimSpec
    batch_size: int = 32
    accumulate: int = 1
    seed: int = 0
    evaluate: tuple[EvaluateSpec, ...] = ()
    keep_best: str | None = None
    checkpoint_every: Span | None = None
    max_length: int | None = None


Kind = (
    ModelNode
    | BatchNode
    | ForwardNode
    | TapNode
    | ProjectNode
    | OpNode
    | LossNode
    | MetricNode
    | CounterNode
    | PolicyNode
    | StageNode
)
