"""Share: equal operators on equal inputs are one node; so are equal taps and equal forwards."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from gkd_dsl.graph.access import inputs, natural
from gkd_dsl.graph.build import merge_locations
from gkd_dsl.graph.nodes import ForwardNode, OpNode, TapNode
from gkd_dsl.ops import registry


def share(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """A graph in which no operator, tap or forward stands twice; the locations of all are kept on the one.

    Operators that draw numbers are never shared, nor forwards that differ in gradient or input.
    """
    result = graph.copy()
    seen: dict[object, str] = {}
    for key in list(nx.lexicographical_topological_sort(graph, key=natural)):
        identity = _identity(result, key)
        if identity is None:
            continue
        first = seen.setdefault(identity, key)
        if first == key:
            continue
        for _, consumer, data in list(result.out_edges(key, data=True)):
            result.add_edge(first, consumer, slot=data["slot"])
        kept, gone = result.nodes[first]["node"], result.nodes[key]["node"]
        result.nodes[first]["node"] = replace(kept, locations=merge_locations(kept.locations, gone.locations))
        result.remove_node(key)
    return result


def _identity(graph: nx.MultiDiGraph, key: str) -> object:
    """What two nodes must have in common to be one; None for nodes that are never shared."""
    node = graph.nodes[key]["node"]
    if isinstance(node, OpNode):
        spec = registry.lookup(node.op)
        if spec is not None and spec.random:
            return None
        return ("op", node.op, node.attrs, node.type, tuple(inputs(graph, key).items()))
    if isinstance(node, TapNode):
        return ("tap", node.model, node.path, tuple(inputs(graph, key).items()))
    if isinstance(node, ForwardNode):
        return (
            "forward",
            node.model,
            node.inputs,
            node.grad,
            node.changes,
            node.discard,
            tuple(inputs(graph, key).items()),
        )
    return None
