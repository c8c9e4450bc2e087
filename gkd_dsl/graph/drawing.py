"""What a drawing of a graph shows, before it is written as Mermaid, DOT or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx

from gkd_dsl.graph.access import ancestors, inputs, natural, nodes
from gkd_dsl.graph.families import families, family_name, indices
from gkd_dsl.graph.nodes import (
    AddToTap,
    BatchNode,
    CounterNode,
    ForwardNode,
    GraphNode,
    LossNode,
    MetricNode,
    ModelNode,
    OpNode,
    PolicyNode,
    ProjectNode,
    ReplaceBlock,
    StageNode,
    SwapTap,
    TapNode,
)
from gkd_dsl.graph.passes.liveness import from_batch
from gkd_dsl.schedules import Constant, Schedule

Shape = Literal["forward", "tap", "op", "project", "policy", "batch", "loss", "metric", "counter", "stage"]
Tone = Literal["frozen", "trained", "plain"]

MOST_ALONE = 3
"""Families of more nodes than this are drawn as one box."""


@dataclass(frozen=True)
class Box:
    """One node, or a family of `count` nodes. `group` is the key of its frame ("" for none)."""

    key: str
    lines: tuple[str, ...]
    shape: Shape
    tone: Tone
    group: str
    count: int = 1


@dataclass(frozen=True)
class Arrow:
    """From producer to consumer. `detached`: no gradient goes back along it."""

    source: str
    target: str
    label: str
    detached: bool = False


@dataclass(frozen=True)
class Group:
    """A frame around boxes: a model or a stage."""

    key: str
    title: str
    kind: Literal["model", "stage", "blocks", "batch"]
    tone: Tone


@dataclass(frozen=True)
class Drawing:
    """Boxes, arrows and frames; `note` says what is left out."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    groups: tuple[Group, ...]
    note: str = ""


def drawing(graph: nx.MultiDiGraph, *, stage: str | None = None, most: int = 60) -> Drawing:
    """The drawing of a graph, or of one stage.

    Masks, the columns that only models read, and `detach` are not boxes: a detached arrow is drawn differently.
    Families of more than three equal nodes are one box. Where more than `most` boxes remain, all operators of a
    name and all taps of a model are drawn as one each; what is still too much is cut, and `note` says so.
    Raises KeyError for a stage that is not there.
    """
    stages = [node for node in nodes(graph, StageNode) if stage is None or node.name == stage]
    if stage is not None:
        if not stages:
            raise KeyError(stage)
        graph = graph.subgraph(ancestors(graph, [node.key for node in stages])).copy()
    trained = {(str(target.kind), target.name) for node in stages for target in node.trains}
    view, detached = _reduced(graph)
    groups_of_boxes = families(view)
    members = [group for group in groups_of_boxes if len(group) > MOST_ALONE]
    members += [[key] for group in groups_of_boxes if len(group) <= MOST_ALONE for key in group]
    note = ""
    if len(members) > most:
        members = _coarse(view, members)
        note = "operators of one name and taps of one model are drawn together"
    members.sort(key=lambda group: natural(group[0]))
    if len(members) > most:
        ranked = sorted(members, key=lambda group: (_importance(view.nodes[group[0]]["node"]), natural(group[0])))
        note = f"{note}; {len(members) - most} of {len(members)} boxes are left out"
        members = sorted(ranked[:most], key=lambda group: natural(group[0]))
    home = _homes(view)
    boxes = tuple(_box(view, group, home, trained) for group in members)
    return Drawing(boxes, _arrows(view, members, detached), _groups(view, boxes, trained, stages), note)


def _reduced(graph: nx.MultiDiGraph) -> tuple[nx.MultiDiGraph, set[tuple[str, str]]]:
    """The graph without what is not drawn, and its edges along which no gradient flows."""
    view = graph.copy()
    detached: set[tuple[str, str]] = set()
    for key in sorted(from_batch(graph), key=natural):
        node = graph.nodes[key]["node"]
        if isinstance(node, OpNode):
            view.remove_node(key)
    for op in nodes(view, OpNode):
        if op.op != "detach":
            continue
        for source in list(view.predecessors(op.key)):
            for _, target, slot in list(view.out_edges(op.key, data="slot")):
                view.add_edge(source, target, slot=slot)
                detached.add((source, target))
        view.remove_node(op.key)
    for model in nodes(view, ModelNode):
        view.remove_node(model.key)
    for column in nodes(view, BatchNode):
        for target in list(view.successors(column.key)):
            if isinstance(view.nodes[target]["node"], ForwardNode):
                view.remove_edges_from([(column.key, target, k) for k in list(view[column.key][target])])
        if view.out_degree(column.key) == 0:
            view.remove_node(column.key)
    return view, detached


