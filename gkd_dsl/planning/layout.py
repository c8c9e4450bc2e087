"""Where weights live: what the runtime block of a spec, or a proposal, says of each model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gkd_dsl.graph.nodes import ModelNode, StageNode
from gkd_dsl.graph.plan import SpecPlan, StagePlan
from gkd_dsl.planning import parameters
from gkd_dsl.planning.chunks import Chunks, chunks
from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.quantised import weight_bytes

PROCESSES = ("ddp", "gemini")
STREAMED = ("offload", "disk")

FULL, HALF = 4, 2
"""Bytes of a weight in fp32, and of one in half precision."""

CHUNK = 32 * 2**20
"""Gemini's least chunk, in numbers, and how many more it tries; what is smaller in all stays whole in every process."""

ALL = (1.0, 1.0)
"""Of a model in Gemini's chunks: all of it sharded, and all of that in host memory."""


@dataclass(frozen=True)
class Setup:
    """How a spec is run.

    half       whether forwards are run in half precision; `precision` is which
    placement  the models that are placed otherwise than the backend has it by itself
    shard_param_frac, offload_optim_frac, offload_param_frac  Gemini's, for what a stage trains
    split, merge  divides each micro-batch further; takes several as one
    top_k      how many logits of a row a cached model has, where that is said
    chunks     of models in Gemini's chunks the shares that are sharded, and offloaded, where they are not all
    chunk      Gemini's least chunk, in numbers, and `reach`: how many more are tried
    halved     the models that take two bytes a number in half precision; None for all that are loaded
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
    chunks: tuple[tuple[str, float, float], ...] = ()
    precision: str = field(default="bf16", compare=False)
    chunk: int = field(default=CHUNK, compare=False)
    reach: int = field(default=CHUNK, compare=False)
    halved: tuple[str, ...] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, plan: SpecPlan) -> Setup:
        """What a spec says."""
        given: Mapping[str, Any] = dict(plan.runtime)
        backend = str(given.get("backend", "local"))
        placed = {
            name.removesuffix(".placement"): str(value) for name, value in given.items() if name.endswith(".placement")
        }
        precision = str(given.get("precision", "fp32"))
        return cls(
            backend,
            precision != "fp32" or backend == "gemini",
            bool(given.get("checkpoint", False)),
            str(given.get("fuse_logits", "auto")) != "off",
            tuple(sorted(placed.items())),
            float(given.get("shard_param_frac", 1.0)),
            float(given.get("offload_optim_frac", 0.0)),
            float(given.get("offload_param_frac", 0.0)),
            top_k=tuple((n.removesuffix(".top_k"), int(v)) for n, v in given.items() if n.endswith(".top_k")),
            chunks=tuple(sorted(_chunks(given, [name for name, place in placed.items() if place == "gemini"]))),
            precision=precision if precision != "fp32" else "bf16",
            chunk=round(float(given.get("min_chunk_size_m", CHUNK / 2**20)) * 2**20),
            reach=round(float(given.get("search_range_m", CHUNK / 2**20)) * 2**20),
            halved=halved_models(plan),
        )

    def placed(self, model: str) -> str:
        """The placement of a model that the stage does not train."""
        return dict(self.placement).get(model, "resident")

    def placing(self, models: Iterable[str], where: str) -> Setup:
        """The same with some models elsewhere."""
        found = {**dict(self.placement), **dict.fromkeys(models, where)}
        chunks = tuple(item for item in self.chunks if found.get(item[0]) == "gemini")
        return replace(
            self, placement=tuple(sorted((k, v) for k, v in found.items() if v != "resident")), chunks=chunks
        )

    def offloading(self, models: Iterable[str], share: float) -> Setup:
        """The same with a share of some models' chunks in host memory."""
        found = {name: (shard, offload) for name, shard, offload in self.chunks}
        found |= dict.fromkeys(models, (1.0, share))
        return replace(self, chunks=tuple(sorted((k, *v) for k, v in found.items() if v != ALL)))

    def shares(self, stage: StageNode, packed: Chunks) -> tuple[float, float, float]:
        """Of what a stage trains under Gemini: the shares of the parameters that are whole on every device and that
        are offloaded, and that of the optimiser's state that is offloaded. Parameters are only with all of the state.
        """
        if self.small(stage, packed.total):
            return 1.0, 0.0, 0.0
        both = self.shard_param_frac == self.offload_optim_frac == 1.0
        return (
            packed.gathered(self.shard_param_frac),
            packed.away(self.offload_param_frac) if both else 0.0,
            packed.state_away(self.offload_optim_frac),
        )

    def small(self, stage: StageNode, count: int) -> bool:
        """Whether so many trained numbers are less than a chunk of Gemini: they stay whole on every device."""
        return count < self.chunk and self.micro(stage) == 1

    def fractions(self, model: str) -> tuple[float, float]:
        """The shares of a model in Gemini's chunks that are sharded, and offloaded."""
        return next(((shard, offload) for name, shard, offload in self.chunks if name == model), ALL)

    def holds_half(self, node: ModelNode) -> bool:
        """Whether a model that is trained nowhere takes two bytes a number."""
        build = node.info.build
        made = build.kind in ("hf", "random") and build.kept is None and node.info.quantised is None
        return self.half and made and (self.halved is None or node.name in self.halved)

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
    nodes = {node.name: node.info for stage in plan.stages for node in stage.models}
    return tuple(
        name
        for name, info in nodes.items()
        if name not in trained
        and info.build.kind in ("hf", "random")
        and info.build.kept is None
        and info.build.lora is None
        and info.quantised is None
    )


