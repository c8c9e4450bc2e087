"""Passes as JSON, in drawings, in explain, and under the rules of the graph."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from graph_help import checked, same
from rich.console import Console

from gkd_dsl.graph.access import GraphError
from gkd_dsl.graph.draw import draw
from gkd_dsl.graph.explain import explain, render
from gkd_dsl.graph.passes import run_passes
from gkd_dsl.graph.schema import fingerprint, from_json, to_json
from gkd_dsl.graph.verify import verify

SPECS = Path(__file__).parent.parent / "meaning" / "specs"
NAMES = ("theseus", "diito", "lrc_bert")


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_with_passes_comes_back_whole(name: str) -> None:
    graph = run_passes(checked(SPECS / f"{name}.gkd"))
    back = from_json(to_json(graph))
    assert same(graph, back)
    assert fingerprint(back) == fingerprint(graph)
    for key in graph:
        assert graph.nodes[key]["node"] == back.nodes[key]["node"]


def test_a_condition_is_part_of_the_fingerprint() -> None:
    graph = checked(SPECS / "theseus.gkd")
    other = graph.copy()
    node = graph.nodes["mixed/forward"]["node"]
    changed = tuple(replace(change, layers=change.layers[:1]) for change in node.changes)
    other.nodes["mixed/forward"]["node"] = replace(node, changes=changed)
    assert fingerprint(other) != fingerprint(graph)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("theseus", ("pass mixed<br/>layer[0..3] from t",)),
        ("diito", ("pass s_cf<br/>swaps hidden[0..3]", "pass t_src<br/>over other samples")),
        ("lrc_bert", ("pass adv<br/>adds to hidden[0]", "pass probe<br/>gradient only")),
    ],
)
def test_a_drawing_says_what_a_pass_does(name: str, labels: tuple[str, ...]) -> None:
    drawn = draw(checked(SPECS / f"{name}.gkd"), "mermaid")
    for label in labels:
        assert f'"{label}"' in drawn


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "theseus",
            ("mixed: a pass of s", "blocks 0..2 of t in the place of block 0 when not coin(", "mixed.hidden[4]"),
        ),
        (
            "diito",
            ("hidden[2] from t_src.hidden[2] at random_spans(attention_mask)", "s_cf.logits", "of other samples"),
        ),
        ("lrc_bert", ("l2norm(gradient(..., at = probe.hidden[0]))) added to hidden[0]", "adv.logits", "alone")),
    ],
)
def test_explain_says_what_a_pass_changes(name: str, lines: tuple[str, ...]) -> None:
    out = io.StringIO()
    render(explain(checked(SPECS / f"{name}.gkd")), Console(file=out, width=200))
    for line in lines:
        assert line in out.getvalue()


@pytest.mark.parametrize(("name", "key", "slot"), [
    ("theseus", "mixed/forward", "replace.0"), ("diito", "s_cf/forward", "swap.1.source"),
    ("lrc_bert", "adv/forward", "add.0"),
])  # fmt: skip
def test_a_change_without_what_it_reads_breaks_a_rule(name: str, key: str, slot: str) -> None:
    graph = checked(SPECS / f"{name}.gkd")
    verify(graph)
    edges = [(a, b, k) for a, b, k, s in graph.in_edges(key, keys=True, data="slot") if s == slot]
    graph.remove_edges_from(edges)
    with pytest.raises(GraphError, match="its changes read"):
        verify(graph)


def test_a_lender_that_is_another_model_breaks_a_rule() -> None:
    graph = checked(SPECS / "theseus.gkd")
    node = graph.nodes["mixed/forward"]["node"]
    changed = (replace(node.changes[0], model="s"), *node.changes[1:])
    graph.nodes["mixed/forward"]["node"] = replace(node, changes=changed)
    with pytest.raises(GraphError, match=r"slot replace\.0 holds"):
        verify(graph)