def _coarse(view: nx.MultiDiGraph, members: list[list[str]]) -> list[list[str]]:
    """Groups by what a node is called, whatever it is joined to."""
    found: dict[object, list[str]] = {}
    for group in members:
        node = view.nodes[group[0]]["node"]
        if isinstance(node, TapNode):
            name: object = ("tap", node.model, node.path.kind, node.path.part)
        elif isinstance(node, OpNode):
            name = ("op", node.op)
        else:
            name = group[0]
        found.setdefault(name, []).extend(group)
    return [sorted(group, key=natural) for group in found.values()]


def _importance(node: GraphNode) -> int:
    order = (
        StageNode,
        LossNode,
        ForwardNode,
        TapNode,
        OpNode,
        ProjectNode,
        PolicyNode,
        MetricNode,
        CounterNode,
        BatchNode,
    )
    return next(place for place, kind in enumerate(order) if isinstance(node, kind))


def _homes(view: nx.MultiDiGraph) -> dict[str, str]:
    """The frame of each node: its model; the one stage that reads a loss or a metric."""
    home: dict[str, str] = {}
    for key, data in view.nodes(data=True):
        node = data["node"]
        if isinstance(node, ForwardNode | TapNode):
            home[key] = f"model/{node.model}"
        elif isinstance(node, ProjectNode | PolicyNode):
            home[key] = "blocks"
        elif isinstance(node, BatchNode):
            home[key] = "batch"
        elif isinstance(node, StageNode):
            home[key] = key
        elif isinstance(node, LossNode | MetricNode | CounterNode):
            users = {user for user in view.successors(key) if isinstance(view.nodes[user]["node"], StageNode)}
            home[key] = users.pop() if len(users) == 1 else ""
    return home


def shape(type_: object) -> str:
    """The axes of a type: `[B, L, 312]`."""
    dims = getattr(type_, "dims", None)
    return "" if dims is None else f"[{', '.join(dim.short for dim in dims)}]"


def _box(view: nx.MultiDiGraph, group: Sequence[str], home: dict[str, str], trained: set[tuple[str, str]]) -> Box:
    found = [view.nodes[key]["node"] for key in group]
    first, count = found[0], len(found)
    times = f" x{count}" if count > 1 else ""
    frame = home.get(group[0], "")
    if len({home.get(key, "") for key in group}) > 1:
        frame = ""
    tone: Tone = "plain"
    lines: tuple[str, ...]
    kind: Shape
    match first:
        case ForwardNode():
            kind, lines = "forward", _pass(first)
            tone = _learns(first.model, trained)
        case TapNode():
            kind, lines = "tap", (tap_name([tap.path for tap in found]) + times, *_shape(found))
            tone = _learns(first.model, trained)
        case ProjectNode():
            name = family_name([node.name for node in found]) + times
            kind, lines = "project", (name, f"{first.in_features} -> {first.out_features}")
            tone = "trained" if ("project", first.name) in trained else "frozen"
        case PolicyNode():
            actions = f"{first.features} -> 1, for each of {first.actions} actions"
            kind, lines, tone = "policy", (f"policy {first.name}", actions), "trained"
        case BatchNode():
            kind, lines = "batch", (first.column, shape(first.type))
        case LossNode():
            kind, lines = "loss", (f"loss {family_name([node.name for node in found])}{times}",)
        case MetricNode():
            kind, lines = "metric", (f"metric {family_name([node.name for node in found])}{times}",)
        case CounterNode():
            kind, lines = "counter", (f"counter {first.name}", f"{first.start} to {first.stop}")
        case StageNode():
            name = family_name([node.name for node in found]) + times
            kind, lines = "stage", (f"stage {name}", f"for {first.duration}")
        case OpNode():
            name = first.op.rsplit(":", 1)[-1] + times
            kind, lines = "op", (name, *_options(found), *_shape(found))
        case _:
            raise AssertionError(first)
    return Box(group[0], lines, kind, tone, frame, count)


def _pass(forward: ForwardNode) -> tuple[str, ...]:
    """A forward by its name, and what a pass changes."""
    name = forward.key.removesuffix("/forward")
    if name == forward.model:
        return ("forward",)
    blocks = [change.index for change in forward.changes if isinstance(change, ReplaceBlock)]
    lenders = list(dict.fromkeys(c.model for c in forward.changes if isinstance(c, ReplaceBlock)))
    swapped = [change.path for change in forward.changes if isinstance(change, SwapTap)]
    added = [change.path for change in forward.changes if isinstance(change, AddToTap)]
    lines = [f"pass {name}"]
    lines += ["over other samples"] if forward.shift else []
    lines += [f"layer[{indices(blocks)}] from {', '.join(lenders)}"] if blocks else []
    lines += [f"swaps {tap_name(swapped)}"] if swapped else []
    lines += [f"adds to {tap_name(added)}"] if added else []
    return (*lines, "gradient only") if forward.discard else tuple(lines)


