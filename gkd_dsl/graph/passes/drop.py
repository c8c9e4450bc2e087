"""Drop: what no stage needs is not computed, and a model that nothing reads is never loaded."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from gkd_dsl import schedules
from gkd_dsl.graph.access import ancestors, inputs, nodes
from gkd_dsl.graph.nodes import LossNode, StageNode


def drop(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """A graph without losses and terms of constant weight 0, and without what only they, or nothing, needed.

    Metrics that a stage evaluates keep what they read.
    """
    result = graph.copy()
    for stage in nodes(graph, StageNode):
        _losses_of_stage(result, stage)
    for loss in nodes(graph, LossNode):
        _parts_of_loss(result, loss)
    needed = ancestors(result, [stage.key for stage in nodes(result, StageNode)])
    result.remove_nodes_from([key for key in graph if key not in needed])
    return result


def _losses_of_stage(graph: nx.MultiDiGraph, stage: StageNode) -> None:
    slots = {slot: key for slot, key in inputs(graph, stage.key).items() if slot.isdigit()}
    kept = [
        (weight, slots[str(number)])
        for number, weight in enumerate(stage.weights)
        if not schedules.is_zero(weight) and _counts(graph, slots[str(number)])
    ]
    if len(kept) == len(stage.weights):
        return
    _refill(graph, stage.key, [key for _, key in kept])
    graph.nodes[stage.key]["node"] = replace(stage, weights=tuple(weight for weight, _ in kept))


def _counts(graph: nx.MultiDiGraph, loss: str) -> bool:
    """Whether a loss has a term that is not always 0."""
    return any(not schedules.is_zero(weight) for weight in graph.nodes[loss]["node"].coefficients)


def _parts_of_loss(graph: nx.MultiDiGraph, loss: LossNode) -> None:
    slots = inputs(graph, loss.key)
    kept = [
        (weight, slots[str(number)]) for number, weight in enumerate(loss.coefficients) if not schedules.is_zero(weight)
    ]
    if len(kept) == len(loss.coefficients):
        return
    _refill(graph, loss.key, [key for _, key in kept])
    graph.nodes[loss.key]["node"] = replace(loss, coefficients=tuple(weight for weight, _ in kept))


def _refill(graph: nx.MultiDiGraph, key: str, producers: list[str]) -> None:
    """Put these producers, in order, into the numbered slots of a node."""
    numbered = [
        (source, target, number)
        for source, target, number, data in graph.in_edges(key, keys=True, data=True)
        if data["slot"].isdigit()
    ]
    graph.remove_edges_from(numbered)
    for slot, producer in enumerate(producers):
        graph.add_edge(producer, key, slot=str(slot))
