"""A plan in words: a table of the models, memory by part, the bound on a step, the verdict, the block to paste."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gkd_dsl.graph.explain_words import quoted
from gkd_dsl.graph.plan import SpecPlan
from gkd_dsl.planning.estimate import ROOM, StageEstimate, estimate
from gkd_dsl.planning.layout import ALL, Placed, Setup
from gkd_dsl.planning.machine import COMPUTE, Machine
from gkd_dsl.planning.search import Proposal, cheapest, with_cache
from gkd_dsl.planning.units import in_bytes, in_count, in_rate, in_seconds

_SHARES = {"shard_param_frac": 1.0, "offload_optim_frac": 0.0, "offload_param_frac": 0.0}
_KEPT = (
    "search_range_m", "min_chunk_size_m", "hidden_dim", "max_prefetch", "pin_memory", "initial_scale", "min_scale",
    "max_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis",
)  # fmt: skip
"""Settings of Gemini that say nothing of where anything lives."""
_WORDS = {"optimizer": "optimiser"}
_HEAD = ("model", "parameters", "trained", "lives", "each device", "host", "moved a pass")


@dataclass(frozen=True)
class Report:
    """A spec on a machine: as it is, and, where that does not fit, the cheapest change that does.

    `stored` is one with stored outputs, where steps are then at least twice as fast.
    """

    name: str
    plan: SpecPlan
    machine: Machine
    setup: Setup
    stages: tuple[StageEstimate, ...]
    proposal: Proposal | None = None
    stored: Proposal | None = None

    @property
    def fits(self) -> bool:
        """Whether every stage fits as the spec is written."""
        return all(stage.fits(self.machine) for stage in self.stages)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        machine, found = self.machine, self.proposal
        return {
            "spec": self.name,
            "machine": {
                "kind": machine.kind,
                "devices": machine.devices,
                "device_bytes": machine.device_memory,
                "host_bytes": machine.host_memory,
                "link_bytes_a_second": machine.link,
                "between_bytes_a_second": machine.between,
                "disk_bytes_a_second": machine.disk,
                "flops_a_second": machine.compute,
            },
            "stages": [stage.as_dict(machine) for stage in self.stages],
            "fits": self.fits,
            "change": None
            if found is None
            else {
                "block": block(self.plan, self.setup, found.setup),
                "stages": [s.as_dict(machine) for s in found.stages],
            },
        }

    def text(self) -> str:
        """For people."""
        machine = self.machine
        lines = [f"{self.name} on {machine}"]
        lines[0] += f"; {in_rate(machine.compute, 'FLOP/s')}"
        if machine.kind == "cuda":
            lines[0] += f" each, {in_rate(machine.link, 'B/s')} between host and device"
        roles = {node.name: node.role for stage in self.plan.stages for node in stage.models}
        for stage in self.stages:
            lines += ["", *_stage(stage, roles, machine)]
        lines += ["", *self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> Iterator[str]:
        if self.fits:
            yield "It fits."
            return
        yield f"It does not fit: {'; '.join(_lacks(self.stages, self.machine))}."
        found = self.proposal
        if found is None:
            yield ""
            yield "No change of the runtime block that was tried makes it fit."
            yield "A smaller teacher, a shorter `max_length` or more devices would."
            return
        need = max(stage.device_bytes for stage in found.stages)
        host = max(stage.host_bytes for stage in found.stages)
        seconds = sum(stage.work.seconds(self.machine) for stage in found.stages)
        what = "It then needs" if self.machine.kind == "cpu" else "Each device then needs"
        need += host if self.machine.kind == "cpu" else 0
        also = f", the host {in_bytes(host)}" if host and self.machine.kind != "cpu" else ""
        yield ""
        yield "The cheapest change that fits:"
        yield ""
        yield from (f"  {line}" for line in block(self.plan, self.setup, found.setup).splitlines())
        yield ""
        time = f"a step takes at least {in_seconds(seconds)}, {_bound(found, self.machine)}"
        yield f"{what} {in_bytes(need)}{also}; {time}."
        most = max(found.stages, key=lambda stage: stage.device_bytes)
        yield f"  {_parts((*most.device, *most.host) if self.machine.kind == 'cpu' else most.device)}"
        if found.setup.backend != "local" and self.setup.backend == "local":
            yield f"Start it with `gkd run SPEC --processes {self.machine.devices}`."
            if found.setup.backend == "gemini":
                yield "Gemini is part of ColossalAI: `gkd doctor` says whether it is installed."
        if self.stored is not None:
            names = " and ".join(f"`{name}`" for name, where in self.stored.setup.placement if where == "cached")
            yield f"With the outputs of {names} stored before the run (`placement = cached`, `gkd cache SPEC`) a step"
            yield f"takes at least {in_seconds(self.stored.seconds)}; to store them takes a forward over all rows."
        if found.cached:
            yield "The teacher's outputs are stored before the run, on a machine where it runs: `gkd cache SPEC`."


def _bound(found: Proposal, machine: Machine) -> str:
    """What bounds a step from below."""
    times = {
        "bound by arithmetic": sum(stage.work.compute_seconds(machine) for stage in found.stages),
        "bound by the link to the host": sum(stage.work.link_seconds(machine) for stage in found.stages),
        "bound by traffic between devices": sum(stage.work.between_seconds(machine) for stage in found.stages),
        "bound by the disk": sum(stage.work.disk_seconds(machine) for stage in found.stages),
    }
    return max(times, key=lambda name: times[name])


def report(name: str, plan: SpecPlan, machine: Machine) -> Report:
    """The plan of a spec on a machine; of one that says `device = cpu`, on its CPU."""
    setup, machine = Setup.of(plan), _used(plan, machine)
    stages = estimate(plan, machine, setup)
    if all(stage.fits(machine) for stage in stages):
        return Report(name, plan, machine, setup, stages)
    found = cheapest(plan, machine, setup)
    stored = with_cache(plan, machine, setup) if found is not None and not found.cached else None
    faster = found is not None and stored is not None and stored.seconds <= found.seconds / 2
    return Report(name, plan, machine, setup, stages, found, stored if faster else None)


def _used(plan: SpecPlan, machine: Machine) -> Machine:
    """What a spec uses of a machine."""
    if machine.kind == "cpu" or dict(plan.runtime).get("device") != "cpu":
        return machine
    compute = COMPUTE["cpu"] if machine.compute == COMPUTE["cuda"] else machine.compute
    return replace(machine, devices=1, device_memory=machine.host_memory, compute=compute, kind="cpu")


def block(plan: SpecPlan, before: Setup, after: Setup) -> str:
    """The runtime block of a setup, and the lines of the stages that differ, as they are written in a spec."""
    lines = []
    if (after.split, after.merge) != (before.split, before.merge):
        for stage in plan.stages:
            rows = stage.stage.batch_size * after.merge // after.split
            micro = stage.stage.accumulate * after.split // after.merge
            lines.append(
                f"# in stage {stage.name}: batch_size = {rows}, accumulate = {micro} (the losses stay the same)"
            )
    lines.append("runtime {")
    lines += [f"  {line}" for line in _settings(plan, after)]
    roles = {node.name: node.role for stage in plan.stages for node in stage.models}
    for name, where in after.placement:
        role = roles.get(name, "model")
        shares = dict(zip(("shard_param_frac", "offload_param_frac"), after.fractions(name), strict=True))
        if where == "gemini" and after.fractions(name) != ALL:
            own = [f"    {key} = {value}" for key, value in shares.items() if value != 1.0]
            lines += [f"  {role} {name} {{", "    placement = gemini", *own, "  }"]
        elif where != "cached":
            lines.append(f"  {role} {name} {{ placement = {where} }}")
        else:
            lines += [f"  {role} {name} {{", "    placement = cached", *_stored(plan, name), "  }"]
    return "\n".join([*lines, "}"])


def _stored(plan: SpecPlan, name: str) -> Iterator[str]:
    """The folder of a model's stored outputs, and what the spec says of how they are kept."""
    given = dict(plan.runtime)
    folder = given.get(f"{name}.cache", "off")
    folder = f"outputs/{name}" if folder in ("off", "auto") else str(folder)
    yield f"    cache = {quoted(folder)}"
    yield from (f"    {key} = {given[f'{name}.{key}']}" for key in ("top_k", "tail") if f"{name}.{key}" in given)