def _learns(model: str, trained: set[tuple[str, str]]) -> Tone:
    return "trained" if ("model", model) in trained else "frozen"


def _shape(found: Sequence[TapNode | OpNode]) -> tuple[str, ...]:
    """The shape of a family, where all of it have one."""
    shapes = {shape(node.type) for node in found}
    return tuple(shapes) if len(shapes) == 1 else ()


def tap_name(paths: Sequence) -> str:
    """`layer[0..11].attn.scores` for taps that differ by their index."""
    first = paths[0]
    if len(paths) == 1:
        return str(first)
    if first.index is None:
        return family_name([str(path) for path in paths])
    middle = f"{first.kind}[{indices([path.index for path in paths])}]"
    return f"{middle}.{first.part}" if first.part else middle


_SHOWN = ("temperature", "beta", "heads", "label_smoothing", "align")
_UNREMARKABLE = {"temperature": 1.0, "align": "exact", "label_smoothing": 0.0}


def _options(found: Sequence[OpNode]) -> tuple[str, ...]:
    """The options of an operator that change what it is, where all of a family agree."""
    shown = []
    for name in _SHOWN:
        values = {str(node.attr(name)) for node in found}
        value = found[0].attr(name)
        if len(values) == 1 and value is not None and value != _UNREMARKABLE.get(name):
            shown.append(f"{name} = {value}")
    return tuple(shown[:2])


def _arrows(
    view: nx.MultiDiGraph, members: Sequence[Sequence[str]], detached: set[tuple[str, str]]
) -> tuple[Arrow, ...]:
    box_of = {key: group[0] for group in members for key in group}
    found: dict[tuple[str, str, bool], list[str]] = {}
    for group in members:
        for target in group:
            for slot, source in inputs(view, target).items():
                if source not in box_of or box_of[source] == box_of[target]:
                    continue
                label = _label(view, target, slot)
                found.setdefault((box_of[source], box_of[target], (source, target) in detached), []).append(label)
    arrows = []
    for (source, target, cut), labels in found.items():
        distinct = list(dict.fromkeys(labels))
        arrows.append(Arrow(source, target, distinct[0] if len(distinct) == 1 else "", cut))
    return tuple(sorted(arrows, key=lambda a: (natural(a.source), natural(a.target), a.detached)))


def _label(view: nx.MultiDiGraph, target: str, slot: str) -> str:
    reader = view.nodes[target]["node"]
    if isinstance(reader, StageNode) and slot.isdigit():
        return _factor(reader.weights[int(slot)])
    if isinstance(reader, StageNode) and slot.startswith("reward."):
        return f"reward of {slot.removeprefix('reward.')}"
    if isinstance(reader, CounterNode):
        return "watched"
    if isinstance(reader, LossNode):
        return _factor(reader.coefficients[int(slot)])
    return ""


def _factor(weight: Schedule) -> str:
    if not isinstance(weight, Constant):
        return str(weight)
    return "" if weight.amount == 1.0 else f"{weight.amount:.3g}"


def _when(stages: Sequence[StageNode], model: str) -> str:
    """Whether a model is trained, or in which stages it is."""
    found = [stage.name for stage in stages if any(t.kind == "model" and t.name == model for t in stage.trains)]
    if not found:
        return "frozen"
    return "trained" if len(found) == len(stages) else f"trained in {', '.join(found)}"


def _groups(
    view: nx.MultiDiGraph, boxes: Sequence[Box], trained: set[tuple[str, str]], stages: Sequence[StageNode]
) -> tuple[Group, ...]:
    found: list[Group] = []
    for key in sorted({box.group for box in boxes if box.group}, key=natural):
        if key == "blocks":
            shapes = {box.shape for box in boxes if box.group == key}
            words = [word for shape, word in (("project", "projections"), ("policy", "policies")) if shape in shapes]
            found.append(Group(key, ", ".join(words), "blocks", "trained"))
        elif key == "batch":
            found.append(Group(key, "batch", "batch", "plain"))
        elif key.startswith("model/"):
            name = key.removeprefix("model/")
            tone = _learns(name, trained)
            found.append(Group(key, f"{name} ({_when(stages, name)})", "model", tone))
        else:
            title = view.nodes[key]["node"].name if key in view else key.removeprefix("stage/")
            found.append(Group(key, f"stage {title}", "stage", "plain"))
    order = {"model": 0, "blocks": 1, "batch": 2, "stage": 3}
    place = {stage.key: stage.order for stage in stages}
    return tuple(sorted(found, key=lambda group: (order[group.kind], place.get(group.key, 0), natural(group.key))))
