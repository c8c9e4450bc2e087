"""The cheapest change that makes a spec fit a machine: options in the order of the step's time, tried in turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from gkd_dsl.graph.nodes import ReplaceBlock
from gkd_dsl.graph.plan import Apply, SpecPlan, StagePlan
from gkd_dsl.graph.stored import refusals, student_task
from gkd_dsl.meaning.settings import PLACEMENT
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.planning.estimate import StageEstimate, estimate, least_bytes, seconds_of
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import Machine
from gkd_dsl.sources import task_of

_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SLOWER = 0.02
"""What halving a micro-batch is taken to cost: smaller matrix products reach a little less of the device."""
_BESIDE = 0.05
"""The share of the time of what is not the bound that is taken to come on top: not all of it runs beside."""
_CHUNKED = 0.02
"""What Gemini is taken to cost beside one process or ddp: its chunks are gathered and let go as they are used."""
_MARGIN = 0.05
"""What a change leaves free beyond what the verdict does, where it can: a plan is not exact."""


@dataclass(frozen=True)
class Proposal:
    """A setup with what it needs; `cached` where a teacher's outputs have to be stored first."""

    setup: Setup
    stages: tuple[StageEstimate, ...]
    seconds: float

    @property
    def cached(self) -> bool:
        """Whether it needs `gkd cache` before."""
        return any(where == "cached" for _, where in self.setup.placement)


def cheapest(plan: SpecPlan, machine: Machine, current: Setup) -> Proposal | None:
    """The first setup that fits, by the time of a step over all stages, then by the fewest changes.

    One that leaves some more free is taken before one that just fits. A cached teacher costs a pass before the run,
    and is proposed where nothing else fits. None where nothing does.
    What this version does not run is not proposed.
    """
    return _first(plan, machine, current, _options(plan, machine, current)) or with_cache(plan, machine, current)


def with_cache(plan: SpecPlan, machine: Machine, current: Setup) -> Proposal | None:
    """The first setup that fits with stored outputs of teachers; None where none does, or none can be stored."""
    return _first(plan, machine, current, _with_cache(plan, machine, current))


def _first(plan: SpecPlan, machine: Machine, current: Setup, options: Iterable[Setup]) -> Proposal | None:
    tight: Proposal | None = None
    for seconds, setup in _ordered(plan, machine, current, options):
        if least_bytes(plan, machine, setup) > machine.device_memory:
            continue
        stages = estimate(plan, machine, setup)
        if all(stage.fits(machine, _MARGIN) for stage in stages):
            return Proposal(setup, stages, seconds)
        if tight is None and all(stage.fits(machine) for stage in stages):
            tight = Proposal(setup, stages, seconds)
    return tight


def _ordered(plan: SpecPlan, machine: Machine, current: Setup, options: Iterable[Setup]) -> list[tuple[float, Setup]]:
    found = []
    for number, setup in enumerate(dict.fromkeys(options)):
        seconds, all_of_it = seconds_of(plan, machine, setup)
        weighed = weigh(seconds, all_of_it, setup)
        found.append((float(f"{weighed:.3g}"), changes(current, setup), number, seconds, setup))
    return [(seconds, setup) for *_, seconds, setup in sorted(found, key=lambda item: item[:3])]


def weigh(seconds: float, all_of_it: float, setup: Setup) -> float:
    """What a step is taken to last, to compare setups by: a little more than its bound."""
    chunks = _CHUNKED if setup.backend == "gemini" else 0.0
    return (seconds + _BESIDE * (all_of_it - seconds)) * (1 + _SLOWER * math.log2(setup.split)) * (1 + chunks)


def changes(before: Setup, after: Setup) -> int:
    """How many settings differ."""
    one = [
        before.backend != after.backend, before.half != after.half, before.checkpoint != after.checkpoint,
        before.fuse != after.fuse, (before.split, before.merge) != (after.split, after.merge),
        before.shard_param_frac != after.shard_param_frac, before.offload_optim_frac != after.offload_optim_frac,
        before.offload_param_frac != after.offload_param_frac,
    ]  # fmt: skip
    return sum(one) + len(set(before.placement) ^ set(after.placement)) + len(set(before.chunks) ^ set(after.chunks))


def frozen_models(plan: SpecPlan) -> list[str]:
    """The models that no stage trains, largest first."""
    from gkd_dsl.planning.parameters import parameters

    trained = {target.name for stage in plan.stages for target in stage.stage.trains if target.kind == "model"}
    nodes = {node.name: node for stage in plan.stages for node in stage.models if node.name not in trained}
    return sorted(nodes, key=lambda name: -parameters(nodes[name].info).count)


def _options(plan: SpecPlan, machine: Machine, current: Setup) -> Iterator[Setup]:
    for setup in _places(plan, machine, current):
        yield from _smaller(plan, machine, setup)


def _with_cache(plan: SpecPlan, machine: Machine, current: Setup) -> Iterator[Setup]:
    names = [name for name in frozen_models(plan) if not any(_refused(plan, current, name))]
    for setup in _backends(plan, machine, current):
        for count in range(1, len(names) + 1):
            yield from _smaller(plan, machine, setup.placing(names[:count], "cached"))


