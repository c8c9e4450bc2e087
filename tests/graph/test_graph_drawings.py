"""Drawings: families collapse, what is drawn and what is not, and texts that their readers accept."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import networkx as nx
import pytest
from graph_help import EXAMPLES, Hand, checked, deep, graphs
from hypothesis import given

from gkd_dsl.graph.draw import draw
from gkd_dsl.graph.draw_dot import to_dot
from gkd_dsl.graph.draw_layout import layout, spread
from gkd_dsl.graph.draw_mermaid import to_mermaid
from gkd_dsl.graph.draw_svg import to_svg
from gkd_dsl.graph.drawing import Drawing, drawing
from gkd_dsl.graph.families import family_name, indices
from gkd_dsl.graph.schema import from_json
from gkd_dsl.types import BATCH, LENGTH, TensorType


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> nx.MultiDiGraph:
    return checked(deep(tmp_path_factory.mktemp("deep")))


def test_twelve_layers_are_a_handful_of_boxes(twelve: nx.MultiDiGraph) -> None:
    assert len(twelve) > 130
    found = drawing(twelve)
    assert len(found.boxes) == 27
    assert found.note == ""
    assert sorted(box.lines[0] for box in found.boxes if box.count > 1) == [
        "hidden[1..12] x12", "hidden[1..12] x12", "layer[0..11].attn.scores x12", "layer[0..11].attn.scores x12",
        "mse x12", "mse x12", "project x12",
    ]  # fmt: skip


def test_three_of_a_kind_are_drawn_alone_and_four_as_one() -> None:
    for layers, boxes in ((3, 3), (4, 1)):
        hand = Hand()
        atoms = [hand.atom(hand.tap("s", i), hand.op("detach", x=hand.tap("t", i))) for i in range(layers)]
        hand.stage("main", hand.loss("a", *atoms))
        assert sum(box.shape == "op" for box in drawing(hand.graph).boxes) == boxes


def test_taps_that_are_read_in_other_ways_are_no_family() -> None:
    hand = Hand()
    atoms = [hand.atom(hand.tap("s", i), hand.tap("t", i)) for i in range(4)]
    hand.stage("main", hand.loss("a", *atoms), hand.loss("b", hand.atom("s/hidden.0", "t/hidden.0", op="kl")))
    names = [box.lines[0] for box in drawing(hand.graph).boxes if box.group == "model/s"]
    assert names == ["forward", "hidden[0]", "hidden[1]", "hidden[2]", "hidden[3]"]


def test_masks_and_detach_are_not_boxes_and_detached_arrows_are_marked() -> None:
    hand = Hand()
    cut = hand.op("detach", x=hand.tap("t", 1))
    hand.stage("main", hand.loss("a", hand.atom(hand.tap("s", 1), cut, valid=hand.valid())))
    found = drawing(hand.graph)
    assert {box.key for box in found.boxes} == {
        "s/forward", "t/forward", "s/hidden.1", "t/hidden.1", "op/mse.1", "loss/a", "stage/main",
    }  # fmt: skip
    assert [(a.source, a.target) for a in found.arrows if a.detached] == [("t/hidden.1", "op/mse.1")]
    assert ("s/hidden.1", "op/mse.1", False) in {(a.source, a.target, a.detached) for a in found.arrows}


def test_tones_and_frames_say_what_is_trained(twelve: nx.MultiDiGraph) -> None:
    found = drawing(twelve)
    assert {box.tone for box in found.boxes if box.group == "model/s"} == {"trained"}
    assert {box.tone for box in found.boxes if box.group == "model/t"} == {"frozen"}
    assert [group.title for group in found.groups] == [
        "s (trained)", "t (frozen)", "projections", "batch", "stage inner", "stage outer",
    ]  # fmt: skip
    assert [g.title for g in drawing(checked(EXAMPLES / "reviews.gkd")).groups][:2] == [
        "s (trained in distil)", "t (trained in teach)",
    ]  # fmt: skip


def test_boxes_carry_shapes_and_arrows_weights(twelve: nx.MultiDiGraph) -> None:
    found = drawing(twelve)
    assert ("hidden[1..12] x12", "[B, L, 24]") in {box.lines for box in found.boxes}
    assert {a.label for a in found.arrows if a.target == "stage/outer"} == {"ramp(0 -> 1, until = 50%)", "0", ""}


def test_one_stage_is_drawn_alone(twelve: nx.MultiDiGraph) -> None:
    found = drawing(twelve, stage="outer")
    assert {box.lines[0] for box in found.boxes if box.shape == "stage"} == {"stage outer"}
    assert not any(box.lines[0].startswith("hidden") for box in found.boxes)
    with pytest.raises(KeyError):
        drawing(twelve, stage="none")
    assert "stage/inner" not in from_json(draw(twelve, "json", stage="outer"))
    with pytest.raises(KeyError):
        draw(twelve, "json", stage="none")


def test_a_large_drawing_is_cut_and_says_so() -> None:
    hand = Hand()
    for number in range(9):
        shape = TensorType("float", (BATCH, LENGTH))
        atom = hand.atom(
            hand.op(f"odd{number}x", shape, x=hand.tap("s", number)), hand.tap("t", number), op=f"x{number}y"
        )
        hand.loss("abcdefghi"[number], atom)
    hand.stage("main", *(f"loss/{name}" for name in "abcdefghi"))
    found = drawing(hand.graph, most=12)
    assert len(found.boxes) == 12
    assert "boxes are left out" in found.note
    assert any(box.shape == "stage" for box in found.boxes)
    kept = {box.key for box in found.boxes}
    assert {a.source for a in found.arrows} | {a.target for a in found.arrows} <= kept
    for text in (to_mermaid(found), to_dot(found), to_svg(found)):
        assert "boxes are left out" in text


def texts(found: Drawing) -> None:
    """Mermaid, DOT and SVG of a drawing hold every box and arrow, and are well formed."""
    mermaid = to_mermaid(found)
    assert mermaid.startswith("flowchart LR\n")
    assert mermaid.count("subgraph ") == len(found.groups)
    assert len(re.findall(r"^ *n\d+[\[({]", mermaid, re.M)) == len(found.boxes)
    assert len(re.findall(r"^ *n\d+ (?:-->|-\.->)", mermaid, re.M)) == len(found.arrows)
    for line in mermaid.splitlines():
        assert line.count('"') % 2 == 0
    dot = to_dot(found)
    assert dot.count("{") == dot.count("}") == 1 + len(found.groups)
    assert len(re.findall(r"^ *\"[^\"]+\" \[label=", dot, re.M)) == len(found.boxes)
    assert len(re.findall(r"^ *\"[^\"]+\" -> \"[^\"]+\"", dot, re.M)) == len(found.arrows)
    svg = ElementTree.fromstring(to_svg(found))
    space = "{http://www.w3.org/2000/svg}"
    shown = {"".join(node.itertext()) for node in svg.iter(f"{space}text")}
    assert {line for box in found.boxes for line in box.lines} <= shown
    assert sum(node.get("marker-end") is not None for node in svg.iter(f"{space}path")) == len(found.arrows)
    assert svg.get("viewBox", "").startswith("0 0 ")
    assert not list(svg.iter(f"{space}script"))


def test_texts_of_twelve_layers(twelve: nx.MultiDiGraph) -> None:
    texts(drawing(twelve))


@given(graphs())
def test_texts_and_places_of_random_graphs(graph: nx.MultiDiGraph) -> None:
    found = drawing(graph)
    texts(found)
    places = layout(found)
    boxes = list(places.boxes.values())
    for number, one in enumerate(boxes):
        assert one.x >= 0
        assert one.y >= 0
        assert one.x + one.width <= places.width
        assert one.y + one.height <= places.height
        for two in boxes[number + 1 :]:
            apart = one.x + one.width <= two.x or two.x + two.width <= one.x
            assert apart or one.y + one.height <= two.y or two.y + two.height <= one.y


def test_arrows_run_from_left_to_right(twelve: nx.MultiDiGraph) -> None:
    found = drawing(twelve)
    places = layout(found).boxes
    assert all(places[a.source].x + places[a.source].width < places[a.target].x for a in found.arrows)


def test_marks_of_html_are_escaped() -> None:
    hand = Hand()
    hand.stage("main", hand.loss('a<b>&"c', hand.atom(hand.tap("s", 1), hand.tap("t", 1))))
    found = drawing(hand.graph)
    ElementTree.fromstring(to_svg(found))
    assert "loss a#lt;b#gt;&#quot;c" in to_mermaid(found)
    assert r"loss a<b>&\"c" in to_dot(found)


def test_spread_keeps_order_and_wishes() -> None:
    assert spread([0.0, 100.0], [10.0, 10.0], 5.0) == [0.0, 100.0]
    assert spread([10.0, 10.0], [10.0, 10.0], 5.0) == [2.5, 17.5]
    assert spread([50.0, 0.0, 10.0], [10.0] * 3, 0.0) == [10.0, 20.0, 30.0]
    assert spread([], [], 1.0) == []


def test_names_of_families() -> None:
    assert indices([0, 1, 2, 3]) == "0..3"
    assert indices([2, 5, 8, 11]) == "2, 5, .., 11"
    assert indices([1, 4]) == "1, 4"
    assert indices([0, 1, 5]) == "0, 1, 5"
    assert family_name(["att.0", "att.1", "att.2"]) == "att[0..2]"
    assert family_name(["att"]) == "att"


def test_other_formats_are_refused(twelve: nx.MultiDiGraph) -> None:
    with pytest.raises(ValueError, match="no format 'png'"):
        draw(twelve, "png")


def test_every_format_of_the_examples(tmp_path: Path) -> None:
    for name in ("sentence_encoder", "reviews"):
        graph = checked(EXAMPLES / f"{name}.gkd")
        texts(drawing(graph))
        assert {format: bool(draw(graph, format)) for format in ("mermaid", "dot", "svg", "json")} == dict.fromkeys(
            ("mermaid", "dot", "svg", "json"), True
        )
