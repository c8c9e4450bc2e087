"""Where weights live: what the runtime block of a spec, or a proposal, says of each model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gkd_dsl.graph.nodes import ModelNode, StageNode
from gkd_dsl.graph.plan import SpecPlan, StagePlan
from gkd_dsl.planning import parameters
from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.quantised import weight_bytes

PROCESSES = ("ddp", "gemini")
STREAMED = ("offload", "disk")

FULL, HALF = 4, 2
"""Bytes of a weight in fp32, and of one in half precision."""


@dataclass(frozen=True)
class Setup:
    """How a spec is run. `split` divides each micro-batch further, `merge` takes several as one; the fractions
    are Gemini's. `top_k` is
    how many logits of a row a cached model has, where that is said.

    `placement` holds the models that are placed otherwise than the backend has it by itself.
    """

    backend: str = "local"
    half: bool = False
    checkpoint: bool = False
    fuse: bool = True
    placement: tuple[tuple[str, str], ...] = ()
    shard_param_frac: float = 1.0
    offload_optim_frac: float = 0.0
    offload_param_frac: float = 0.0
    split: int = 1
    merge: int = 1
    top_k: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, plan: SpecPlan) -> Setup:
        """What a spec says."""
        given: Mapping[str, Any] = dict(plan.runtime)
        backend = str(given.get("backend", "local"))
        placed = {
            name.removesuffix(".placement"): str(value) for name, value in given.items() if name.endswith(".placement")
        }
        return cls(
            backend,
            str(given.get("precision", "fp32")) != "fp32" or backend == "gemini",
            bool(given.get("checkpoint", False)),
            str(given.get("fuse_logits", "auto")) != "off",
            tuple(sorted(placed.items())),
            float(given.get("shard_param_frac", 1.0)),
            float(given.get("offload_optim_frac", 0.0)),
            float(given.get("offload_param_frac", 0.0)),
            top_k=tuple((n.removesuffix(".top_k"), int(v)) for n, v in given.items() if n.endswith(".top_k")),
        )

    def placed(self, model: str) -> str:
        """The placement of a model that the stage does not train."""
        return dict(self.placement).get(model, "resident")

    def placing(self, models: Iterable[str], where: str) -> Setup:
        """The same with some models elsewhere."""
        found = {**dict(self.placement), **dict.fromkeys(models, where)}
        return replace(self, placement=tuple(sorted((k, v) for k, v in found.items() if v != "resident")))

    def ranks(self, machine: Machine) -> int:
        """Processes that share a step."""
        return machine.devices if self.backend in PROCESSES else 1

    def rows(self, stage: StageNode, machine: Machine) -> int:
        """Texts of a micro-batch on one device."""
        return max(1, -(-stage.batch_size * self.merge // (self.ranks(machine) * self.split)))

    def micro(self, stage: StageNode) -> int:
        """Micro-batches in a step."""
        return max(1, stage.accumulate * min(self.split, stage.batch_size) // self.merge)


def halved_models(plan: SpecPlan) -> tuple[str, ...]:
    """The models that are held in half precision where forwards are run in it: what is loaded, and no stage trains.

    A model that is copied from another one, or is quantised, has its weights as it is made.
    """
    trained = {target.name for stage in plan.stages for target in stage.stage.trains if target.kind == "model"}
    nodes = {node.name: node.info.build for stage in plan.stages for node in stage.models}
    return tuple(
        name
        for name, build in nodes.items()
        if name not in trained
        and build.kind in ("hf", "random")
        and build.kept is None
        and build.lora is None
        and build.quantised is None
    )


@dataclass(frozen=True)
class Trained:
    """What a stage trains of a model: how many numbers, the largest tensor, and from which block on.

    `first` is 0 where the embeddings are trained too, i for block i - 1, and one more than the blocks for a head alone.
    """

    count: int = 0
    largest: int = 0
    first: int = 0


def trained(stage: StagePlan, node: ModelNode) -> Trained:
    """What a stage trains of a model."""
    names: dict[str, int] = {}
    first = (node.info.size("N") or 0) + 1
    largest = 0
    for target in stage.stage.trains:
        if target.kind != "model" or target.name != node.name:
            continue
        found = parameters.part(node.info, target.part)
        largest = max(largest, found.largest)
        for name, shape in found.shapes:
            size = 1
            for axis in shape:
                size *= axis
            names[name] = size
        where = target.part or "body"
        first = min(
            first,
            int(where.removeprefix("layer.")) + 1 if where.startswith("layer.") else first if where == "head" else 0,
        )
    return Trained(sum(names.values()), largest, first if names else 0)


@dataclass(frozen=True)
class Placed:
    """The bytes of one model: `device` on each device all the time, `host` in all, `moved` over each link a forward.

    `work` is what a forward needs on the device for weights that pass through; `gathered` is what the devices send
    each other in a forward, for each of them; `read` comes from the disk in a forward.
    """

    name: str
    where: str
    count: int
    trains: int = 0
    device: int = 0
    host: int = 0
    work: int = 0
    moved: int = 0
    gathered: int = 0
    read: int = 0
    exact: bool = True
    notes: tuple[str, ...] = field(default=(), compare=False)


def frozen(node: ModelNode, setup: Setup, machine: Machine, share: float = 1.0) -> Placed:
    """A model that the stage does not train; `share` of its weights is needed by the forwards of a micro-batch."""
    found = parameters.parameters(node.info)
    count, where = found.count, setup.placed(node.name)
    ranks = setup.ranks(machine)
    layers = node.info.size("N") or 0
    block = parameters.part(node.info, "layer.0").count if found.exact and layers else count
    embeddings = parameters.part(node.info, "embed").count if found.exact else 0
    if where == "cached":
        return Placed(node.name, where, count, exact=found.exact)
    if node.info.quantised is not None:
        return Placed(node.name, where, count, device=weight_bytes(node.info, FULL), exact=found.exact)
    if where in STREAMED:
        return _streamed(node, where, ranks, block * layers if found.exact else count, block, share)
    if where == "gemini":
        own = count / ranks if setup.shard_param_frac > 0 else count
        offloaded = setup.offload_param_frac
        gathered = round(2 * count * share * (ranks - 1) / ranks) if setup.shard_param_frac > 0 else 0
        return Placed(
            node.name, where, count, device=round(2 * own * (1 - offloaded)), host=round(2 * own * offloaded * ranks),
            work=2 * max(2 * block, embeddings, found.largest), moved=round(2 * own * offloaded * share),
            gathered=gathered, exact=found.exact,
        )  # fmt: skip
    return Placed(node.name, where, count, device=FULL * count, exact=found.exact)


def _streamed(node: ModelNode, where: str, ranks: int, inside: int, block: int, share: float) -> Placed:
    """A model whose blocks pass through the device, two at a time; what is in no block stays there.

    From disk the pages that are read are the system's to keep or drop.
    """
    found = parameters.parameters(node.info)
    outside = found.count - inside
    ran = max(0, round(found.count * share) - outside)
    host = FULL * inside * ranks if where == "offload" else 2 * FULL * block * ranks
    return Placed(
        node.name, where, found.count, device=FULL * outside, host=host, work=2 * FULL * block, moved=FULL * ran,
        read=saved_width(node) * ran if where == "disk" else 0, exact=found.exact,
    )  # fmt: skip


def saved_width(node: ModelNode) -> int:
    """Bytes of a weight in the files of a model, as its config says."""
    said = node.info.config.get("dtype") or node.info.config.get("torch_dtype")
    return 2 if said in ("bfloat16", "float16") else FULL
