"""What `explain` says: the objective, numbers over time, the layer map, what counts, forwards, memory."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
from graph_help import EXAMPLES, MASK, Hand, checked, deep, graphs, twice
from hypothesis import given
from rich.console import Console

from gkd_dsl.graph.explain import Explanation, StageExplanation, explain, render
from gkd_dsl.graph.explain_words import condition, optim_words, source_words
from gkd_dsl.graph.nodes import OptimSpec, SourceSpec, TrainTarget
from gkd_dsl.schedules import Clock, Coin, Constant, InDrawnMap, Ramp, Span, combine
from gkd_dsl.types import BATCH, LENGTH, LossType

GOLDEN = Path(__file__).parent / "explain"


def text(explanation: Explanation, width: int = 100) -> str:
    out = io.StringIO()
    render(explanation, Console(file=out, width=width))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    return explain(checked(deep(tmp_path_factory.mktemp("deep"))), total_steps=101)


def stage(graph: nx.MultiDiGraph, **options: int) -> StageExplanation:
    return explain(graph, **options).stages[0]


@pytest.mark.parametrize("name", ["sentence_encoder", "reviews"])
def test_text_of_the_examples(name: str) -> None:
    """GKD_UPDATE_GOLDEN=1 writes the files anew; read the difference before it is kept."""
    found = text(explain(checked(EXAMPLES / f"{name}.gkd")))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GKD_UPDATE_GOLDEN"):
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")
    assert max(len(line) for line in found.splitlines()) <= 100
    assert "\x1b" not in found


def test_json_of_the_examples_is_plain() -> None:
    found = explain(checked(EXAMPLES / "reviews.gkd")).as_dict()
    assert json.loads(json.dumps(found))["stages"][1]["objective"] == "0.3 * hard + 0.7 * soft + attn + hid"


def test_weights_at_the_chosen_steps(twelve: Explanation) -> None:
    outer = twelve.stages[1]
    assert (outer.steps, outer.points) == (200, (0, 1, 20, 50, 100, 150, 199))
    row = next(row for row in outer.weights if row.name == "soft")
    half = 199 / 2
    assert row.values == pytest.approx([min(1.0, step / half) for step in outer.points])
    assert [(row.name, row.schedule, row.values) for row in twelve.stages[0].weights] == [
        ("hid", "1", ()), ("emb", "1", ()), ("attn", "1", ()),
    ]  # fmt: skip
    assert twelve.stages[0].points == (0, 1, 10, 25, 50, 76, 100)


def test_a_schedule_inside_a_loss_or_an_operator_has_a_row() -> None:
    hand = Hand()
    ramp = Ramp(4.0, 1.0, Span(100.0, "percent"))
    atom = hand.op(
        "mse",
        hand.graph.nodes[hand.atom(hand.tap("s", 1), hand.tap("t", 1))]["node"].type,
        attrs=(("temperature", ramp),),
        student="s/hidden.1",
        teacher="t/hidden.1",
    )
    hand.stage("main", hand.loss("a", atom, "op/mse.1", by=(Constant(1.0), ramp)))
    rows = {row.name: row.values for row in stage(hand.graph, total_steps=9).weights}
    assert rows == {
        "a": (),
        "a, 1 of 2 terms": (4.0, 3.625, 3.25, 2.5, 1.375, 1.0),
        "temperature of mse": (4.0, 3.625, 3.25, 2.5, 1.375, 1.0),
    }


def test_a_drawn_map_is_one_row() -> None:
    hand = Hand()
    atoms = [hand.atom(hand.tap("s", i), hand.tap("t", j)) for i in (1, 2) for j in (1, 2, 3)]
    by = tuple(InDrawnMap(i, j, 2, 3, 1, 5) for i in range(2) for j in range(3))
    hand.stage("main", hand.loss("a", *atoms, by=by))
    row = stage(hand.graph, total_steps=30).weights[1]
    assert (row.name, row.schedule) == ("a, sum over 6 terms", "pairs drawn every 1 epoch, seed = 5")
    assert row.values == (1.0,) * 7  # one pair at a time


def test_a_loss_of_weight_zero_is_named_and_not_computed(twelve: Explanation) -> None:
    assert [(row.name, row.computed, len(row.terms)) for row in twelve.stages[1].losses] == [
        ("soft", True, 1),
        ("hard", False, 0),
    ]
    assert "hard = cross_entropy(s.logits, batch.labels)    (weight 0: not computed)" in text(twelve)


def test_the_layer_map(twelve: Explanation) -> None:
    rows = [
        (row.loss, row.student, row.student_through, row.teacher, row.student_shape)
        for row in twelve.stages[0].layer_map
    ]
    assert rows[:2] == [
        ("hid", "s.hidden[1]", "W", "t.hidden[1]", "[B, L, 48]"),
        ("hid", "s.hidden[2]", "W", "t.hidden[2]", "[B, L, 48]"),
    ]
    assert rows[12] == ("emb", "s.hidden[0]", "W", "t.hidden[0]", "[B, L, 48]")
    assert rows[-1] == ("attn", "s.layer[11].attn.scores", "", "t.layer[11].attn.scores", "[B, 12, L, L]")
    assert len(rows) == 25


def test_terms_alike_are_one_row_that_says_what_counts(twelve: Explanation) -> None:
    term = twelve.stages[0].losses[2].terms[0]
    assert (term.op, term.times, term.shape) == ("mse", 12, "Loss[B, 12, L, L]")
    assert term.counts == "pairs of valid tokens (attention_mask)"
    assert term.denominator == "their number x 12 (s.A) over all micro-batches and ranks"


def test_masks_in_words() -> None:
    hand = Hand()
    valid = hand.valid()
    unequal = hand.op("not_equal", MASK, attrs=(("b", -100.0),), a="batch/labels")
    assert (
        condition(hand.graph, hand.op("and", MASK, a=valid, b=unequal))
        == "valid tokens (attention_mask), and labels != -100"
    )
    shifted = hand.op("next_token", MASK, x=valid)
    labels = hand.op("next_token", MASK, x="batch/labels")
    later = hand.op("not_equal", MASK, attrs=(("b", -100.0),), a=labels)
    words = "valid tokens (attention_mask), and labels != -100, shifted to the next token"
    assert condition(hand.graph, hand.op("and", MASK, a=shifted, b=later)) == words
    assert condition(hand.graph, shifted) == "valid tokens (attention_mask), shifted to the next token"
    assert condition(hand.graph, later) == "labels != -100, shifted to the next token"
    equal = hand.op("equal", MASK, a="batch/labels", b="batch/input_ids")
    assert (
        condition(hand.graph, hand.op("or", MASK, a=equal, b=hand.op("not", MASK, x=valid)))
        == "labels == input_ids, or not (valid tokens (attention_mask))"
    )
    mixed = hand.op("and", MASK, a=shifted, b=unequal)
    assert (
        condition(hand.graph, mixed) == "valid tokens (attention_mask), shifted to the next token, and labels != -100"
    )


def test_a_loss_without_a_mask_counts_all() -> None:
    hand = Hand()
    hand.stage("main", hand.loss("a", hand.atom(hand.tap("s", 1), hand.tap("t", 1))))
    assert stage(hand.graph).losses[0].terms[0].counts == "every position, padding too"


def test_weights_of_values_and_the_order_of_pairs_in_words() -> None:
    hand = Hand()
    atom = hand.op(
        "mse", LossType((BATCH, LENGTH, LENGTH)), attrs=(("causal", True),), student=hand.tap("s", 1),
        teacher=hand.tap("t", 1), valid=hand.valid(), token_weight="batch/labels", sample_weight="batch/input_ids",
    )  # fmt: skip
    hand.stage("main", hand.loss("a", atom))
    (term,) = stage(hand.graph).losses[0].terms
    assert term.counts == (
        "pairs of valid tokens (attention_mask), the key not after the query; "
        "values times the token weight labels; values times the sample weight input_ids"
    )


def test_weights_are_those_of_the_stages_clock() -> None:
    """Tokens of all micro-batches, and draws of the stage's seed."""
    hand = Hand()
    loss = hand.loss("a", hand.atom(hand.tap("s", 1), hand.tap("t", 1)))
    ramp, coin = Ramp(0.0, 1.0, Span(8.0 * 3 * 4 * 100, "tokens")), Coin(Constant(0.5), "c")
    key = hand.stage("main", loss, weights=(combine("*", ramp, Constant(2.0)),))
    node = replace(hand.graph.nodes[key]["node"], accumulate=4, batch_size=8, seed=5)
    hand.graph.nodes[key]["node"] = node
    found = stage(hand.graph, length=3, total_steps=101)
    assert found.weights[0].values == pytest.approx([2 * min(1.0, point / 100) for point in found.points])
    hand.graph.nodes[key]["node"] = replace(node, weights=(coin,))
    drawn = [stage(hand.graph, total_steps=101).weights[0].values]
    assert drawn == [tuple(coin.value(Clock(point, 101, 101.0, seed=5)) for point in found.points)]


