"""The cheapest change that makes a spec fit a machine: options in the order of the step's time, tried in turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from gkd_dsl.graph.plan import SpecPlan
from gkd_dsl.graph.stored import refusals, student_task
from gkd_dsl.meaning.settings import PLACEMENT
from gkd_dsl.planning.estimate import StageEstimate, estimate, least_bytes, seconds_of
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import Machine

_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SLOWER = 0.02
"""What halving a micro-batch is taken to cost: smaller matrix products reach a little less of the device."""


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
    """The first setup that fits, by the least time of a step over all stages, then by the fewest changes.

    A cached teacher costs a pass before the run, and is proposed where nothing else fits. None where nothing does.
    What this version does not run is not proposed.
    """
    for options in (_options(plan, machine, current), _with_cache(plan, machine, current)):
        for seconds, setup in _ordered(plan, machine, current, options):
            if least_bytes(plan, machine, setup) > machine.device_memory:
                continue
            stages = estimate(plan, machine, setup)
            if all(stage.fits(machine) for stage in stages):
                return Proposal(setup, stages, seconds)
    return None


def _ordered(plan: SpecPlan, machine: Machine, current: Setup, options: Iterable[Setup]) -> list[tuple[float, Setup]]:
    found = []
    for number, setup in enumerate(dict.fromkeys(options)):
        seconds = seconds_of(plan, machine, setup)
        weighed = seconds * (1 + _SLOWER * math.log2(setup.split))
        found.append((float(f"{weighed:.3g}"), changes(current, setup), number, seconds, setup))
    return [(seconds, setup) for *_, seconds, setup in sorted(found, key=lambda item: item[:3])]


def changes(before: Setup, after: Setup) -> int:
    """How many settings differ."""
    one = [
        before.backend != after.backend, before.half != after.half, before.checkpoint != after.checkpoint,
        before.fuse != after.fuse, (before.split, before.merge) != (after.split, after.merge),
        before.shard_param_frac != after.shard_param_frac, before.offload_optim_frac != after.offload_optim_frac,
        before.offload_param_frac != after.offload_param_frac,
    ]  # fmt: skip
    return sum(one) + len(set(before.placement) ^ set(after.placement))


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
    tasks = [student_task(stage) for stage in plan.stages]
    names = [name for name in frozen_models(plan) if not any(refusals(plan.stages, name, tasks=tasks))]
    for setup in _backends(plan, machine, current):
        for count in range(1, len(names) + 1):
            yield from _smaller(plan, machine, setup.placing(names[:count], "cached"))


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
    while all(size % (2 * found[-1]) == 0 and size // (2 * found[-1]) >= ranks for size in sizes):
        found.append(2 * found[-1])
    return found


def _merges(plan: SpecPlan) -> Sequence[int]:
    """The powers of two by which every stage can have fewer and larger micro-batches: what is streamed, less often."""
    found: list[int] = []
    while all(stage.stage.accumulate % (2 ** (len(found) + 1)) == 0 for stage in plan.stages):
        found.append(2 ** (len(found) + 1))
    return found


def _gemini(plan: SpecPlan, current: Setup) -> bool:
    """Whether Gemini can run the spec: it has AdamW alone."""
    return current.backend == "gemini" or all(stage.stage.optim.name == "adamw" for stage in plan.stages)


def _places(plan: SpecPlan, machine: Machine, current: Setup) -> Iterator[Setup]:
    infos = {node.name: node.info for stage in plan.stages for node in stage.models}
    # Neither packed weights nor stored outputs can be moved.
    names = [n for n in frozen_models(plan) if infos[n].quantised is None and infos[n].build.stored is None]
    for setup in _backends(plan, machine, current):
        yield setup
        if machine.kind == "cpu":
            places: tuple[str, ...] = ("disk",)
        else:
            places = ("offload", "disk", "gemini") if setup.backend == "gemini" else ("offload", "disk")
        places = tuple(place for place in places if place not in PLACEMENT["placement"].later)
        for place, count in product(places, range(1, len(names) + 1)):
            yield setup.placing(names[:count], place)


def _backends(plan: SpecPlan, machine: Machine, current: Setup) -> Iterator[Setup]:
    """The backend as it is, several processes where there are several devices, and Gemini with its fractions."""
    yield current
    if machine.kind == "cpu":
        return
    if machine.devices > 1 and current.backend == "local":
        yield replace(current, backend="ddp")
    if not _gemini(plan, current):
        return
    for optim, parameter in product(_FRACTIONS, (0.0, 0.5, 1.0)):
        yield replace(
            current, backend="gemini", half=True, shard_param_frac=1.0, offload_optim_frac=optim,
            offload_param_frac=parameter,
        )  # fmt: skip
