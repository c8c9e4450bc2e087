"""What a method costs: the forwards, taps and trained parts of each of its stages, read from its compiled plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from gkd_dsl.fitting import fitting
from gkd_dsl.graph.access import natural
from gkd_dsl.graph.families import family_name, indices, masked
from gkd_dsl.graph.nodes import ReplaceBlock, SwapTap
from gkd_dsl.graph.plan import ForwardPlan, StagePlan
from gkd_dsl.models.taps import TapPath
from gkd_dsl.planning import parameters


@dataclass(frozen=True)
class ForwardCost:
    """One forward of a step: of `model`, as the pass `name`; how many of its blocks run (of how many).

    `taps` counts the tensors taken from it by kind, `paths` are their names, `changes` says what flows otherwise in it.
    """

    name: str
    model: str
    trains: bool
    blocks: int
    of: int
    taps: tuple[tuple[str, int], ...]
    paths: tuple[str, ...]
    changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        run = "whole" if self.blocks == self.of else f"{self.blocks} of {self.of} blocks"
        what = "" if self.name == self.model else f", a pass of {self.model}"
        way = "forward and backward" if self.trains else "forward"
        notes = ", ".join((way, run, *self.changes))
        return f"{self.name}{what} ({notes}): {', '.join(self.paths) or 'no tap'}"


@dataclass(frozen=True)
class Beside:
    """Something that trains beside the student; `parameters` is None for a model."""

    kind: str
    name: str
    parameters: int | None

    def __str__(self) -> str:
        if self.parameters is None:
            return f"{self.kind} {self.name}"
        return f"{self.kind} {self.name}, {self.parameters:,} parameters"


@dataclass(frozen=True)
class StageCost:
    """What a stage runs in a step, over the specimens; `beside` trains with the student (or in its place)."""

    stage: str
    forwards: tuple[ForwardCost, ...]
    beside: tuple[Beside, ...]
    student: bool

    @property
    def projected(self) -> int:
        """The parameters of its projections."""
        return sum(part.parameters or 0 for part in self.beside if part.kind == "projection")

    @property
    def extra(self) -> int:
        """How many forwards more than fine-tuning a model takes."""
        return len(self.forwards) - 1

    @property
    def words(self) -> str:
        """The number of forwards, in a line."""
        count = len(self.forwards)
        backward = sum(forward.trains for forward in self.forwards)
        more = f", {self.extra} more than fine-tuning" if self.extra else ""
        return f"{count} forward{'s' if count != 1 else ''}{more}; {backward} with a backward"

    @property
    def grouped(self) -> tuple[Beside, ...]:
        """What trains beside the student, projections that differ by a number as one: `U[0..4]`."""
        groups: dict[tuple[str, str], list[Beside]] = {}
        for part in self.beside:
            groups.setdefault((part.kind, masked(part.name)), []).append(part)
        found = []
        for (kind, _), parts in groups.items():
            sizes = [part.parameters for part in parts if part.parameters is not None]
            name = family_name(sorted((part.name for part in parts), key=natural))
            words = kind if len(parts) == 1 else f"{kind}s"
            found.append(Beside(words, name, sum(sizes) if sizes else None))
        return tuple(found)


@lru_cache(maxsize=64)
def costs(name: str) -> tuple[StageCost, ...]:
    """What each stage of a method runs in a step, over the first specimens that suit it.

    Raises KeyError for a name that is not in the library.
    """
    plan = fitting(name).plan
    return tuple(_cost(stage) for stage in plan.stages) if plan is not None else ()


def stage_costs(name: str) -> list[tuple[str, StageCost]]:
    """The costs by the names of the stages; of stages that differ in their number the dearest stands for all."""
    grouped: dict[str, list[StageCost]] = {}
    for cost in costs(name):
        grouped.setdefault(_stem(cost.stage), []).append(cost)
    found = []
    for stem, members in grouped.items():
        if len(members) == 1:
            found.append((members[0].stage, members[0]))
        else:
            dearest = max(members, key=lambda cost: (len(cost.forwards), sum(f.blocks for f in cost.forwards)))
            found.append((f"{stem}, {len(members)} stages; here {dearest.stage}", dearest))
    return found


def _stem(name: str) -> str:
    head, dot, number = name.rpartition(".")
    return head if dot and number.isdigit() else name


def _cost(stage: StagePlan) -> StageCost:
    layers = {node.name: node.info.size("N") or 0 for node in stage.models}
    roles = {node.name: node.role for node in stage.models}
    beside = [Beside("projection", node.name, parameters.projection(node)) for node in stage.projections]
    beside += [Beside("policy", policy.node.name, parameters.policy(policy.node)) for policy in stage.policies]
    trained = dict.fromkeys(target.name for target in stage.stage.trains if target.kind == "model")
    beside += [Beside(roles.get(name, "model"), name, None) for name in trained if roles.get(name) != "student"]
    return StageCost(
        stage.name.partition(".")[2] or stage.name,
        tuple(_forward_cost(forward, layers[forward.model]) for forward in stage.forwards),
        tuple(Beside(part.kind, part.name.removeprefix("m/"), part.parameters) for part in beside),
        any(roles.get(name) == "student" for name in trained),
    )


def _forward_cost(forward: ForwardPlan, layers: int) -> ForwardCost:
    stop = forward.stop_after
    blocks = layers
    if stop is not None and stop.kind in ("embed", "hidden", "layer"):
        index = stop.index or 0
        blocks = index + 1 if stop.kind == "layer" else index
    kinds = Counter(tap.path.part if tap.path.part else tap.path.kind for tap in forward.taps)
    name = forward.key.removesuffix("/forward").removeprefix("pass/").removeprefix("m/")
    return ForwardCost(
        name,
        forward.model,
        forward.grad,
        blocks,
        layers,
        tuple(kinds.items()),
        tap_names(tap.path for tap in forward.taps),
        _changes(forward),
    )


def _changes(forward: ForwardPlan) -> tuple[str, ...]:
    """What a pass changes, in words."""
    replaced: dict[str, list[int]] = {}
    swapped: list[TapPath] = []
    added: list[TapPath] = []
    for change in forward.changes:
        if isinstance(change, ReplaceBlock):
            replaced.setdefault(change.model, []).append(change.index)
        elif isinstance(change, SwapTap):
            swapped.append(change.path)
        else:
            added.append(change.path)
    words = [f"blocks {indices(found)} replaced by those of {model}" for model, found in replaced.items()]
    words += [f"{', '.join(tap_names(swapped))} swapped"] if swapped else []
    words += [f"{', '.join(tap_names(added))} added to"] if added else []
    inputs = sorted({column for column, _ in forward.inputs})
    return (*words, *([f"{', '.join(inputs)} of its own"] if inputs else []))


def tap_names(paths: Iterable[TapPath]) -> tuple[str, ...]:
    """Taps with the indices of layers in one bracket: `layer[0..5].attn.scores`."""
    grouped: dict[tuple[str, str | None, str | None], list[int]] = {}
    for path in paths:
        grouped.setdefault((path.kind, path.part, path.name), []).append(-1 if path.index is None else path.index)
    names = []
    for (kind, part, name), numbers in grouped.items():
        text = kind if name is None else f'{kind}("{name}")'
        if numbers != [-1]:
            text += f"[{indices(numbers)}]"
        names.append(f"{text}.{part}" if part else text)
    return tuple(names)