def _chunks(given: Mapping[str, Any], models: Iterable[str]) -> Iterator[tuple[str, float, float]]:
    for name in models:
        shard = float(given.get(f"{name}.shard_param_frac", 1.0))
        # Gemini offloads parameters only where all of them are sharded.
        offload = float(given.get(f"{name}.offload_param_frac", 1.0)) if shard == 1.0 else 0.0
        if (shard, offload) != ALL:
            yield name, shard, offload


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
    # Adapters are in the blocks, so that no gradient goes on to the embeddings.
    lowest = 0 if node.info.build.lora is None else 1
    largest = 0
    for target in stage.stage.trains:
        if target.kind != "model" or target.name != node.name:
            continue
        found = parameters.trained(node.info, target.part)
        largest = max(largest, found.largest)
        for name, shape in found.shapes:
            size = 1
            for axis in shape:
                size *= axis
            names[name] = size
        where = target.part or "body"
        if where.startswith("layer."):
            first = min(first, int(where.removeprefix("layer.")) + 1)
        elif where not in ("rest", "head"):
            first = min(first, lowest)
    return Trained(sum(names.values()), largest, first if names else 0)


def trained_chunks(stage: StagePlan, setup: Setup) -> Chunks:
    """The chunks of the largest model that a stage trains."""
    infos = [node.info for node in stage.models if trained(stage, node).count]
    found = max((parameters.parameters(info) for info in infos), key=lambda one: one.count, default=None)
    return chunks(found, setup.chunk, setup.reach) if found is not None else Chunks(0, 0, 1.0)


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


def frozen(node: ModelNode, setup: Setup, machine: Machine, share: float = 1.0, blocks_share: float = 1.0) -> Placed:
    """A model that the stage does not train; `share` of its weights is needed by the forwards of a micro-batch, and
    `blocks_share` of its blocks.
    """
    found = parameters.parameters(node.info)
    count, where = found.count, setup.placed(node.name)
    ranks = setup.ranks(machine)
    layers = node.info.size("N") or 0
    block = parameters.part(node.info, "layer.0") if found.exact and layers else found
    half = setup.holds_half(node)
    if where == "cached":
        return Placed(node.name, where, count, exact=found.exact)
    if node.info.quantised is not None:
        return Placed(node.name, where, count, device=weight_bytes(node.info, FULL), exact=found.exact)
    if where in STREAMED:
        return _streamed(node, where, ranks, half, layers if found.exact else 1, block, blocks_share)
    if where == "gemini":
        shard, offload = setup.fractions(node.name)
        packed = chunks(found, min(count, setup.chunk), setup.reach)
        inside = in_chunks(packed.total, ranks, 1 - shard, offload * (shard == 1.0), share)
        return replace(inside, name=node.name, count=count, exact=found.exact, work=window(packed, ranks))
    return Placed(node.name, where, count, device=weights(found, half), exact=found.exact)


def in_chunks(count: float, ranks: int, whole: float, away: float, share: float = 1.0) -> Placed:
    """So many numbers in Gemini's chunks, without a name: their bytes on a device, in the host, moved, gathered.

    `whole` of them are on every device, the others are shared out; `away` of them are in host memory.
    """
    own = HALF * count * (whole + (1 - whole) / ranks)
    return Placed(
        "", "gemini", round(count), device=round(own * (1 - away)), host=round(own * away * ranks),
        moved=round(own * away * share), gathered=round(HALF * count * (1 - whole) * share * (ranks - 1) / ranks),
    )  # fmt: skip


def window(packed: Chunks, ranks: int) -> int:
    """Bytes of the chunk that is gathered while it is used, and of the part of it that it is gathered from."""
    return round(HALF * packed.largest * (1 + 1 / ranks))


def weights(found: parameters.Parameters, half: bool) -> int:
    """Bytes of parameters in memory: in half precision two for each number of a matrix, four for one of a vector."""
    return HALF * (found.count + found.vectors) if half else FULL * found.count


def _streamed(
    node: ModelNode, where: str, ranks: int, half: bool, layers: int, block: parameters.Parameters, ran: float
) -> Placed:
    """A model whose blocks pass through the device, two at a time, `ran` of them; what is in no block stays there.

    From disk the pages that are read are the system's to keep or drop.
    """
    found = parameters.parameters(node.info)
    one, whole = weights(block, half), weights(found, half)
    outside = whole - layers * one
    host = layers * one * ranks if where == "offload" else 2 * one * ranks
    return Placed(
        node.name, where, found.count, device=outside, host=host, work=2 * one, moved=round(layers * one * ran),
        read=round(saved_width(node) * layers * block.count * ran) if where == "disk" else 0, exact=found.exact,
    )  # fmt: skip


def saved_width(node: ModelNode) -> int:
    """Bytes of a weight in the files of a model, as its config says."""
    said = node.info.config.get("dtype") or node.info.config.get("torch_dtype")
    return 2 if said in ("bfloat16", "float16") else FULL
