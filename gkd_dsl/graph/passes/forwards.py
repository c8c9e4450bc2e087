"""Forwards: for one stage, which models run with gradient, and after which tap each may stop."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from gkd_dsl.graph.access import ancestors, inputs
from gkd_dsl.graph.nodes import ForwardNode, OpNode, StageNode, TapNode
from gkd_dsl.models.resolve import last_needed
from gkd_dsl.models.taps import TapPath


def stage_view(graph: nx.MultiDiGraph, stage: StageNode) -> nx.MultiDiGraph:
    """One stage with its objective; what only its metrics read is left out."""
    needed = [key for slot, key in inputs(graph, stage.key).items() if not slot.startswith("metric.")]
    return graph.subgraph({stage.key, *ancestors(graph, needed)}).copy()


def forwards(graph: nx.MultiDiGraph, stage: StageNode) -> nx.MultiDiGraph:
    """The view of a stage in which a forward has a gradient exactly where something trained is in it.

    That is its model, or what enters it by a change. A model that is trained and also read detached runs once: `detach`
    is an operator. A forward whose gradient is taken and thrown away has one in any case.
    """
    trained = {f"{'model' if target.kind == 'model' else 'project'}/{target.name}" for target in stage.trains}
    result = graph.copy()
    flows: set[str] = set()
    for key in nx.topological_sort(graph):
        node = graph.nodes[key]["node"]
        sources = inputs(graph, key)
        if isinstance(node, ForwardNode):
            entering = [source for slot, source in sources.items() if "." in slot and not source.startswith("model/")]
            grad = f"model/{node.model}" in trained or node.discard or not flows.isdisjoint(entering)
            result.nodes[key]["node"] = replace(node, grad=grad)
            flows |= {key} if grad else set()
        elif isinstance(node, OpNode):
            through = node.op not in ("detach", "gradient") and not flows.isdisjoint(sources.values())
            flows |= {key} if through else set()
        elif key in trained or not flows.isdisjoint(sources.values()):
            flows.add(key)
    return result


def stop_after(graph: nx.MultiDiGraph, forward: str) -> TapPath | None:
    """The last tap that a forward is needed for; None where it runs whole."""
    taps = [graph.nodes[key]["node"] for key in graph.successors(forward)]
    return last_needed(tap.path for tap in taps if isinstance(tap, TapNode))
