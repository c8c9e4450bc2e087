"""Families: nodes of a graph that differ by a layer index only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import networkx as nx

from gkd_dsl.graph.access import natural
from gkd_dsl.graph.nodes import LossNode, MetricNode, OpNode, ProjectNode, StageNode, TapNode


def masked(text: str) -> str:
    """A name without its numbers: `att.3` and `att.11` are both `att.#`."""
    return re.sub(r"\d+", "#", text)


def families(graph: nx.MultiDiGraph) -> list[list[str]]:
    """The nodes in groups: those of a group are alike, and so is all that they read and that reads them.

    Alike means the same kind, operator and shape, with layer indices left out. Every node is in one group; the
    groups and their members are in the natural order of their keys.
    """
    keys = sorted(graph, key=natural)
    colour = _numbered({key: _kind(graph, key) for key in keys})
    while True:
        refined = _numbered(
            {
                key: (
                    colour[key],
                    _around(colour, ((source, slot) for source, _, slot in graph.in_edges(key, data="slot"))),
                    _around(colour, ((target, slot) for _, target, slot in graph.out_edges(key, data="slot"))),
                )
                for key in keys
            }
        )
        if len(set(refined.values())) == len(set(colour.values())):
            break
        colour = refined
    groups: dict[int, list[str]] = {}
    for key in keys:
        groups.setdefault(refined[key], []).append(key)
    return list(groups.values())


def _around(colour: dict[str, int], neighbours: Iterable[tuple[str, str]]) -> tuple[tuple[int, str], ...]:
    return tuple(sorted({(colour[key], masked(slot)) for key, slot in neighbours}))


def _numbered(identity: dict[str, object]) -> dict[str, int]:
    """Small numbers for equal identities, in the order in which they are met."""
    numbers: dict[object, int] = {}
    return {key: numbers.setdefault(value, len(numbers)) for key, value in identity.items()}


def _kind(graph: nx.MultiDiGraph, key: str) -> object:
    node = graph.nodes[key]["node"]
    match node:
        case TapNode():
            return ("tap", node.model, node.path.kind, node.path.part, masked(node.path.name or ""), str(node.type))
        case OpNode():
            return ("op", node.op, repr(node.attrs), str(node.type))
        case ProjectNode():
            return ("project", masked(node.name), node.in_features, node.out_features)
        case LossNode() | MetricNode():
            return (type(node).__name__, masked(node.name))
        case StageNode():
            return ("stage", masked(node.name), node.trains if not re.search(r"\d", node.name) else ())
    return key


def indices(numbers: Sequence[int]) -> str:
    """`0..11`, `2, 5, .., 11` for equal steps, else the list (cut after eight)."""
    found = sorted(set(numbers))
    if len(found) <= 2:
        return ", ".join(str(number) for number in found)
    steps = {after - before for before, after in pairwise(found)}
    if steps == {1}:
        return f"{found[0]}..{found[-1]}"
    if len(steps) == 1 and len(found) > 3:
        return f"{found[0]}, {found[1]}, .., {found[-1]}"
    shown = [str(number) for number in found[:8]]
    return ", ".join(shown + ([".."] if len(found) > 8 else []))


def family_name(names: Sequence[str]) -> str:
    """One name for names that differ by a number: `att[0..11]`."""
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(part) for part in parts}) != 1:
        return masked(names[0])
    text = ""
    for place, column in enumerate(zip(*parts, strict=True)):
        if len(set(column)) == 1:
            text += column[0]
        elif place % 2:
            text = f"{text.removesuffix('.').removesuffix('[')}[{indices([int(number) for number in column])}]"
        else:
            return masked(names[0])
    return text.replace("]]", "]")
