"""Making a graph node by node."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from gkd_dsl.graph import access
from gkd_dsl.graph.access import GraphError, NodeT
from gkd_dsl.graph.nodes import GraphNode
from gkd_dsl.text import Location


def merge_locations(*groups: tuple[Location, ...]) -> tuple[Location, ...]:
    """All locations of the groups, each once, in their order."""
    return tuple(dict.fromkeys(location for group in groups for location in group))


class GraphBuilder:
    """A `networkx.MultiDiGraph` under construction; `graph` is the graph itself."""

    def __init__(self) -> None:
        self.graph = nx.MultiDiGraph()
        self._taken: dict[str, int] = {}

    def add(self, node: GraphNode) -> str:
        """Put a node in and give its key.

        An equal node under the same key is kept once, with the locations of both; raises GraphError when
        the key holds another node.
        """
        if node.key in self.graph:
            held: GraphNode = self.graph.nodes[node.key]["node"]
            if type(held) is not type(node) or held != node:
                raise GraphError(node.key, f"two nodes of one key: {held} and {node}")
            node = replace(held, locations=merge_locations(held.locations, node.locations))
        self.graph.add_node(node.key, node=node)
        return node.key

    def connect(self, producer: str, consumer: str, slot: str) -> None:
        """Fill a slot of `consumer`; the same once more changes nothing.

        Raises GraphError when either key is unknown or the slot holds another producer.
        """
        for key in (producer, consumer):
            if key not in self.graph:
                raise GraphError(key, f"no such node (slot {slot!r} of {consumer})")
        held = next((source for source, _, taken in self.graph.in_edges(consumer, data="slot") if taken == slot), None)
        if held is None:
            self.graph.add_edge(producer, consumer, slot=slot)
        elif held != producer:
            raise GraphError(consumer, f"slot {slot!r} is filled by both {held} and {producer}")

    def fresh(self, stem: str) -> str:
        """A key that is not taken: `op/kl.1`, then `op/kl.2`."""
        number = self._taken.get(stem, 0) + 1
        while f"{stem}.{number}" in self.graph:
            number += 1
        self._taken[stem] = number
        return f"{stem}.{number}"

    def inputs(self, key: str) -> dict[str, str]:
        """What fills each slot of a node: slot -> producer, numbered slots in their order."""
        return access.inputs(self.graph, key)

    def node(self, key: str) -> GraphNode:
        """The node of a key. Raises GraphError when there is none."""
        return access.node(self.graph, key)

    def nodes(self, kind: type[NodeT]) -> list[NodeT]:
        """All nodes of a kind, in the natural order of their keys."""
        return access.nodes(self.graph, kind)

    def __contains__(self, key: str) -> bool:
        return key in self.graph
