"""Emit: from the graph of a stage to its plan."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import networkx as nx

from gkd_dsl.graph.access import ancestors, inputs, nodes
from gkd_dsl.graph.nodes import (
    BatchNode,
    ForwardNode,
    LossNode,
    MetricNode,
    ModelNode,
    OpNode,
    ProjectNode,
    StageNode,
)
from gkd_dsl.graph.passes import forwards as forwards_pass
from gkd_dsl.graph.passes import liveness
from gkd_dsl.graph.plan import Apply, Counted, ForwardPlan, LossPlan, MetricPlan, StagePlan, TapPlan
from gkd_dsl.types import LossType


def emit(graph: nx.MultiDiGraph, stage: StageNode, *, optimise: bool = True) -> StagePlan:
    """The plan of a stage. Without `optimise` forwards run whole and nothing is let go before the end."""
    view = forwards_pass.forwards(forwards_pass.stage_view(graph, stage), stage)
    losses = [key for slot, key in inputs(graph, stage.key).items() if slot.isdigit()]
    parts = {loss: list(inputs(view, loss).values()) for loss in losses}
    atoms = list(dict.fromkeys(atom for found in parts.values() for atom in found))
    batch_ops = liveness.from_batch(view)
    order = liveness.ordered(view)
    plans = _forwards(view, optimise)
    taps = {plan.key: [tap.key for tap in plan.taps] for plan in plans}
    metrics = tuple(
        _metric(graph, stage, view_metric, optimise)
        for view_metric in nodes(graph, MetricNode)
        if view_metric.key in inputs(graph, stage.key).values()
    )
    models = {node.key: node for node in nodes(view, ModelNode)}
    for metric in metrics:
        models.update({f"model/{f.model}": graph.nodes[f"model/{f.model}"]["node"] for f in metric.forwards})
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
        program=liveness.program(view, [key for key in order if key not in batch_ops], atoms, taps, free=optimise),
        losses=tuple(_loss(view, key) for key in losses),
        weights=stage.weights,
        columns=tuple(sorted(columns)),
        metrics=metrics,
    )


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
        )
        for node in nodes(graph, ForwardNode)
    )


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
    taps = {plan.key: [tap.key for tap in plan.taps] for plan in plans}
    slots = inputs(view, metric.key)
    return MetricPlan(
        metric,
        plans,
        liveness.program(view, liveness.ordered(view), slots.values(), taps, free=optimise),
        tuple(slots.items()),
    )
