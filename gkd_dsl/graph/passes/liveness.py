"""Liveness: an order of the work, and when each tensor is let go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import networkx as nx

from gkd_dsl.graph.access import inputs, natural
from gkd_dsl.graph.nodes import BatchNode, ForwardNode, OpNode, TapNode
from gkd_dsl.graph.plan import Apply, ForwardPlan, Free, Fused, Instruction, Run
from gkd_dsl.types import LossType, TensorType


def ordered(graph: nx.MultiDiGraph) -> list[str]:
    """The forwards and operators of a view in the order they run.

    Forwards without gradient come first, then what needs only them, then the forwards that train.
    """
    without: set[str] = set()
    for key in nx.topological_sort(graph):
        node = graph.nodes[key]["node"]
        if isinstance(node, ForwardNode):
            if not node.grad:
                without.add(key)
        elif all(source in without or source.startswith(("batch/", "model/")) for source in graph.predecessors(key)):
            without.add(key)

    def rank(key: str) -> tuple[int, tuple]:
        node = graph.nodes[key]["node"]
        early = key in without
        if isinstance(node, ForwardNode):
            return (0 if early else 2, natural(key))
        return (1 if early else 3, natural(key))

    order = nx.lexicographical_topological_sort(graph, key=rank)
    return [key for key in order if isinstance(graph.nodes[key]["node"], ForwardNode | OpNode)]


def from_batch(graph: nx.MultiDiGraph) -> set[str]:
    """The operators that read the batch alone."""
    found: set[str] = set()
    for key in nx.topological_sort(graph):
        node = graph.nodes[key]["node"]
        sources = list(graph.predecessors(key))
        if isinstance(node, BatchNode) or (isinstance(node, OpNode) and sources and all(s in found for s in sources)):
            found.add(key)
    return {key for key in found if key.startswith("op/")}


def program(
    graph: nx.MultiDiGraph, keys: Iterable[str], keep: Iterable[str], forwards: Iterable[ForwardPlan], free: bool
) -> tuple[Instruction, ...]:
    """The instructions for `keys`, in their order, with what dies after each; `keep` outlives them."""
    steps: list[Instruction] = []
    for key in keys:
        node = graph.nodes[key]["node"]
        if isinstance(node, ForwardNode):
            steps.append(Run(key))
        else:
            steps.append(Apply(key, node.op, tuple(inputs(graph, key).items()), node.attrs, node.type))
    return with_frees(steps, keep, forwards) if free else tuple(steps)


def with_frees(
    steps: Sequence[Instruction], keep: Iterable[str], forwards: Iterable[ForwardPlan]
) -> tuple[Instruction, ...]:
    """The instructions with what dies after each; `keep` outlives them."""
    kept = set(keep)
    plans = {plan.key: plan for plan in forwards}
    last: dict[str, int] = {}
    for place, step in enumerate(steps):
        for key in made(step, plans):
            last[key] = place
        for source in reads(step, plans):
            if source in last:
                last[source] = place
    result: list[Instruction] = []
    for place, step in enumerate(steps):
        result.append(step)
        dead = sorted((key for key, end in last.items() if end == place and key not in kept), key=natural)
        if dead:
            result.append(Free(tuple(dead)))
    return tuple(result)


def made(step: Instruction, forwards: Mapping[str, ForwardPlan]) -> tuple[str, ...]:
    """The keys that an instruction puts into the environment."""
    if isinstance(step, Run):
        return tuple(tap.key for tap in forwards[step.forward].taps)
    if isinstance(step, Fused):
        return tuple(term.key for term in step.terms)
    return (step.key,) if isinstance(step, Apply) else ()


def reads(step: Instruction, forwards: Mapping[str, ForwardPlan]) -> tuple[str, ...]:
    """The keys of the environment that an instruction needs."""
    if isinstance(step, Run):
        return forwards[step.forward].reads
    if isinstance(step, Fused):
        return step.reads
    return tuple(key for _, key in step.inputs) if isinstance(step, Apply) else ()


def estimate(
    steps: Iterable[Instruction], forwards: Iterable[ForwardPlan], batch: int, length: int, element: int = 4
) -> int:
    """The most bytes that taps and results of operators hold at once, for `batch` texts of `length` tokens."""
    by_key = {forward.key: forward for forward in forwards}
    live: dict[str, int] = {}
    peak = 0
    for step in steps:
        if isinstance(step, Run):
            for tap in by_key[step.forward].taps:
                live[tap.key] = size(tap.type, batch, length) * element
        elif isinstance(step, Apply):
            live[step.key] = size(step.type, batch, length) * element
            if step.op == "detach":
                # The two are one tensor; it stays until the last of them goes.
                live[step.inputs[0][1]] = 0
        elif isinstance(step, Fused):
            # Their logits are never whole; each gives a number.
            live |= dict.fromkeys(made(step, by_key), element)
        else:
            for key in step.keys:
                live.pop(key, None)
        peak = max(peak, sum(live.values()))
    return peak


def size(type_: TensorType | LossType, batch: int, length: int) -> int:
    """The number of elements; an axis that is not known counts as one."""
    total = 1
    for dim in type_.dims:
        total *= batch if dim.name == "B" else length if dim.name == "L" else dim.size or 1
    return total


def tap_nodes(graph: nx.MultiDiGraph, forward: str) -> list[TapNode]:
    """The taps of a forward in a view, in the natural order of their keys."""
    found = [graph.nodes[key]["node"] for key in set(graph.successors(forward))]
    return sorted((tap for tap in found if isinstance(tap, TapNode)), key=lambda tap: natural(tap.key))
