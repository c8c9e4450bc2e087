"""What a spec does, stage by stage, as data: objective, weights over time, layer map, what counts, forwards, memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx

from gkd_dsl import schedules
from gkd_dsl.graph import access
from gkd_dsl.graph.explain_words import (
    change_words,
    condition_words,
    counted_words,
    forward_words,
    number,
    optim_words,
    pass_words,
    source_words,
    tap_words,
    through,
)
from gkd_dsl.graph.families import indices
from gkd_dsl.graph.nodes import BatchNode, LossNode, ModelNode, OpNode, ProjectNode, StageNode, TapNode, TrainTarget
from gkd_dsl.graph.passes import compile_plan, liveness, run_passes
from gkd_dsl.graph.passes.fuse import fuse, fusions, logit_groups
from gkd_dsl.graph.passes.share import share
from gkd_dsl.graph.placed import as_placed
from gkd_dsl.graph.plan import Counted, ForwardPlan, StagePlan
from gkd_dsl.models import resolve
from gkd_dsl.models.errors import ModelError, TapError
from gkd_dsl.models.lora import full_modules
from gkd_dsl.ops import registry
from gkd_dsl.schedules import Clock, Schedule

if TYPE_CHECKING:
    from rich.console import Console

_MOST_ROWS = 3
_SIZES = ("H", "N", "A", "V", "C")
_POINTS = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class WeightRow:
    """A number of the objective over the stage: `values[i]` at `points[i]` of the stage, none if it is constant."""

    name: str
    schedule: str
    constant: bool
    values: tuple[float, ...]


@dataclass(frozen=True)
class TermRow:
    """An operator of a loss: what one value stands for, which positions count, and what divides the sum."""

    op: str
    times: int
    coefficient: str
    shape: str
    position: str
    counts: str
    denominator: str


@dataclass(frozen=True)
class LossRow:
    """A named loss of the objective, as the user wrote it, and its terms. `computed`: its weight is not 0."""

    name: str
    weight: str
    text: str
    computed: bool
    terms: tuple[TermRow, ...]


@dataclass(frozen=True)
class MapRow:
    """A tap of the student and the tap of the teacher that it meets in an operator of a loss."""

    loss: str
    op: str
    student: str
    student_through: str
    student_shape: str
    teacher: str
    teacher_through: str
    teacher_shape: str


@dataclass(frozen=True)
class ForwardRow:
    """One forward of a step. `taps` are read from it by `hooks` hooks; `logits` needs none.

    `name` is its model's, or that of the pass; `changes` say what a pass does beside the plain forward.
    """

    model: str
    gradient: bool
    extent: str
    taps: tuple[str, ...]
    hooks: int
    name: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PolicyRow:
    """A policy that chooses in the objective. `reward` is as the user wrote it; the rest is that of its node."""

    name: str
    actions: int
    features: int
    hidden: int
    reward: str
    optim: str


@dataclass(frozen=True)
class CounterRow:
    """A counter that the stage reads: it goes up by one after a step in which `when` holds, by watching losses."""

    name: str
    start: int
    stop: int
    when: str
    watches: tuple[str, ...]


@dataclass(frozen=True)
class FusedRow:
    """Losses that are run with the heads of these models, whose logits are never whole."""

    losses: tuple[str, ...]
    models: tuple[str, ...]


@dataclass(frozen=True)
class StageExplanation:
    """One stage. `live_bytes` is the most that taps and results of operators hold at once, in fp32."""

    name: str
    duration: str
    steps: int
    points: tuple[int, ...]
    objective: str
    losses: tuple[LossRow, ...]
    weights: tuple[WeightRow, ...]
    layer_map: tuple[MapRow, ...]
    forwards: tuple[ForwardRow, ...]
    shared: tuple[str, ...]
    same_logits: tuple[tuple[str, ...], ...]
    trains: tuple[str, ...]
    metrics: tuple[str, ...]
    source: str
    columns: tuple[str, ...]
    optim: str
    batch: int
    accumulate: int
    length: int
    live_bytes: int
    fused: tuple[FusedRow, ...] = ()
    policies: tuple[PolicyRow, ...] = ()
    counters: tuple[CounterRow, ...] = ()


@dataclass(frozen=True)
class ModelRow:
    """A model of the spec and what a run does with it. `stages` are those that run it."""

    name: str
    role: str
    location: str
    sizes: str
    use: str
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """A whole spec."""

    models: tuple[ModelRow, ...]
    stages: tuple[StageExplanation, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def explain(
    graph: nx.MultiDiGraph,
    *,
    total_steps: int = 1000,
    batch: int | None = None,
    length: int = 128,
    runtime: tuple = (),
) -> Explanation:
    """What the graph of a checked spec does. `runtime` are its settings.

    `total_steps` is the length of a stage whose duration is not in steps. Memory is for `batch` texts (the
    stage's batch size where it is None) of `length` tokens, or of the stage's own `max_length` if that is less.
    Raises GraphError for a graph that breaks its rules.
    """
    plan = compile_plan(graph, runtime=runtime)
    optimised = run_passes(graph)
    merged = _merged(graph)
    stages = tuple(
        _stage(graph, optimised, merged, stage, runtime, total_steps=total_steps, batch=batch, length=length)
        for stage in plan.stages
    )
    return Explanation(_models(graph, plan.stages), stages)


def render(explanation: Explanation, console: Console) -> None:
    """Print an explanation with rich: tables and headings, plain text where the console is no terminal."""
    from gkd_dsl.graph.explain_text import render as render_text

    render_text(explanation, console)


def _stage(
    graph: nx.MultiDiGraph,
    optimised: nx.MultiDiGraph,
    merged: dict[str, int],
    plan: StagePlan,
    runtime: tuple,
    *,
    total_steps: int,
    batch: int | None,
    length: int,
) -> StageExplanation:
    stage = plan.stage
    steps = max(1, round(stage.duration.amount)) if stage.duration.unit == "steps" else total_steps
    texts = batch or stage.batch_size
    limit = _limit(stage)
    tokens = min(length, limit) if limit else length
    original = access.node(graph, stage.key)
    assert isinstance(original, StageNode)
    points = tuple(sorted({0, min(1, steps - 1), *(min(steps - 1, round(steps * p)) for p in _POINTS)}))
    losses = tuple(_losses(graph, original, plan, optimised))
    placed, there = as_placed(plan, runtime)
    run = fuse(placed, there)
    clocks = tuple(_clock(stage, step, steps, texts * tokens * stage.accumulate) for step in points)
    return StageExplanation(
        name=stage.name,
        duration=str(stage.duration),
        steps=steps,
        points=points,
        objective=_objective(original, [row.name for row in losses]),
        losses=losses,
        weights=tuple(_weights(plan, clocks)),
        layer_map=tuple(_layer_map(optimised, plan)),
        forwards=tuple(_forward(graph, plan, forward) for forward in plan.forwards),
        shared=tuple(_shared(optimised, plan, merged)),
        same_logits=tuple(
            tuple(dict.fromkeys(name for key in group for name in _losses_of(plan, key)))
            for group in logit_groups(plan.program)
        ),
        trains=tuple(_trains(plan)),
        metrics=tuple(metric.metric.name for metric in plan.metrics),
        source=source_words(stage.source),
        columns=plan.columns,
        optim=optim_words(stage.optim),
        batch=texts,
        accumulate=stage.accumulate,
        length=tokens,
        live_bytes=liveness.estimate(run.program, run.forwards, texts, tokens),
        fused=tuple(
            FusedRow(
                tuple(dict.fromkeys(name for term in group.terms for name in _losses_of(plan, term.key))),
                tuple(dict.fromkeys(head.model for head in (group.student, *group.teachers))),
            )
            for group in fusions(placed, there)
        ),
        policies=tuple(_policies(graph, plan)),
        counters=tuple(CounterRow(c.name, c.start, c.stop, condition_words(c.when), c.losses) for c in plan.counters),
    )


def _limit(stage: StageNode) -> int | None:
    if stage.max_length is not None:
        return stage.max_length
    found = stage.source.arg("max_length") if stage.source else None
    return found if isinstance(found, int) else None


def _clock(stage: StageNode, step: int, steps: int, tokens: int) -> Clock:
    """The clock at a step of a stage, as long as its duration says."""
    epochs = stage.duration.amount if stage.duration.unit == "epochs" else 1.0
    by_tokens = stage.duration.unit == "tokens"
    seen = round(step * stage.duration.amount / steps) if by_tokens else step * tokens
    return Clock(step, steps, steps / epochs, seen, seed=stage.seed)


def _objective(stage: StageNode, names: list[str]) -> str:
    terms = []
    for weight, name in zip(stage.weights, names, strict=True):
        terms.append(name if weight == schedules.Constant(1.0) else f"{_weight(weight)} * {name}")
    return " + ".join(terms) or "0"


def _weight(weight: Schedule) -> str:
    return number(weight.amount) if isinstance(weight, schedules.Constant) else str(weight)


def _losses(graph: nx.MultiDiGraph, stage: StageNode, plan: StagePlan, optimised: nx.MultiDiGraph) -> Iterable[LossRow]:
    counted = {entry.key: entry for entry in plan.counted}
    kept = {loss.name: loss for loss in plan.losses}
    slots = access.inputs(graph, stage.key)
    for place, weight in enumerate(stage.weights):
        node = access.node(graph, slots[str(place)])
        assert isinstance(node, LossNode)
        computed = not schedules.is_zero(weight) and node.name in kept
        terms = _terms(optimised, plan, kept[node.name].parts, counted) if computed else ()
        yield LossRow(node.name, _weight(weight), node.text, computed, tuple(terms))


def _terms(
    graph: nx.MultiDiGraph,
    plan: StagePlan,
    parts: tuple[tuple[Schedule, str], ...],
    counted: dict[str, Counted],
) -> list[TermRow]:
    found: dict[tuple[str, ...], int] = {}
    for coefficient, key in parts:
        node = access.node(graph, key)
        assert isinstance(node, OpNode)
        spec = registry.lookup(node.op)
        entry = counted[key]
        counts, denominator = counted_words(graph, entry)
        position = spec.positions if spec else ""
        row = (node.op, _weight(coefficient), str(node.type), position, counts, denominator)
        found[row] = found.get(row, 0) + 1
    return [TermRow(op, times, *rest) for (op, *rest), times in found.items()]


def _weights(plan: StagePlan, clocks: tuple[Clock, ...]) -> Iterable[WeightRow]:
    def row(name: str, schedule: Schedule) -> WeightRow:
        if isinstance(schedule, schedules.Constant):
            return WeightRow(name, number(schedule.amount), True, ())
        # What a counter decides is not known before the run.
        known = () if schedules.counters(schedule) else clocks
        return WeightRow(name, str(schedule), False, tuple(schedule.value(clock) for clock in known))

    seen: set[tuple[str, Schedule]] = set()
    for weight, loss in zip(plan.weights, plan.losses, strict=True):
        yield row(loss.name, weight)
        moving = [by for by, _ in loss.parts if not isinstance(by, schedules.Constant)]
        distinct = tuple(dict.fromkeys(moving))
        if len(distinct) > _MOST_ROWS:
            known = () if any(schedules.counters(by) for by in distinct) else clocks
            values = tuple(sum(by.value(clock) for by in moving) for clock in known)
            yield WeightRow(f"{loss.name}, sum over {len(moving)} terms", _kinds(distinct), False, values)
            continue
        for by in distinct:
            yield row(f"{loss.name}, {moving.count(by)} of {len(loss.parts)} terms", by)
    for step in plan.program:
        if isinstance(step, liveness.Apply):
            for name, value in step.attrs:
                label = f"{name} of {step.op}"
                if (
                    isinstance(value, Schedule)
                    and not isinstance(value, schedules.Constant)
                    and (label, value) not in seen
                ):
                    seen.add((label, value))
                    yield row(label, value)


def _kinds(found: tuple[Schedule, ...]) -> str:
    """Many schedules in a few words."""
    drawn = {(by.every, by.seed) for by in found if isinstance(by, schedules.InDrawnMap)}
    if len(drawn) == 1 and all(isinstance(by, schedules.InDrawnMap) for by in found):
        every, seed = drawn.pop()
        return f"pairs drawn every {schedules.Span(every, 'epochs')}, seed = {seed}"
    return "a schedule for each"


def _layer_map(graph: nx.MultiDiGraph, plan: StagePlan) -> Iterable[MapRow]:
    for loss in plan.losses:
        rows = []
        for _, key in loss.parts:
            node = access.node(graph, key)
            slots = access.inputs(graph, key)
            if not isinstance(node, OpNode) or not {"student", "teacher"} <= set(slots):
                continue
            (left, left_ops), (right, right_ops) = _taps(graph, slots["student"]), _taps(graph, slots["teacher"])
            if left and right:
                rows.append(
                    MapRow(
                        loss.name,
                        node.op,
                        _named(left),
                        through(left_ops),
                        _shape(graph, slots["student"]),
                        _named(right),
                        through(right_ops),
                        _shape(graph, slots["teacher"]),
                    )
                )
        yield from dict.fromkeys(rows)


def _taps(graph: nx.MultiDiGraph, key: str) -> tuple[list[TapNode], list[str]]:
    """The taps that a tensor is made of, and the operators on the way, from the tap on."""
    taps: dict[str, TapNode] = {}
    ops: list[str] = []
    waiting, seen = [key], set()
    while waiting:
        here = waiting.pop(0)
        if here in seen:
            continue
        seen.add(here)
        node = access.node(graph, here)
        if isinstance(node, TapNode):
            taps[here] = node
        elif isinstance(node, OpNode):
            slots = access.inputs(graph, here)
            if node.op == "project":
                ops.append(slots["block"].removeprefix("project/"))
            elif node.op != "detach":
                ops.append(node.op)
            waiting += [source for slot, source in slots.items() if slot not in ("valid", "block")]
    return sorted(taps.values(), key=lambda tap: access.natural(tap.key)), ops[::-1]


def _named(taps: list[TapNode]) -> str:
    return ", ".join(tap_words(tap) for tap in taps)


def _shape(graph: nx.MultiDiGraph, key: str) -> str:
    node = access.node(graph, key)
    assert isinstance(node, TapNode | OpNode | BatchNode)
    return f"[{', '.join(dim.short for dim in node.type.dims)}]"


def _forward(graph: nx.MultiDiGraph, plan: StagePlan, forward: ForwardPlan) -> ForwardRow:
    info = next(model.info for model in plan.models if model.name == forward.model)
    places = set()
    for tap in forward.taps:
        try:
            hook = resolve.hook(info, tap.path)
        except (TapError, ModelError):
            continue
        # Scores and probs of a layer come of one call of its attention function.
        places.add((hook.module, "attention" if hook.side in ("scores", "probs") else hook.side))
    grouped: dict[tuple[str, str | None, str | None], list[int]] = {}
    for tap in forward.taps:
        grouped.setdefault((tap.path.kind, tap.path.part, tap.path.name), []).append(
            -1 if tap.path.index is None else tap.path.index
        )
    names = []
    for (kind, part, name), numbers in grouped.items():
        text = kind if name is None else f'{kind}("{name}")'
        if numbers != [-1]:
            text += f"[{indices(numbers)}]"
        names.append(f"{text}.{part}" if part else text)
    return ForwardRow(
        forward.model,
        forward.grad,
        forward_words(forward, info.size("N")),
        tuple(names),
        len(places),
        pass_words(forward.key.removesuffix("/forward"), forward.model),
        change_words(graph, forward),
    )


def _losses_of(plan: StagePlan, key: str) -> list[str]:
    return [loss.name for loss in plan.losses if any(part == key for _, part in loss.parts)]


def _shared(graph: nx.MultiDiGraph, plan: StagePlan, merged: dict[str, int]) -> Iterable[str]:
    """Tensors that serve several losses, and operators that were written more than once."""
    readers: dict[str, list[str]] = {}
    for loss in plan.losses:
        for key in {tap.key for _, part in loss.parts for tap in _taps(graph, part)[0]}:
            readers.setdefault(key, []).append(loss.name)
    for key in sorted(readers, key=access.natural):
        names = list(dict.fromkeys(readers[key]))
        if len(names) > 1:
            tap = access.node(graph, key)
            assert isinstance(tap, TapNode)
            yield f"{tap_words(tap)} serves {len(names)} losses: {', '.join(names)}"
    here = {step.key: step.op for step in (*plan.valid_program, *plan.program) if isinstance(step, liveness.Apply)}
    counts: dict[str, list[int]] = {}
    for key, op in here.items():
        if merged.get(key, 1) > 1:
            counts.setdefault(op, []).append(merged[key])
    for op, times in sorted(counts.items()):
        yield f"{op}: written {sum(times)} times, computed {'once' if len(times) == 1 else f'{len(times)} times'}"


def _merged(graph: nx.MultiDiGraph) -> dict[str, int]:
    """For each operator that `share` leaves, in how many places it was written."""
    return {
        key: max(1, len(set(data["node"].locations)))
        for key, data in share(graph).nodes(data=True)
        if isinstance(data["node"], OpNode) and data["node"].op != "detach"
    }


def _policies(graph: nx.MultiDiGraph, plan: StagePlan) -> Iterable[PolicyRow]:
    for policy in plan.policies:
        node = policy.node
        reward = access.node(graph, f"loss/{policy.reward}")
        assert isinstance(reward, LossNode)
        yield PolicyRow(node.name, node.actions, node.features, node.hidden, reward.text, optim_words(node.optim))


def _trains(plan: StagePlan) -> Iterable[str]:
    blocks = {block.name: block for block in plan.projections}
    for target in plan.stage.trains:
        if target.kind == "model":
            yield _part(plan, target) if target.part else f"{target.name} ({_all_of(plan, target.name)})"
        else:
            yield _block(target.name, blocks.get(target.name))


def _part(plan: StagePlan, target: TrainTarget) -> str:
    """A part of a model as a spec names it; what has no name there by its modules."""
    info = next((model.info for model in plan.models if model.name == target.name), None)
    if target.part != "rest" or info is None:
        return f"{target.name}.{target.part}"
    return ", ".join(f'{target.name}.module("{module}")' for module in resolve.part_modules(info, "rest"))


def _all_of(plan: StagePlan, name: str) -> str:
    """What trains of a model where all of it does: with adapters these, and the modules that train whole."""
    info = next((model.info for model in plan.models if model.name == name), None)
    if info is None or info.build.lora is None:
        return "the whole model"
    return ", ".join(("its adapters", *full_modules(info)))


def _block(name: str, block: ProjectNode | None) -> str:
    if block is None:
        return f"{name} (projection)"
    size = block.in_features * block.out_features + (block.out_features if block.bias else 0)
    return f"{name} (projection {block.in_features} -> {block.out_features}, {size:,} parameters)"


def _models(graph: nx.MultiDiGraph, stages: tuple[StagePlan, ...]) -> tuple[ModelRow, ...]:
    needed = {model.name: model for stage in stages for model in stage.models}
    rows = []
    for model in access.nodes(graph, ModelNode):
        used = tuple(stage.name for stage in stages if any(found.name == model.name for found in stage.models))
        made = [name for name, found in needed.items() if found.info.build.base == model.name]
        if model.name in needed:
            use = _made(model)
        elif made:
            use = f"read to make {', '.join(made)}, never run"
        else:
            use = "not loaded: nothing reads it"
        known = dict(model.info.sizes)
        shown = [name for name in known if name in _SIZES or (name == "KV" and known["KV"] != known.get("A"))]
        sizes = ", ".join(f"{name} {known[name]}" for name in shown)
        rows.append(ModelRow(model.name, model.role, model.info.location, sizes, use, used))
    return tuple(rows)


def _made(model: ModelNode) -> str:
    kept = model.info.build.kept
    part = f", keeping {kept.count:,} of {kept.full:,} ids" if kept is not None else ""
    held = model.info.build.lora
    adapter = f", with LoRA of rank {held.r} on {', '.join(held.targets)}" if held is not None else ""
    return _way(model) + part + adapter


def _way(model: ModelNode) -> str:
    build = model.info.build
    if build.kind == "random":
        return "made from its config, with random weights"
    if build.kind == "truncated":
        layers = f" {indices(build.layers)}" if build.layers else ""
        return f"layers{layers} of {build.base}"
    if build.kind == "headed":
        return f"body of {build.base}, new head"
    if build.kind == "stored":
        return "never loaded: its outputs are stored"
    found = model.info.quantised
    return f"loaded, quantised by {found}" if found is not None else "loaded"
