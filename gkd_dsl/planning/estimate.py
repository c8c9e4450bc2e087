"""What a spec needs of a machine: by model, by part of memory, by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.graph.passes.fuse import fuse
from gkd_dsl.graph.passes.sparse import TopK, sparse
from gkd_dsl.graph.plan import HeadPlan, SpecPlan, StagePlan
from gkd_dsl.graph.stored import refusals, sparse_keys, student_task, temperatures
from gkd_dsl.models.fields import positions
from gkd_dsl.models.heads import is_packed
from gkd_dsl.planning import operators, parameters
from gkd_dsl.planning.blocks import Shape
from gkd_dsl.planning.chunks import chunks
from gkd_dsl.planning.layout import (
    HALF,
    STREAMED,
    Placed,
    Setup,
    Trained,
    frozen,
    in_chunks,
    trained,
    trained_chunks,
    window,
)
from gkd_dsl.planning.ledger import Ledger
from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.simulate import Micro, Model, depth
from gkd_dsl.planning.work import Work, work

ROOM = 0.05
"""The share of a device's memory that is left for its runtime and for gaps between tensors."""

_LENGTH = 128


@dataclass(frozen=True)
class StageEstimate:
    """One stage on a machine.

    models   each model and where it lives
    beside   parameters of projections and policies
    device   peak bytes of each device, by part, and at which moment
    host     peak bytes of the host, by part
    """

    name: str
    models: tuple[Placed, ...]
    beside: tuple[tuple[str, int], ...]
    rows: int
    micro: int
    length: int
    device: tuple[tuple[str, int], ...]
    moment: str
    host: tuple[tuple[str, int], ...]
    work: Work

    @property
    def device_bytes(self) -> int:
        """The peak of a device."""
        return sum(count for _, count in self.device)

    @property
    def host_bytes(self) -> int:
        """The peak of the host."""
        return sum(count for _, count in self.host)

    def fits(self, machine: Machine, margin: float = 0.0) -> bool:
        """Whether the machine has that much, and a share of it more; without a GPU both are in one memory."""
        room = 1 - ROOM - margin
        if machine.kind == "cpu":
            return self.device_bytes + self.host_bytes <= room * machine.host_memory
        return self.device_bytes <= room * machine.device_memory and self.host_bytes <= room * machine.host_memory

    def as_dict(self, machine: Machine) -> dict[str, object]:
        """For JSON."""
        return {
            "stage": self.name,
            "models": [asdict(model) for model in self.models],
            "beside": dict(self.beside),
            "rows": self.rows,
            "micro_batches": self.micro,
            "length": self.length,
            "device_bytes": self.device_bytes,
            "device": dict(self.device),
            "moment": self.moment,
            "host_bytes": self.host_bytes,
            "host": dict(self.host),
            "flops": dict(self.work.flops),
            "link_bytes": dict(self.work.link),
            "between_bytes": dict(self.work.between),
            "disk_bytes": dict(self.work.disk),
            "compute_seconds": self.work.compute_seconds(machine),
            "link_seconds": self.work.link_seconds(machine),
            "seconds": self.work.seconds(machine),
            "fits": self.fits(machine),
        }


def estimate(plan: SpecPlan, machine: Machine, setup: Setup | None = None) -> tuple[StageEstimate, ...]:
    """Every stage of a plan on a machine, as its runtime block says, or as `setup` does."""
    chosen = setup if setup is not None else Setup.of(plan)
    return tuple(estimate_stage(stage, machine, chosen) for stage in plan.stages)


def estimate_stage(
    stage: StagePlan, machine: Machine, setup: Setup, *, rows: int | None = None, length: int | None = None
) -> StageEstimate:
    """One stage on a machine; `rows` and `length` of a micro-batch are those of the stage unless given."""
    shape = Shape(
        rows if rows is not None else setup.rows(stage.stage, machine),
        length if length is not None else length_of(stage),
        setup.half,
        machine.kind == "cpu",
    )
    models = {node.name: _model(stage, node, setup, machine) for node in stage.models}
    beside = {node.name: parameters.projection(node) for node in stage.projections}
    beside |= {item.node.name: parameters.policy(item.node) for item in stage.policies}
    ledger = _device(_fused(stage, models, setup), models, beside, setup, machine, shape)
    return StageEstimate(
        stage.name,
        tuple(model.placed for model in models.values()),
        tuple(beside.items()),
        shape.rows,
        setup.micro(stage.stage),
        shape.length,
        tuple(ledger.parts().items()),
        ledger.moment,
        tuple(_host(models, setup, _moments(stage), stage).items()),
        work(stage, models, setup, shape, machine),
    )