def _settings(plan: SpecPlan, setup: Setup) -> Iterator[str]:
    given = dict(plan.runtime)
    same = setup.backend == given.get("backend", "local")
    if setup.backend != "local":
        yield f"backend = {setup.backend}"
    if setup.half:
        yield f"precision = {setup.precision}"
    if "device" in given:
        yield f"device = {given['device']}"
    if setup.checkpoint:
        yield "checkpoint = true"
    if not setup.fuse:
        yield "fuse_logits = off"
    if setup.backend == "gemini":
        for name, usual in _SHARES.items():
            if getattr(setup, name) != usual:
                yield f"{name} = {getattr(setup, name)}"
        # How chunks are searched for and moved, and how the loss is scaled in fp16, goes on as it is.
        yield from (f"{name} = {_written(given[name])}" for name in _KEPT if same and name in given)


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _stage(stage: StageEstimate, roles: Mapping[str, str], machine: Machine) -> Iterator[str]:
    texts = f"{stage.rows} text{'s' if stage.rows > 1 else ''} of {stage.length:,} tokens"
    micro = f"{stage.micro} micro-batches" if stage.micro > 1 else "one micro-batch"
    yield f"stage {stage.name}: {texts} at once on a device, {micro} in a step"
    yield ""
    rows = [_HEAD, *(_row(model, roles) for model in stage.models)]
    rows += [(name, in_count(count), "all", "resident", "", "", "") for name, count in stage.beside]
    yield from _table(rows)
    if not all(model.exact for model in stage.models):
        yield "  ~ the family has no table: parameters of the usual transformer of these sizes"
    yield ""
    yield f"  peak of a device {in_bytes(stage.device_bytes)}, in {stage.moment}"
    yield f"    {_parts(stage.device)}"
    if stage.host:
        yield f"  peak of the host {in_bytes(stage.host_bytes)}"
        yield f"    {_parts(stage.host)}"
    work = stage.work
    yield f"  a step takes at least {in_seconds(work.seconds(machine))}"
    flops = ", ".join(f"{name} {in_seconds(count / machine.compute)}" for name, count in work.flops)
    yield f"    arithmetic {in_seconds(work.compute_seconds(machine))}: {flops}"
    if work.link:
        moved = ", ".join(f"{name} {in_bytes(count)}" for name, count in work.link)
        yield f"    between host and device {in_seconds(work.link_seconds(machine))}: {moved}"
    if work.between:
        moved = ", ".join(f"{name} {in_bytes(count)}" for name, count in work.between)
        yield f"    between devices {in_seconds(work.between_seconds(machine))}: {moved}"
    if work.disk:
        moved = ", ".join(f"{name} {in_bytes(count)}" for name, count in work.disk)
        yield f"    from the disk {in_seconds(work.disk_seconds(machine))}: {moved}"


