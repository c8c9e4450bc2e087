"""The rules of the graph. A break is a fault of the compiler, not of the spec."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx

from gkd_dsl import schedules
from gkd_dsl.graph.access import GraphError, inputs, nodes
from gkd_dsl.graph.nodes import (
    BatchNode,
    CounterNode,
    ForwardNode,
    GraphNode,
    LossNode,
    MetricNode,
    ModelNode,
    OpNode,
    PolicyNode,
    ReplaceBlock,
    StageNode,
    SwapTap,
    TapNode,
    change_slots,
)
from gkd_dsl.types import LossType


def verify(graph: nx.MultiDiGraph) -> None:
    """Raise GraphError where the graph breaks a rule.

    It has no cycle; a key is its node's; a slot is filled once; a tap hangs on one forward of its model; a
    loss reads loss-typed operators, one for each coefficient; a stage has one loss for each weight; what counts
    (`valid`) is computed from the batch alone; a pass is given what its changes read; a policy reads nothing, chooses
    among as many states as it has actions, and has its reward in each stage that it chooses in; a counter goes up and
    reads losses, and a stage has every counter that its losses are weighed by.
    """
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        raise GraphError(cycle[0], f"a cycle: {' -> '.join(cycle)}")
    for key, data in graph.nodes(data=True):
        node = data.get("node")
        if not isinstance(node, GraphNode) or node.key != key:
            raise GraphError(key, f"the node here is {node!r}")
    for tap in nodes(graph, TapNode):
        found = inputs(graph, tap.key)
        forward = graph.nodes[found["forward"]]["node"] if set(found) == {"forward"} else None
        if not isinstance(forward, ForwardNode) or forward.model != tap.model:
            raise GraphError(tap.key, f"a tap of {tap.model} hangs on {found}")
    for forward in nodes(graph, ForwardNode):
        _changes(graph, forward)
    for loss in nodes(graph, LossNode):
        _numbered(graph, loss.key, len(loss.coefficients), inputs(graph, loss.key), _is_loss)
    for stage in nodes(graph, StageNode):
        slots = {slot: key for slot, key in inputs(graph, stage.key).items() if slot.isdigit()}
        _numbered(graph, stage.key, len(stage.weights), slots, lambda node: isinstance(node, LossNode))
        _policies(graph, stage.key)
        _counters(graph, stage)
    for op in (*nodes(graph, OpNode), *nodes(graph, MetricNode)):
        slots = inputs(graph, op.key)
        valid = slots.get("valid")
        if valid is not None:
            _from_batch(graph, op.key, valid)
        if isinstance(op, OpNode) and op.op == "policy":
            block = graph.nodes[slots.get("block", op.key)]["node"]
            count = block.actions if isinstance(block, PolicyNode) else -1
            if set(slots) != {"block", *(str(number) for number in range(count))} or graph.in_degree(block.key):
                raise GraphError(op.key, f"a policy has the inputs {slots}")
        if isinstance(op, OpNode) and op.op == "project" and set(slots) != {"x", "block"}:
            raise GraphError(op.key, f"a projection has the inputs {slots}")


def _changes(graph: nx.MultiDiGraph, forward: ForwardNode) -> None:
    """Every change of a pass has what it reads, and nothing else enters it but columns and its model."""
    held = inputs(graph, forward.key)
    wanted = {slot for change in forward.changes for slot in change_slots(change)}
    allowed = wanted | {f"{change.slot}.at" for change in forward.changes if isinstance(change, SwapTap)}
    given = {slot for slot in held if "." in slot}
    if not wanted <= given <= allowed:
        raise GraphError(forward.key, f"its changes read {sorted(wanted)}, and it is given {sorted(given)}")
    for change in forward.changes:
        model = graph.nodes[held[change.slot]]["node"] if isinstance(change, ReplaceBlock) else None
        if isinstance(change, ReplaceBlock) and (not isinstance(model, ModelNode) or model.name != change.model):
            raise GraphError(forward.key, f"slot {change.slot} holds {held[change.slot]}")


def _policies(graph: nx.MultiDiGraph, stage: str) -> None:
    slots = inputs(graph, stage)
    for slot, key in slots.items():
        kind, _, name = slot.partition(".")
        if kind == "policy":
            node = graph.nodes[key]["node"]
            reward = slots.get(f"reward.{name}")
            if not isinstance(node, PolicyNode) or node.name != name:
                raise GraphError(stage, f"slot {slot} holds {key}")
            if reward is None or not isinstance(graph.nodes[reward]["node"], LossNode):
                raise GraphError(stage, f"the policy {name} has the reward {reward}")


def _counters(graph: nx.MultiDiGraph, stage: StageNode) -> None:
    held = {slot.removeprefix("counter."): key for slot, key in inputs(graph, stage.key).items()}
    for weight in stage.weights:
        for name in schedules.counters(weight):
            if not isinstance(graph.nodes[held.get(name, stage.key)]["node"], CounterNode):
                raise GraphError(stage.key, f"a weight reads the counter {name}, which the stage has not")
    for counter in nodes(graph, CounterNode):
        slots = inputs(graph, counter.key)
        _numbered(graph, counter.key, len(slots), slots, lambda node: isinstance(node, LossNode))
        if counter.stop <= counter.start:
            raise GraphError(counter.key, f"a counter from {counter.start} to {counter.stop}")


def _is_loss(node: object) -> bool:
    return isinstance(node, OpNode) and isinstance(node.type, LossType)


def _numbered(
    graph: nx.MultiDiGraph, key: str, count: int, slots: dict[str, str], fits: Callable[[object], bool]
) -> None:
    if list(slots) != [str(number) for number in range(count)]:
        raise GraphError(key, f"{count} weights for the inputs {slots}")
    for slot, producer in slots.items():
        if not fits(graph.nodes[producer]["node"]):
            raise GraphError(key, f"slot {slot} holds {producer}")


def _from_batch(graph: nx.MultiDiGraph, key: str, valid: str) -> None:
    for source in (valid, *nx.ancestors(graph, valid)):
        node = graph.nodes[source]["node"]
        if not isinstance(node, BatchNode | OpNode) or (isinstance(node, OpNode) and graph.in_degree(source) == 0):
            raise GraphError(key, f"what counts depends on {source}")