def test_scores_and_probs_of_a_layer_are_one_hook(tmp_path: Path) -> None:
    path = deep(tmp_path)
    loss = "loss attn = " + " + ".join(
        f"mse(s.layer[3].attn.{part} <- t.layer[3].attn.{part})" for part in ("scores", "probs")
    )
    lines = [loss if line.startswith("loss attn") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines).replace("minimize hid + emb + attn", "minimize attn"))
    assert [forward.hooks for forward in explain(checked(path)).stages[0].forwards] == [1, 1]


def test_forwards_say_how_far_they_run(twelve: Explanation) -> None:
    inner, outer = twelve.stages
    assert [(f.model, f.gradient, f.extent, f.hooks) for f in inner.forwards] == [
        ("s", True, "up to layer 11 of 0..11", 25),
        ("t", False, "up to layer 11 of 0..11", 25),
    ]
    assert inner.forwards[0].taps == ("hidden[0..12]", "layer[0..11].attn.scores")
    assert [(f.model, f.extent, f.hooks) for f in outer.forwards] == [("s", "runs whole", 0), ("t", "runs whole", 0)]


def test_what_is_shared() -> None:
    shared = stage(twice().graph).shared
    assert "s.hidden[2] serves 2 losses: a, b" in shared
    assert "mse: written 2 times, computed once" in shared


