"""Each rule of the graph, broken once."""

from __future__ import annotations

import networkx as nx
import pytest
from graph_help import HIDDEN, MASK, Hand, twice

from gkd_dsl.graph.access import GraphError, inputs
from gkd_dsl.graph.build import GraphBuilder
from gkd_dsl.graph.nodes import BatchNode, OpNode, TapNode
from gkd_dsl.graph.verify import verify
from gkd_dsl.models.taps import TapPath
from gkd_dsl.types import BATCH, TensorType


def graph() -> nx.MultiDiGraph:
    hand = twice()
    verify(hand.graph)
    return hand.graph


def broken(found: nx.MultiDiGraph, key: str, words: str) -> None:
    with pytest.raises(GraphError, match=words) as caught:
        verify(found)
    assert caught.value.key == key


def test_a_cycle() -> None:
    found = graph()
    found.add_edge("op/detach.1", "op/detach.1", slot="y")
    broken(found, "op/detach.1", "a cycle: op/detach.1")


def test_a_key_that_is_not_the_nodes() -> None:
    found = graph()
    found.add_node("op/other", node=found.nodes["op/mse.1"]["node"])
    broken(found, "op/other", "the node here is OpNode")


def test_a_key_without_a_node() -> None:
    found = graph()
    found.add_node("op/other")
    broken(found, "op/other", "the node here is None")


def test_a_slot_that_is_filled_twice() -> None:
    found = graph()
    found.add_edge("s/hidden.2", "op/mse.1", slot="teacher")
    broken(found, "op/mse.1", "slot 'teacher' is filled by both")


def test_a_tap_of_another_model() -> None:
    found = graph()
    found.nodes["s/hidden.2"]["node"] = TapNode("s/hidden.2", "t", TapPath("hidden", 2), HIDDEN)
    broken(found, "s/hidden.2", "a tap of t hangs on")


def test_a_tap_of_no_forward() -> None:
    found = graph()
    found.remove_edges_from(list(found.in_edges("s/hidden.2", keys=True)))
    broken(found, "s/hidden.2", "a tap of s hangs on")


def test_a_loss_with_a_coefficient_too_few() -> None:
    found = graph()
    found.add_edge("op/mse.2", "loss/a", slot="1")
    broken(found, "loss/a", "1 weights for the inputs")


def test_a_loss_of_a_tensor() -> None:
    found = graph()
    found.remove_edges_from(list(found.in_edges("loss/a", keys=True)))
    found.add_edge("op/detach.1", "loss/a", slot="0")
    broken(found, "loss/a", "slot 0 holds op/detach.1")


def test_a_stage_with_a_weight_too_many() -> None:
    found = graph()
    found.remove_node("loss/b")
    broken(found, "stage/main", "2 weights for the inputs")


def test_a_stage_that_minimises_an_operator() -> None:
    found = graph()
    found.remove_edges_from([(u, v, k) for u, v, k in found.in_edges("stage/main", keys=True) if u == "loss/b"])
    found.add_edge("op/mse.2", "stage/main", slot="1")
    broken(found, "stage/main", "slot 1 holds op/mse.2")


def test_what_counts_from_a_model() -> None:
    hand = Hand()
    mask = hand.op("equal", MASK, a=hand.tap("s", 1), b="batch/labels")
    hand.stage("main", hand.loss("a", hand.atom("s/hidden.1", hand.tap("t", 1), valid=mask)))
    with pytest.raises(GraphError, match="what counts depends on") as caught:
        verify(hand.graph)
    assert caught.value.key == "op/mse.1"


def test_what_a_metric_counts_from_a_model() -> None:
    hand = Hand()
    metric = hand.metric("m", hand.tap("s", 1), "batch/labels")
    hand.connect(hand.valid(), metric, "valid")
    verify(hand.graph)
    hand = Hand()
    metric = hand.metric("m", hand.tap("s", 1), "batch/labels")
    hand.connect(hand.op("equal", MASK, a="s/hidden.1", b="batch/labels"), metric, "valid")
    broken(hand.graph, metric, "what counts depends on")


def test_what_counts_from_nothing() -> None:
    hand = Hand()
    hand.stage("main", hand.loss("a", hand.atom(hand.tap("s", 1), hand.tap("t", 1), valid=hand.op("ones", MASK))))
    broken(hand.graph, "op/mse.1", "what counts depends on op/ones.1")


def test_a_projection_without_its_block() -> None:
    hand = Hand()
    hand.stage("main", hand.loss("a", hand.atom(hand.op("project", x=hand.tap("s", 1)), hand.tap("t", 1))))
    broken(hand.graph, "op/project.1", "a projection has the inputs")


def test_the_builder_keeps_its_rules() -> None:
    builder = GraphBuilder()
    ids = BatchNode("batch/ids", "ids", TensorType("int", (BATCH,)))
    assert builder.add(ids) == builder.add(ids) == "batch/ids"
    with pytest.raises(GraphError, match="two nodes of one key"):
        builder.add(BatchNode("batch/ids", "other", TensorType("int", (BATCH,))))
    with pytest.raises(GraphError, match="no such node"):
        builder.connect("batch/ids", "op/x", "x")
    builder.add(OpNode("op/x", "x", (), HIDDEN))
    builder.connect("batch/ids", "op/x", "x")
    builder.connect("batch/ids", "op/x", "x")
    assert builder.graph.number_of_edges() == 1
    builder.add(BatchNode("batch/more", "more", TensorType("int", (BATCH,))))
    with pytest.raises(GraphError, match="filled by both batch/ids and batch/more"):
        builder.connect("batch/more", "op/x", "x")
    assert [builder.fresh("op/y"), builder.fresh("op/y")] == ["op/y.1", "op/y.2"]


def test_slots_come_in_their_natural_order() -> None:
    hand = Hand()
    atoms = [hand.atom(hand.tap("s", i % 5), hand.tap("t", 1)) for i in range(12)]
    loss = hand.loss("a", *reversed(atoms))
    assert list(inputs(hand.graph, loss)) == [str(i) for i in range(12)]
