"""Emit: from the graph of a stage to its plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

import networkx as nx

from gkd_dsl.graph.access import ancestors, inputs, nodes
from gkd_dsl.graph.nodes import (
    BatchNode,
    Change,
    CounterNode,
    ForwardNode,
    LossNode,
    MetricNode,
    ModelNode,
    OpNode,
    PolicyNode,
    ProjectNode,
    ReplaceBlock,
    StageNode,
)
from gkd_dsl.graph.passes import forwards as forwards_pass
from gkd_dsl.graph.passes import liveness
from gkd_dsl.graph.plan import (
    Apply,
    Counted,
    CounterPlan,
    ForwardPlan,
    LossPlan,
    MetricPlan,
    PolicyPlan,
    StagePlan,
    TapPlan,
)
from gkd_dsl.types import LossType


def emit(graph: nx.MultiDiGraph, stage: StageNode, *, optimise: bool = True) -> StagePlan:
    """The plan of a stage. Without `optimise` forwards run whole and nothing is let go before the end."""
    graph = _by_column(graph)
    view = forwards_pass.forwards(forwards_pass.stage_view(graph, stage), stage)
    losses = [key for slot, key in inputs(graph, stage.key).items() if slot.isdigit()]
    counters, policies = _counters(view), _policies(view, stage)
    monitored = list(dict.fromkeys(_monitored(view, stage)))
    atoms = _atoms(view, [*losses, *monitored])
    batch_ops = liveness.from_batch(view)
    order = liveness.ordered(view)
    plans = _forwards(view, optimise)
    metrics = tuple(
        _metric(graph, stage, view_metric, optimise)
        for view_metric in nodes(graph, MetricNode)
        if view_metric.key in inputs(graph, stage.key).values()
    )
    models = {node.key: node for node in nodes(view, ModelNode)}
    for metric in metrics:
        names = {f.model for f in metric.forwards}
        names |= {c.model for f in metric.forwards for c in f.changes if isinstance(c, ReplaceBlock)}
        models.update({f"model/{name}": graph.nodes[f"model/{name}"]["node"] for name in names})
    columns = {node.column for node in nodes(view, BatchNode)}
    for metric in metrics:
        columns |= {
            graph.nodes[key]["node"].column
            for key in ancestors(graph, [metric.metric.key])
            if isinstance(graph.nodes[key]["node"], BatchNode)
        }
    for target in stage.trains:
        if target.kind == "model" and f"model/{target.name}" in graph:
            models.setdefault(f"model/{target.name}", graph.nodes[f"model/{target.name}"]["node"])
    projects = {node.key: node for node in nodes(view, ProjectNode)}
    for metric in metrics:
        for key in ancestors(graph, [metric.metric.key]):
            if isinstance(graph.nodes[key]["node"], ProjectNode):
                projects[key] = graph.nodes[key]["node"]
    return StagePlan(
        name=stage.name,
        stage=cast(StageNode, view.nodes[stage.key]["node"]),
        models=tuple(models[key] for key in sorted(models)),
        projections=tuple(projects[key] for key in sorted(projects)),
        forwards=plans,
        valid_program=tuple(_apply(view, key) for key in order if key in batch_ops),
        counted=tuple(_counted(view, atom) for atom in atoms),
        program=liveness.program(view, [key for key in order if key not in batch_ops], atoms, plans, free=optimise),
        losses=tuple(_loss(view, key) for key in losses),
        weights=stage.weights,
        columns=tuple(sorted(columns)),
        metrics=metrics,
        monitored=tuple(_loss(view, key) for key in monitored),
        counters=counters,
        policies=policies,
    )


def _by_column(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """The graph with one node a column: labels that are classes here and tokens there are one column of the batch."""
    renamed = {
        node.key: replace(node, key=f"batch/{node.column}")
        for node in nodes(graph, BatchNode)
        if node.key != f"batch/{node.column}"
    }
    if not renamed:
        return graph
    held = {key: graph.nodes[node.key]["node"] for key, node in renamed.items() if node.key in graph}
    graph = nx.relabel_nodes(graph, {key: node.key for key, node in renamed.items()})
    for key, node in renamed.items():
        graph.nodes[node.key]["node"] = held.get(key, node)
    return graph


def _atoms(view: nx.MultiDiGraph, losses: Iterable[str]) -> list[str]:
    """The loss-typed operators that are reduced: those of the losses, and those that a `gradient` is taken of."""
    found = [atom for loss in losses for atom in inputs(view, loss).values()]
    for node in nodes(view, OpNode):
        if node.op == "gradient":
            found += [key for slot, key in inputs(view, node.key).items() if slot.isdigit()]
    return list(dict.fromkeys(found))


def _monitored(view: nx.MultiDiGraph, stage: StageNode) -> Iterator[str]:
    """The losses that the counters and the rewards of a stage read."""
    for slot, key in inputs(view, stage.key).items():
        if slot.startswith("reward."):
            yield key
        elif slot.startswith("counter."):
            yield from inputs(view, key).values()


def _counters(view: nx.MultiDiGraph) -> tuple[CounterPlan, ...]:
    return tuple(
        CounterPlan(
            node.name,
            node.start,
            node.stop,
            node.when,
            tuple(view.nodes[key]["node"].name for key in inputs(view, node.key).values()),
        )
        for node in nodes(view, CounterNode)
    )


def _policies(view: nx.MultiDiGraph, stage: StageNode) -> tuple[PolicyPlan, ...]:
    slots = inputs(view, stage.key)
    found = []
    for node in nodes(view, PolicyNode):
        draws = [key for key in view.successors(node.key) if isinstance(view.nodes[key]["node"], OpNode)]
        reward = view.nodes[slots[f"reward.{node.name}"]]["node"].name
        found += [PolicyPlan(key, node, reward) for key in dict.fromkeys(draws)]
    return tuple(found)


def _apply(graph: nx.MultiDiGraph, key: str) -> Apply:
    node = cast(OpNode, graph.nodes[key]["node"])
    return Apply(key, node.op, tuple(inputs(graph, key).items()), node.attrs, node.type)


def _forwards(graph: nx.MultiDiGraph, optimise: bool) -> tuple[ForwardPlan, ...]:
    return tuple(
        ForwardPlan(
            node.key,
            node.model,
            node.grad,
            tuple(TapPlan(tap.key, tap.path, tap.type) for tap in liveness.tap_nodes(graph, node.key)),
            forwards_pass.stop_after(graph, node.key) if optimise else None,
            *_given(graph, node),
            node.discard,
            node.shift,
        )
        for node in nodes(graph, ForwardNode)
    )


def _given(
    graph: nx.MultiDiGraph, node: ForwardNode
) -> tuple[tuple[tuple[str, str], ...], tuple[Change, ...], tuple[tuple[str, str], ...]]:
    """The columns that other tensors stand in for, the changes, and the tensors that those take."""
    own: list[tuple[str, str]] = []
    values: list[tuple[str, str]] = []
    for slot, key in inputs(graph, node.key).items():
        if "." in slot and not key.startswith("model/"):
            values.append((slot, key))
        elif slot != "model" and "." not in slot and key != f"batch/{slot}":
            own.append((slot, key))
    return tuple(own), node.changes, tuple(values)


def _counted(graph: nx.MultiDiGraph, key: str) -> Counted:
    node = cast(OpNode, graph.nodes[key]["node"])
    slots = inputs(graph, key)
    return Counted(
        key,
        cast(LossType, node.type).dims,
        slots.get("valid"),
        bool(node.attr("causal", False)),
        slots.get("token_weight"),
        slots.get("sample_weight"),
    )


def _loss(graph: nx.MultiDiGraph, key: str) -> LossPlan:
    node = cast(LossNode, graph.nodes[key]["node"])
    return LossPlan(node.name, tuple(zip(node.coefficients, inputs(graph, key).values(), strict=True)))


def _metric(graph: nx.MultiDiGraph, stage: StageNode, metric: MetricNode, optimise: bool) -> MetricPlan:
    view = graph.subgraph(ancestors(graph, [metric.key])).copy()
    for node in nodes(view, ForwardNode):
        view.nodes[node.key]["node"] = replace(node, grad=False)
    plans = _forwards(view, optimise)
    slots = inputs(view, metric.key)
    return MetricPlan(
        metric,
        plans,
        liveness.program(view, liveness.ordered(view), slots.values(), plans, free=optimise),
        tuple(slots.items()),
    )
