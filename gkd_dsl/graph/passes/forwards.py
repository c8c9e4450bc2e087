"""Forwards: for one stage, which models run with gradient, and after which tap each may stop."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from gkd_dsl.graph.access import ancestors, inputs, nodes
from gkd_dsl.graph.nodes import ForwardNode, StageNode, TapNode
from gkd_dsl.models.resolve import last_needed
from gkd_dsl.models.taps import TapPath


def stage_view(graph: nx.MultiDiGraph, stage: StageNode) -> nx.MultiDiGraph:
    """One stage with its objective; what only its metrics read is left out."""
    needed = [key for slot, key in inputs(graph, stage.key).items() if not slot.startswith("metric.")]
    return graph.subgraph({stage.key, *ancestors(graph, needed)}).copy()


def forwards(graph: nx.MultiDiGraph, stage: StageNode) -> nx.MultiDiGraph:
    """The view of a stage in which a forward has a gradient exactly where its model is trained in that stage.

    A model that is trained and also read detached runs once: `detach` is an operator. A forward whose gradient is
    taken and thrown away has one in any case.
    """
    trained = {target.name for target in stage.trains if target.kind == "model"}
    result = graph.copy()
    for node in nodes(graph, ForwardNode):
        result.nodes[node.key]["node"] = replace(node, grad=node.model in trained or node.discard)
    return result


def stop_after(graph: nx.MultiDiGraph, forward: str) -> TapPath | None:
    """The last tap that a forward is needed for; None where it runs whole."""
    taps = [graph.nodes[key]["node"] for key in graph.successors(forward)]
    return last_needed(tap.path for tap in taps if isinstance(tap, TapNode))