def _row(model: Placed, roles: Mapping[str, str]) -> tuple[str, ...]:
    return (
        f"{model.name} ({roles.get(model.name, 'model')})",
        ("" if model.exact else "~") + in_count(model.count),
        in_count(model.trains) if model.trains else "no",
        model.where,
        in_bytes(model.device),
        in_bytes(model.host) if model.host else "",
        in_bytes(model.moved) if model.moved else "",
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    for row in rows:
        cells = [
            row[column].ljust(widths[column]) if column in (0, 3) else row[column].rjust(widths[column])
            for column in shown
        ]
        yield f"  {'  '.join(cells)}".rstrip()


def _parts(parts: Iterable[tuple[str, int]]) -> str:
    found = sorted(parts, key=lambda part: -part[1])
    return ", ".join(f"{_WORDS.get(name, name)} {in_bytes(count)}" for name, count in found)


def _lacks(stages: Iterable[StageEstimate], machine: Machine) -> Iterator[str]:
    for stage in stages:
        if stage.fits(machine):
            continue
        at = f"stage {stage.name} needs"
        if machine.kind == "cpu":
            yield f"{at} {in_bytes(stage.device_bytes + stage.host_bytes)} of {in_bytes(machine.host_memory)}"
            continue
        lacks = []
        if stage.device_bytes > (1 - ROOM) * machine.device_memory:
            lacks.append(f"{in_bytes(stage.device_bytes)} of a device of {in_bytes(machine.device_memory)}")
        if stage.host_bytes > (1 - ROOM) * machine.host_memory:
            lacks.append(f"{in_bytes(stage.host_bytes)} of a host of {in_bytes(machine.host_memory)}")
        yield f"{at} {' and '.join(lacks)}, of which {ROOM:.0%} is kept free"