def seconds_of(plan: SpecPlan, machine: Machine, setup: Setup) -> tuple[float, float]:
    """The least time of one step of every stage, and the time of its arithmetic and traffic one after the other."""
    total, all_of_it = 0.0, 0.0
    for stage in plan.stages:
        models = {node.name: _model(stage, node, setup, machine) for node in stage.models}
        shape = Shape(setup.rows(stage.stage, machine), length_of(stage), setup.half, machine.kind == "cpu")
        found = work(stage, models, setup, shape, machine)
        total += found.seconds(machine)
        all_of_it += found.summed(machine)
    return total, all_of_it


def least_bytes(plan: SpecPlan, machine: Machine, setup: Setup) -> int:
    """What a device holds in any case: weights, and what the optimiser keeps."""
    most = 0
    for stage in plan.stages:
        models = [_model(stage, node, setup, machine) for node in stage.models]
        total = sum(model.placed.device for model in models)
        total += _state(stage, setup, machine, sum(model.trained.count for model in models))
        most = max(most, total)
    return most


def length_of(stage: StagePlan) -> int:
    """Tokens of a text: what the stage says, else its source, else 128; no more than the models have positions for."""
    source = stage.stage.source
    said = stage.stage.max_length or (source.arg("max_length") if source is not None else None)
    length = int(said) if isinstance(said, int) else _LENGTH
    most = [count for node in stage.models if (count := positions(node.info)) is not None]
    return min([length, *most])


def _fused(stage: StagePlan, models: Mapping[str, Model], setup: Setup) -> StagePlan:
    """The plan that is run: of cached models the largest logits, and losses fused with the heads that are in memory."""
    keys: dict[str, TopK] = {}
    for name, model in models.items():
        top_k = dict(setup.top_k).get(name)
        if model.placed.where == "cached" and not any(
            refusals([stage], name, tasks=[student_task(stage)], top_k=top_k)
        ):
            found = sparse_keys(stage, name, top_k)
            keys |= {key: TopK(count, temperatures(stage, name)) for key, count in found.items()}
    stage = sparse(stage, keys)
    if not setup.fuse:
        return stage

    def there(head: HeadPlan) -> bool:
        model = models[head.model]
        here = model.placed.where in ("resident", *STREAMED) and not is_packed(model.node.info, head.module)
        return bool(model.trained.count) or here

    return fuse(replace(stage, fuse_logits="auto"), there)


def _model(stage: StagePlan, node: ModelNode, setup: Setup, machine: Machine) -> Model:
    what = trained(stage, node)
    if not what.count:
        return Model(node, what, frozen(node, setup, machine, *_shares(stage, node)))
    found = parameters.parameters(node.info)
    count = found.count
    if setup.backend != "gemini":
        return Model(node, what, Placed(node.name, "resident", count, what.count, 4 * count, exact=found.exact))
    packed, ranks = chunks(found, setup.chunk, setup.reach), setup.ranks(machine)
    whole, away, _ = setup.shares(stage.stage, packed)
    inside = in_chunks(packed.total * what.count / count, ranks, whole, away)
    # What is frozen of it stays whole on each device.
    placed = replace(
        inside, name=node.name, count=count, trains=what.count, device=inside.device + HALF * (count - what.count),
        work=window(packed, ranks) if whole < 1 else 0, exact=found.exact,
    )  # fmt: skip
    return Model(node, what, placed)


def _shares(stage: StagePlan, node: ModelNode) -> tuple[float, float]:
    """The share of a model's weights that its forwards need, of the blocks that run and of the head where it does; and
    the share of its blocks.
    """
    found = parameters.parameters(node.info)
    ran = [forward for forward in stage.forwards if forward.model == node.name]
    if not ran or not found.exact or not found.count:
        return 1.0, 1.0
    layers = node.info.size("N") or 0
    most = max(depth(forward, node) for forward in ran)
    left = (layers - most) * (parameters.part(node.info, "layer.0").count if layers else 0)
    head = any(tap.path.kind == "logits" for forward in ran for tap in forward.taps)
    if not head and node.info.task != "encoder" and not parameters.tied(node.info):
        left += parameters.part(node.info, "head").count
    return max(0.0, 1 - left / found.count), most / layers if layers else 1.0


