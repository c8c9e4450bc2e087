"""Reading the graph: nodes by key and kind, inputs by slot."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

import networkx as nx

from gkd_dsl.graph.nodes import GraphNode

NodeT = TypeVar("NodeT", bound=GraphNode)


class GraphError(Exception):
    """A graph that breaks its own rules: a fault of the compiler, not of the spec. `key` is the node at fault."""

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        self.message = message
        super().__init__(f"{key}: {message}")


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key in which `layer.2` comes before `layer.10`."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part)


def node(graph: nx.MultiDiGraph, key: str) -> GraphNode:
    """The node of a key. Raises GraphError when there is none."""
    if key not in graph:
        raise GraphError(key, "no such node")
    return graph.nodes[key]["node"]


def nodes(graph: nx.MultiDiGraph, kind: type[NodeT]) -> list[NodeT]:
    """All nodes of a kind, in the natural order of their keys."""
    found = [data["node"] for _, data in graph.nodes(data=True) if isinstance(data["node"], kind)]
    return sorted(found, key=lambda item: natural(item.key))


def inputs(graph: nx.MultiDiGraph, key: str) -> dict[str, str]:
    """What fills each slot of a node: slot -> producer, in the natural order of the slots.

    Raises GraphError when a slot is filled twice.
    """
    found: dict[str, str] = {}
    for producer, _, data in sorted(graph.in_edges(key, data=True), key=lambda edge: natural(edge[2]["slot"])):
        slot = data["slot"]
        if slot in found:
            raise GraphError(key, f"slot {slot!r} is filled by both {found[slot]} and {producer}")
        found[slot] = producer
    return found


def users(graph: nx.MultiDiGraph, key: str) -> list[str]:
    """The keys that read a node, each once, in their natural order."""
    return sorted(graph.successors(key), key=natural)


def ancestors(graph: nx.MultiDiGraph, keys: Iterable[str]) -> set[str]:
    """`keys` and all that they are made from."""
    found: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key in found:
            continue
        found.add(key)
        waiting.extend(graph.predecessors(key))
    return found