def test_losses_that_read_the_same_logits() -> None:
    assert explain(checked(EXAMPLES / "reviews.gkd")).stages[1].same_logits == (("hard", "soft"),)


def test_models_that_nothing_reads_are_not_loaded() -> None:
    hand = Hand("s", "t", "u")
    gone = hand.loss("gone", hand.atom(hand.tap("s", 1), hand.tap("t", 1)))
    kept = hand.loss("kept", hand.atom(hand.tap("s", 1), hand.tap("s", 2)))
    hand.stage("main", gone, kept, weights=(Constant(0.0), Constant(1.0)))
    found = {model.name: (model.use, model.stages) for model in explain(hand.graph).models}
    assert found == {
        "s": ("loaded", ("main",)),
        "t": ("not loaded: nothing reads it", ()),
        "u": ("not loaded: nothing reads it", ()),
    }


def test_a_model_that_only_a_truncated_one_is_made_of() -> None:
    found = {model.name: model.use for model in explain(checked(EXAMPLES / "reviews.gkd")).models}
    assert found == {"base": "read to make s, never run", "s": "layers 1, 3, 5 of base", "t": "loaded"}


def test_what_trains() -> None:
    hand = Hand()
    shown = hand.op("project", x=hand.tap("s", 1), block=hand.project())
    trains = (TrainTarget("model", "s", "layer.3"), TrainTarget("model", "t"), TrainTarget("project", "W"))
    hand.stage("main", hand.loss("a", hand.atom(shown, hand.tap("t", 1))), trains=trains)
    assert stage(hand.graph).trains == ("s.layer.3", "t (the whole model)", "W (projection 8 -> 8, 72 parameters)")


def test_memory_follows_batch_and_length() -> None:
    graph = twice().graph
    assert stage(graph, batch=2, length=3).live_bytes == 4 * (2 * 48 + 6)
    assert stage(graph, length=3).batch == 32
    limited = explain(checked(EXAMPLES / "sentence_encoder.gkd"), length=512).stages[0]
    assert limited.length == 32


def test_optimisers_in_words() -> None:
    assert optim_words(OptimSpec(clip=None)) == "adamw, lr 5e-05, warmup 0%, decay linear, weight decay 0.01"
    sgd = OptimSpec("sgd", lr=0.1, momentum=0.9, decay="constant", warmup=Span(5.0, "steps"))
    assert optim_words(sgd) == "sgd, lr 0.1, warmup 5 steps, decay constant, momentum 0.9, gradients clipped at 1"


def test_a_tab_in_a_data_source_is_shown_as_it_is_written() -> None:
    source = SourceSpec("d", "csv", (("delimiter", "\t"), ("path", 'a"b\\c.tsv')))
    assert source_words(source) == r'd = csv(delimiter = "\t", path = "a\"b\\c.tsv")'


@given(graphs())
def test_every_graph_can_be_explained(graph: nx.MultiDiGraph) -> None:
    found = explain(graph, total_steps=17)
    json.dumps(found.as_dict())
    assert text(found).count("what counts") == len(found.stages)