def _device(
    stage: StagePlan,
    models: Mapping[str, Model],
    beside: Mapping[str, int],
    setup: Setup,
    machine: Machine,
    shape: Shape,
) -> Ledger:
    ledger = Ledger()
    ledger.add("libraries", operators.LIBRARIES[machine.kind])
    extra = sum(beside.values())
    gemini = setup.backend == "gemini"
    for model in models.values():
        ledger.add("chunks" if model.placed.where == "gemini" else "weights", model.placed.device)
    ledger.add("weights", (2 if gemini else 4) * extra)
    optimised = sum(model.trained.count for model in models.values()) + extra
    ledger.add("optimizer", _state(stage, setup, machine, optimised))
    if gemini and setup.micro(stage.stage) > 1:
        # Over several micro-batches gradients have chunks of their own; over one they take the parameters' places.
        ledger.add("gradients", 2 * optimised / setup.ranks(machine))
    columns = 8 * len(stage.columns) * shape.tokens * setup.micro(stage.stage)
    ledger.add("activations", columns)
    micro = setup.micro(stage.stage)
    for number in range(min(2, micro)):
        _micro(stage, models, setup, shape, ledger, extra, grown=number > 0)
    _optimize(ledger, models, stage, setup, shape, optimised)
    return ledger


def _moments(stage: StagePlan) -> int:
    optim = stage.stage.optim
    return 2 if optim.name == "adamw" else 1 if optim.momentum else 0


def _state(stage: StagePlan, setup: Setup, machine: Machine, optimised: int) -> int:
    """Bytes of the optimiser on a device: its moments, and in Gemini the fp32 weights, its share of them."""
    if setup.backend != "gemini":
        return 4 * _moments(stage) * optimised
    *_, away = setup.shares(stage.stage, trained_chunks(stage, setup))
    own = optimised if setup.small(stage.stage, optimised) else optimised / setup.ranks(machine)
    return round(4 * (1 + _moments(stage)) * own * (1 - away))


def _micro(
    stage: StagePlan,
    models: Mapping[str, Model],
    setup: Setup,
    shape: Shape,
    ledger: Ledger,
    extra: int,
    *,
    grown: bool,
) -> None:
    cast = 0
    if setup.half and setup.backend != "gemini":
        # Autocast keeps its copies of matrices that have a gradient until the backward is over.
        cast = HALF * sum(_graded(stage, model) for model in models.values() if model.trained.count)
    ledger.add("weights", cast)
    step = Micro(stage, models, setup, shape, ledger)
    step.forward()
    step.backward(grown)
    ledger.add("weights", -cast)
    if not grown and setup.backend != "gemini":
        ledger.add("gradients", 4 * extra)


def _graded(stage: StagePlan, model: Model) -> int:
    """Numbers in the products of a trained model's forward: with adapters theirs alone; embeddings are looked up."""
    info = model.node.info
    if info.build.lora is not None:
        return model.trained.count
    found = parameters.parameters(info)
    if not found.exact:
        return found.count
    taps = [tap.path for forward in stage.forwards if forward.model == model.node.name for tap in forward.taps]
    head = (info.size("V") or 0) * (info.size("E") or info.size("H") or 0)
    language = info.task in ("causal_lm", "masked_lm")
    count = found.count - found.vectors - parameters.part(info, "embed").count
    if not language or any(path.kind == "logits" for path in taps):
        return count + head * (language and parameters.tied(info))
    # Fused with its losses the head is cast there.
    return count - head * (not parameters.tied(info))


def _optimize(
    ledger: Ledger,
    models: Mapping[str, Model],
    stage: StagePlan,
    setup: Setup,
    shape: Shape,
    optimised: int,
) -> None:
    """Adam's square roots: of one tensor at a time on the CPU, of all at once on a GPU."""
    if _moments(stage) < 2 or setup.backend == "gemini":
        ledger.mark("the optimizer")
        return
    largest = max((model.trained.largest for model in models.values()), default=0)
    ledger.mark("the optimizer", optimizer=4 * (2 * largest if shape.cpu else optimised))


def _host(models: Mapping[str, Model], setup: Setup, moments: int, stage: StagePlan) -> dict[str, int]:
    found: dict[str, int] = {}
    for model in models.values():
        if model.placed.host:
            found[f"{model.placed.name} weights"] = model.placed.host
    if setup.backend == "gemini":
        count = sum(model.trained.count for model in models.values())
        *_, away = setup.shares(stage.stage, trained_chunks(stage, setup))
        found |= {"optimizer": round(4 * (1 + moments) * count * away)} if away else {}
    return found


__all__ = ["Placed", "Setup", "StageEstimate", "Trained", "estimate", "estimate_stage", "length_of"]