def _refused(plan: SpecPlan, current: Setup, name: str) -> Iterator[str]:
    """Why the outputs of a model cannot be stored as the spec says that they are to be."""
    tail = str(dict(plan.runtime).get(f"{name}.tail", "bucket"))
    tasks = [_task(stage) for stage in plan.stages]
    return refusals(plan.stages, name, tasks=tasks, top_k=dict(current.top_k).get(name), tail=tail)


def _smaller(plan: SpecPlan, machine: Machine, setup: Setup) -> Iterator[Setup]:
    """Less memory for activations and logits, wherever the weights are."""
    halves = (True,) if setup.half else (False, True)
    checkpoints = (True,) if setup.checkpoint else (False, True)
    sizes = [*((split, 1) for split in _splits(plan, machine, setup)), *((1, merge) for merge in _merges(plan))]
    for half, checkpoint, (split, merge) in product(halves, checkpoints, sizes):
        found = replace(setup, half=half, checkpoint=checkpoint, split=split, merge=merge)
        yield found
        if not setup.fuse:
            yield replace(found, fuse=True)


def _splits(plan: SpecPlan, machine: Machine, setup: Setup) -> Sequence[int]:
    """The powers of two that divide every stage's micro-batch into whole texts for each device."""
    sizes = [stage.stage.batch_size for stage in plan.stages]
    ranks = setup.ranks(machine)
    found = [1]
    while all(size % (2 * found[-1] * ranks) == 0 for size in sizes):
        found.append(2 * found[-1])
    return found


def _merges(plan: SpecPlan) -> Sequence[int]:
    """The powers of two by which every stage can have fewer and larger micro-batches: what is streamed, less often."""
    found: list[int] = []
    while all(stage.stage.accumulate % (2 ** (len(found) + 1)) == 0 for stage in plan.stages):
        found.append(2 ** (len(found) + 1))
    return found


def _gemini(plan: SpecPlan, current: Setup) -> bool:
    """Whether Gemini can run the spec: AdamW, no adapters that are trained, no gradient taken inside a step."""
    if current.backend == "gemini":
        return True
    taken = any(isinstance(step, Apply) and step.op == "gradient" for stage in plan.stages for step in stage.program)
    adapters = any(node.info.build.lora is not None for stage in plan.stages for node in stage.models)
    return not taken and not adapters and all(stage.stage.optim.name == "adamw" for stage in plan.stages)


def _even(plan: SpecPlan, machine: Machine) -> bool:
    """Whether every micro-batch can be shared out over the devices."""
    return all(stage.stage.batch_size % machine.devices == 0 for stage in plan.stages)


def _task(stage: StagePlan) -> str:
    head = student_task(stage)
    return task_of(dict(stage.stage.source.args), head) if stage.stage.source is not None else head


def _movable(plan: SpecPlan, current: Setup, where: str) -> list[str]:
    """The models that can be placed somewhere, largest first: as the check has it."""
    infos = {node.name: node.info for stage in plan.stages for node in stage.models}
    used: set[str] = set()
    for stage in plan.stages:
        for forward in (*stage.forwards, *(forward for item in stage.metrics for forward in item.forwards)):
            used |= {change.model for change in forward.changes if isinstance(change, ReplaceBlock)}
            used |= {forward.model} if forward.grad else set()
    return [
        name
        for name in frozen_models(plan)
        if name not in used
        and infos[name].family is not None
        # Neither packed weights nor stored outputs can be moved.
        and infos[name].quantised is None
        and infos[name].build.stored is None
        and current.placed(name) != "cached"
        and (where != "disk" or _is_read(infos[name]))
        and (where != "gemini" or infos[name].build.base is None)
    ]


def _is_read(info: ModelInfo) -> bool:
    """Whether a model's weights are in its files as they are run."""
    return info.build.kind == "hf" and info.build.kept is None and info.build.adapter is None


def _places(plan: SpecPlan, machine: Machine, current: Setup) -> Iterator[Setup]:
    for setup in _backends(plan, machine, current):
        yield setup
        places: tuple[str, ...] = ("disk",) if machine.kind == "cpu" else ("offload", "disk")
        for place in places:
            names = _movable(plan, current, place)
            for count in range(1, len(names) + 1):
                yield setup.placing(names[:count], place)
        if setup.backend == "gemini" and "gemini" not in PLACEMENT["placement"].later:
            names = _movable(plan, current, "gemini")
            for count, share in product(range(1, len(names) + 1), _FRACTIONS):
                yield setup.placing(names[:count], "gemini").offloading(names[:count], share)


def _backends(plan: SpecPlan, machine: Machine, current: Setup) -> Iterator[Setup]:
    """The backend as it is, several processes where there are several devices, and Gemini with its fractions."""
    yield current
    if machine.kind == "cpu" or (machine.devices > 1 and not _even(plan, machine)):
        return
    if machine.devices > 1 and current.backend == "local":
        yield replace(current, backend="ddp")
    if not _gemini(plan, current):
        return
    # Gemini offloads parameters only with all of the optimiser's state.
    for optim, parameter in (*((optim, 0.0) for optim in _FRACTIONS), (1.0, 1.0)):
        yield replace(
            current, backend="gemini", half=True, shard_param_frac=1.0, offload_optim_frac=optim,
            offload_param_frac=parameter,
        )  # fmt: skip
