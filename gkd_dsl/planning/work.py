"""Arithmetic and traffic of a step, and the time that they bound from below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gkd_dsl.graph.plan import ForwardPlan, StagePlan
from gkd_dsl.planning import parameters
from gkd_dsl.planning.blocks import Shape, Sizes
from gkd_dsl.planning.layout import Setup, trained_chunks
from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.simulate import Model, depth

_CACHED = 0.8
"""The share of the host's memory that its system can use to keep files."""


@dataclass(frozen=True)
class Work:
    """A step, for each device.

    flops    operations of matrix products, by model
    link     bytes between host and device, by what they are
    between  bytes between devices, by what they are
    disk     bytes from the disk for all devices, by what they are
    """

    flops: tuple[tuple[str, float], ...]
    link: tuple[tuple[str, float], ...]
    between: tuple[tuple[str, float], ...]
    disk: tuple[tuple[str, float], ...] = ()

    def compute_seconds(self, machine: Machine) -> float:
        """The least time of the arithmetic."""
        return sum(count for _, count in self.flops) / machine.compute

    def link_seconds(self, machine: Machine) -> float:
        """The least time of the traffic between host and device."""
        return sum(count for _, count in self.link) / machine.link

    def between_seconds(self, machine: Machine) -> float:
        """The least time of the traffic between devices."""
        return sum(count for _, count in self.between) / machine.between

    def disk_seconds(self, machine: Machine) -> float:
        """The least time of reading from the disk."""
        return sum(count for _, count in self.disk) / machine.disk

    def seconds(self, machine: Machine) -> float:
        """The least time of a step, arithmetic and traffic all at once."""
        return max(self._times(machine))

    def summed(self, machine: Machine) -> float:
        """The time of the arithmetic and of all traffic, one after the other."""
        return sum(self._times(machine))

    def _times(self, machine: Machine) -> tuple[float, ...]:
        return (
            self.compute_seconds(machine),
            self.link_seconds(machine),
            self.between_seconds(machine),
            self.disk_seconds(machine),
        )


def work(stage: StagePlan, models: Mapping[str, Model], setup: Setup, shape: Shape, machine: Machine) -> Work:
    """The work of one optimiser step for each device."""
    micro, ranks = setup.micro(stage.stage), setup.ranks(machine)
    flops: dict[str, float] = {}
    link: dict[str, float] = {}
    between: dict[str, float] = {}
    disk: dict[str, float] = {}
    for forward in stage.forwards:
        model = models[forward.model]
        if model.placed.where == "cached":
            continue
        flops[forward.model] = flops.get(forward.model, 0.0) + micro * _flops(forward, model, setup, shape)
        if not model.trained.count:
            times = micro * (2 if forward.grad else 1)
            _add(link, f"{forward.model} weights", model.placed.moved * times)
            _add(between, f"{forward.model} weights", model.placed.gathered * times)
            # What the host has room for stays in its memory once it is read; else one reading serves all devices.
            if model.placed.read > _CACHED * machine.host_memory:
                _add(disk, f"{forward.model} weights", model.placed.read * times)
    *_, away = setup.shares(stage.stage, trained_chunks(stage, setup)) if setup.backend == "gemini" else (0.0,)
    for name, model in models.items():
        _trained(name, model, setup, ranks, micro, away, link, between)
    return Work(tuple(flops.items()), tuple(link.items()), tuple(between.items()), tuple(disk.items()))


def _trained(
    name: str,
    model: Model,
    setup: Setup,
    ranks: int,
    micro: int,
    away: float,
    link: dict[str, float],
    between: dict[str, float],
) -> None:
    """The traffic of what a stage trains; `away` is the share of the optimiser's state that is in host memory."""
    count = model.trained.count
    if not count:
        return
    if setup.backend == "ddp":
        _add(between, f"{name} gradients", 2 * 4 * count * (ranks - 1) / ranks)
    elif setup.backend == "gemini":
        _add(link, f"{name} weights", model.placed.moved * 2 * micro)
        _add(link, f"{name} optimizer", 4 * count / ranks * away)
        _add(between, f"{name} weights", model.placed.gathered * 2 * micro)
        _add(between, f"{name} gradients", 2 * count * (ranks - 1) / ranks * micro)


def _add(found: dict[str, float], name: str, count: float) -> None:
    if count:
        found[name] = found.get(name, 0.0) + count


def _flops(forward: ForwardPlan, model: Model, setup: Setup, shape: Shape) -> float:
    """Operations of one forward, and of its backward where there is one."""
    info = model.node.info
    size, ran = Sizes.of(info), depth(forward, model.node)
    found = parameters.parameters(info)
    block = parameters.part(info, "layer.0").count if found.exact and size.blocks else found.count / max(1, size.blocks)
    each = 2.0 * block + 4.0 * shape.length * size.attention
    head = 2.0 * size.V * (info.size("E") or size.H) if info.task in ("causal_lm", "masked_lm") else 0.0
    head = head if any(tap.path.kind == "logits" for tap in forward.taps) else 0.0
    once = shape.tokens * (ran * each + head)
    if not forward.grad:
        return once
    first = max(0, model.trained.first - 1)
    above = shape.tokens * (max(0, ran - first) * each + head)
    # Of frozen weights no gradient is made, only of what goes into them; adapters have theirs.
    adapted = info.build.lora is not None
    ways = 2.0 if model.trained.count and not adapted else 1.0
    own = 2.0 * shape.tokens * model.trained.count if adapted else 0.0
    again = shape.tokens * max(0, ran - first) * each if setup.checkpoint and model.trained.count else 0.0
    return once + ways * above + own + again
