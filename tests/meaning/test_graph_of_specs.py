"""The graph that a spec stands for: taps, slots, masks, the causal shift, what is detached."""

from __future__ import annotations

import networkx as nx
import pytest
from meaning_help import (
    CAUSAL,
    HARD,
    LINES,
    REVIEWS,
    SHORT,
    SOFT,
    STUDENT,
    TEACHER,
    check,
    codes,
    good,
    inputs,
    node,
    parts,
    spec,
    stage,
    tree,
)

from gkd_dsl.aligners import random_sorted
from gkd_dsl.graph.nodes import ForwardNode, LossNode, MetricNode, OpNode, StageNode, TapNode, TrainTarget
from gkd_dsl.meaning.check import Checked
from gkd_dsl.models.taps import TapPath
from gkd_dsl.schedules import Clock, Constant, Ramp, Span

VALID = "valid_tokens(x=batch/attention_mask)"


def weights(checked: Checked, name: str = "main", step: int = 0, total: int = 100) -> dict[str, float]:
    """The weight of each loss of a stage at a step."""
    found = node(checked, f"stage/{name}")
    assert isinstance(found, StageNode)
    clock = Clock(step, total, 10.0)
    losses = inputs(checked, found.key)
    return {losses[str(i)]: weight.value(clock) for i, weight in enumerate(found.weights)}


def test_soft_labels_of_a_classifier() -> None:
    checked = good(spec(HARD + SOFT + stage("minimize 0.3 * hard + 0.7 * soft")))
    assert parts(checked, "soft") == ["kl(student=s/logits, teacher=detach(x=t/logits))"]
    assert parts(checked, "hard") == [
        "cross_entropy(labels=batch/labels, student=s/logits, valid=not_equal(a=batch/labels))"
    ]
    assert weights(checked) == {"loss/hard": 0.3, "loss/soft": 0.7}
    assert {type(node(checked, key)).__name__ for key in checked.graph} == {
        "ModelNode", "BatchNode", "ForwardNode", "TapNode", "OpNode", "LossNode", "StageNode",
    }  # fmt: skip
    op = next(node(checked, key) for key in inputs(checked, "loss/soft").values())
    assert isinstance(op, OpNode)
    assert op.attr("temperature") == 2.0
    assert str(op.type) == "Loss[B]"
    assert nx.is_directed_acyclic_graph(checked.graph)


def test_forwards_read_the_batch() -> None:
    checked = good(spec(SOFT + stage("minimize soft")))
    assert inputs(checked, "s/forward") == {
        "attention_mask": "batch/attention_mask",
        "input_ids": "batch/input_ids",
        "model": "model/s",
    }
    assert isinstance(node(checked, "t/forward"), ForwardNode)
    assert inputs(checked, "t/logits") == {"forward": "t/forward"}


def test_taps_are_canonical_and_shared() -> None:
    text = (
        "loss a = mse(s.layer[3].out <- t.layer[-1].out)\n"
        "loss b = cosine_distance(s.hidden[4] <- t.hidden[12])\n"
        "loss c = cosine_distance(s.hidden[-1] <- t.layer[11].out)\n"
    )
    checked = good(spec(text + stage("minimize a + b + c"), models=TEACHER + SHORT))
    taps = sorted(key for key in checked.graph if isinstance(node(checked, key), TapNode))
    assert taps == ["s/hidden.4", "t/hidden.12"]
    tap = node(checked, "t/hidden.12")
    assert isinstance(tap, TapNode)
    assert (tap.path, str(tap.type), len(tap.locations)) == (TapPath("hidden", 12), "Float[B, L, 768]", 3)


def test_a_mask_narrows_the_valid_tokens() -> None:
    text = "mask early = batch.input_ids != 6\nloss hid = mse(s.final <- t.final, mask = early)\n"
    checked = good(spec(text + stage("minimize hid"), models=TEACHER + SHORT))
    assert parts(checked, "hid") == [
        f"mse(student=s/hidden.4, teacher=detach(x=t/hidden.12), valid=and(a={VALID}, b=not_equal(a=batch/input_ids)))"
    ]


@pytest.mark.parametrize(
    "mask", ["h[0] > 0", "(h[0] > 0) & (batch.attention_mask != 0)", "batch.attention_mask == h[0]"]
)
def test_a_mask_that_is_partly_of_a_model_is_none(mask: str) -> None:
    text = f"let h = t.final\nloss a = mse(s.final <- t.final, mask = {mask})\n" + stage("minimize a")
    assert codes(check(spec(text, TEACHER + SHORT))) == ["E0305"]


def test_a_causal_model_predicts_the_next_token() -> None:
    text = 'loss soft = kl(s.logits <- t.logits, align = "trim")\n' + HARD
    checked = good(spec(text + stage("minimize soft + hard"), models=CAUSAL, data=""))
    shifted = f"and(a={VALID}, b=next_token(x={VALID}))"
    assert parts(checked, "soft") == [f"kl(student=s/logits, teacher=detach(x=t/logits), valid={shifted})"]
    labels = "next_token(x=batch/labels)"
    assert parts(checked, "hard") == [
        f"cross_entropy(labels={labels}, student=s/logits, valid=and(a={shifted}, b=not_equal(a={labels})))"
    ]
    kl = node(checked, inputs(checked, "loss/soft")["0"])
    assert isinstance(kl, OpNode)
    assert (kl.attr("align"), kl.attr("vocabulary")) == ("trim", 151936)


def test_a_masked_language_model_is_not_shifted() -> None:
    models = 'teacher t = hf("models/teacher_mlm")\nstudent s = hf("models/student_mlm")\n'
    checked = good(spec(HARD + SOFT + stage("minimize hard + soft"), models=models, data=LINES))
    assert not [key for key in checked.graph if getattr(node(checked, key), "op", "") == "next_token"]
    assert parts(checked, "hard") == [
        f"cross_entropy(labels=batch/labels, student=s/logits, valid=and(a={VALID}, b=not_equal(a=batch/labels)))"
    ]


@pytest.mark.parametrize(("models", "causal"), [(CAUSAL, True), (TEACHER + SHORT + REVIEWS, False)])
def test_attention_maps_of_causal_models_end_at_the_query(models: str, causal: bool) -> None:
    text = "loss rel = attention_kl(self_relation(s.layer[0].attn.v, heads = 2) <- self_relation(t.layer[0].attn.v, heads = 2))\n"
    checked = good(spec(text + stage("minimize rel"), models=models, data=""))
    op = node(checked, inputs(checked, "loss/rel")["0"])
    assert isinstance(op, OpNode)
    scores = "loss att = attention_kl(s.layer[0].attn.scores <- detach(s.layer[1].attn.scores))\n"
    checked = good(spec(HARD + scores + stage("minimize hard + att"), models=models.replace("teacher t", "model _t"), data="")) if causal else good(
        spec(HARD + scores + stage("minimize hard + att"), models='student s = hf("models/student")\n' + REVIEWS, data="")
    )  # fmt: skip
    op = node(checked, inputs(checked, "loss/att")["0"])
    assert isinstance(op, OpNode)
    assert op.attr("causal") is causal


def test_a_projection_on_the_teachers_side_still_trains() -> None:
    text = "project Q = linear(t.H -> s.H)\nloss hid = mse(s.final <- t.final |> Q)\n"
    checked = check(spec(text + stage("minimize hid")))
    assert codes(checked) == ["W0704"]
    assert parts(checked, "hid") == [
        f"mse(student=s/hidden.4, teacher=project(block=project/Q, x=detach(x=t/hidden.12)), valid={VALID})"
    ]
    assert set(checked.stages[0].trains) == {TrainTarget("project", "Q"), TrainTarget("model", "s")}


def test_an_anchored_projection_of_the_teacher_is_no_reason_to_warn() -> None:
    text = (
        "project Q = linear(t.H -> 2)\n"
        "loss anchor = cross_entropy(detach(t.cls) |> Q, batch.labels)\n"
        "loss soft = kl(s.logits <- t.cls |> Q)\n"
    )
    good(spec(text + stage("minimize soft + anchor")))
    frozen = "project Q = linear(t.H -> s.H)\nloss hid = mse(s.final <- t.final |> Q)\n"
    good(spec(frozen + stage("freeze Q\nminimize hid")))


def test_a_projection_over_layers_is_shared_or_one_for_each() -> None:
    maps = "for (i, j) in uniform(s.layer, t.layer)"
    one = f"project W = linear(s.H -> t.H)\nloss hid = sum(mse(s.layer[i].out |> W <- t.layer[j].out) {maps})\n"
    checked = good(spec(one + stage("minimize hid")))
    assert [key for key in checked.graph if key.startswith("project/")] == ["project/W"]
    each = one.replace("project W", "project W[i]").replace("|> W", "|> W[i]")
    checked = good(spec(each + stage("minimize hid")))
    assert sorted(key for key in checked.graph if key.startswith("project/")) == [f"project/W.{i}" for i in range(4)]
    assert {target.name for target in checked.stages[0].trains} == {"s", *(f"W.{i}" for i in range(4))}


def test_sum_and_mean_over_a_layer_map() -> None:
    maps = "for (i, j) in uniform(s.layer, t.layer)"
    text = f"loss a = sum(mse(s.layer[i].out <- t.layer[j].out) {maps})\n" + f"loss b = mean(cosine_distance(s.layer[i].out <- t.layer[j].out) {maps})\n"  # fmt: skip
    checked = good(spec(text + stage("minimize a + 3 * b"), models=TEACHER + SHORT))
    a, b = node(checked, "loss/a"), node(checked, "loss/b")
    assert isinstance(a, LossNode)
    assert isinstance(b, LossNode)
    assert a.coefficients == (Constant(1.0),) * 4
    assert b.coefficients == (Constant(0.25),) * 4
    assert weights(checked) == {"loss/a": 1.0, "loss/b": 3.0}
    students = [inputs(checked, key)["student"] for key in inputs(checked, "loss/a").values()]
    assert students == [f"s/hidden.{i + 1}" for i in range(4)]
    teachers = [inputs(checked, inputs(checked, key)["teacher"])["x"] for key in inputs(checked, "loss/a").values()]
    assert teachers == ["t/hidden.3", "t/hidden.6", "t/hidden.9", "t/hidden.12"]


def test_a_family_is_made_for_the_indices_that_are_asked_for() -> None:
    text = "loss hid[i, j] = mse(s.layer[i].out <- t.layer[j].out)\n"
    checked = good(
        spec(text + stage("minimize hid[0, 2] + sum(hid[k, 3 * k + 2] for k in 0 ..= 2)"), models=TEACHER + SHORT)
    )
    assert weights(checked) == {"loss/hid.0.2": 2.0, "loss/hid.1.5": 1.0, "loss/hid.2.8": 1.0}


def test_a_loss_as_a_function_of_models() -> None:
    text = "loss kd_loss(teacher a, student b) = kl(b.logits <- a.logits, temperature = 3.0)\n"
    models = (
        'model big = hf("models/teacher")\nmodel mid = hf("models/eight_heads")\nmodel tiny = hf("models/student")\n'
    )
    checked = good(
        spec(
            text + stage("minimize kd_loss(big -> mid)", "first")
            + stage("minimize kd_loss(mid -> tiny) + 2 * kd_loss(big, tiny)", "second"),
            models=models,
        )
    )  # fmt: skip
    first, second = checked.stages
    assert first.trains == (TrainTarget("model", "mid"),)
    assert second.trains == (TrainTarget("model", "tiny"),)
    assert list(weights(checked, "second").values()) == [1.0, 2.0]


def test_weights_are_added_and_may_be_schedules() -> None:
    checked = good(
        spec(HARD + SOFT + stage("minimize hard + ramp(0 -> 2, until = 100%) * (soft + hard) / 2 - 0.25 * hard"))
    )
    assert weights(checked, step=0) == {"loss/hard": 0.75, "loss/soft": 0.0}
    assert weights(checked, step=99) == {"loss/hard": 1.75, "loss/soft": 1.0}
    assert checked.stages[0].weights[1].value(Clock(50, 101, 10.0)) == pytest.approx(0.5)


def test_a_temperature_may_be_a_schedule() -> None:
    checked = good(
        spec("loss soft = kl(s.logits <- t.logits, temperature = ramp(8 -> 1, until = 50%))\n" + stage("minimize soft"))
    )
    op = node(checked, inputs(checked, "loss/soft")["0"])
    assert isinstance(op, OpNode)
    assert op.attr("temperature") == Ramp(8.0, 1.0, Span(50.0, "percent"))


@pytest.mark.parametrize(("reducer", "share"), [("sum", 1.0), ("mean", 1.0 / 3.0)])
def test_a_drawn_layer_map_counts_each_pair_in_its_epochs(reducer: str, share: float) -> None:
    drawn = "random_sorted(s.layer, t.layer, every = 1 epoch, seed = 3)"
    text = f"loss hid = {reducer}(mse(s.layer[i].out <- t.layer[j].out) for (i, j) in {drawn})\n"
    checked = good(spec(text + stage("minimize hid"), models=TEACHER + SHORT))
    loss = node(checked, "loss/hid")
    assert isinstance(loss, LossNode)
    keys = list(inputs(checked, "loss/hid").values())
    for epoch in range(5):
        counted = {}
        for weight, key in zip(loss.coefficients, keys, strict=True):
            amount = weight.value(Clock(epoch * 10, 100, 10.0))
            if amount:
                pair = inputs(checked, key)
                teacher = inputs(checked, pair["teacher"])["x"]
                counted[int(pair["student"].split(".")[1]) - 1, int(teacher.split(".")[1]) - 1] = amount
        wanted = random_sorted(4, 12, seed=3, epoch=epoch)
        assert list(counted) == wanted
        assert list(counted.values()) == pytest.approx([share] * 3)


def test_a_map_may_be_drawn_once() -> None:
    drawn = "random_sorted(s.layer, t.layer, seed = 3)"
    text = f"loss hid = sum(mse(s.layer[i].out <- t.layer[j].out) for (i, j) in {drawn})\n"
    checked = good(spec(text + stage("minimize hid"), models=TEACHER + SHORT))
    assert len(parts(checked, "hid")) == 3


def test_metrics_are_measured_and_kept_by() -> None:
    text = HARD + "metric acc = accuracy(s.logits, batch.labels)\nmetric held = soft\n" + SOFT
    checked = good(spec(text + stage("minimize hard\nevaluate acc, held every 50 steps\nkeep best by acc")))
    found = checked.stages[0]
    assert [(each.metrics, each.every) for each in found.evaluate] == [(("acc", "held"), Span(50.0, "steps"))]
    assert found.keep_best == "acc"
    acc, held = node(checked, "metric/acc"), node(checked, "metric/held")
    assert isinstance(acc, MetricNode)
    assert isinstance(held, MetricNode)
    assert (acc.greater_is_better, held.greater_is_better) == (True, False)
    assert (held.op, inputs(checked, "stage/main")["metric.1"]) == ("mean_loss", "metric/held")


def test_weights_of_samples() -> None:
    text = "let u = detach(entropy(t.logits) / log(s.C))\nloss soft = mean(u * per_sample(kl(s.logits <- t.logits)))\n"
    checked = good(spec(text + stage("minimize soft")))
    div = next(n for n in (node(checked, key) for key in checked.graph) if getattr(n, "op", "") == "div")
    assert isinstance(div, OpNode)
    assert div.attr("b") == pytest.approx(0.6931471805599453)
    assert "per_sample(x=kl(" in parts(checked, "soft")[0]


def test_student_of_the_teachers_width_needs_no_projection() -> None:
    good(spec("loss hid = mse(s.final <- t.final)\n" + stage("minimize hid"), models=TEACHER + SHORT))
    found = check(spec("loss hid = mse(s.final <- t.final)\n" + stage("minimize hid"), models=TEACHER + STUDENT))
    assert codes(found) == ["E0301"]


@pytest.mark.parametrize(
    ("let", "name"),
    [("let z = l2norm(t.final |> Q)", "z"), ("let z[i] = l2norm(t.hidden[i] |> Q)", "z[12]")],
)
def test_a_named_value_on_the_teachers_side_trains_its_projection(let: str, name: str) -> None:
    text = f"project Q = linear(t.H -> s.H)\n{let}\nloss hid = mse(s.final <- {name})\n"
    checked = check(spec(text + stage("minimize hid")))
    assert codes(checked) == ["W0704"]
    teacher = "l2norm(x=project(block=project/Q, x=detach(x=t/hidden.12)))"
    assert parts(checked, "hid") == [f"mse(student=s/hidden.4, teacher={teacher}, valid={VALID})"]
    assert set(checked.stages[0].trains) == {TrainTarget("project", "Q"), TrainTarget("model", "s")}


def test_a_value_of_a_model_that_also_learns_is_detached_right_of_the_arrow() -> None:
    models = TEACHER + "model mid = truncated(t, layers = [0, 2, 4, 6, 8, 10])\n" + SHORT
    text = "let deep = mid.final\nlet twice[k] = k * mid.final\n"
    text += "loss a = mse(s.final <- deep)\nloss b = mse(s.final <- twice[2])\nloss c = mse(mid.final <- t.final)\n"
    checked = good(spec(text + stage("minimize a + b", "one") + stage("minimize c", "two"), models=models))
    assert parts(checked, "a") == ["mse(student=s/hidden.4, teacher=detach(x=mid/hidden.6), valid=valid_tokens(x=batch/attention_mask))"]  # fmt: skip
    (twice,) = parts(checked, "b")
    assert "teacher=detach(x=mul(b=mid/hidden.6))" in twice
    assert [found.name for found in checked.stages[0].trains] == ["s"]


@pytest.mark.parametrize(
    ("loss", "models", "last"),
    [
        ("mse(cls(2 * s.final) <- cls(t.final))", TEACHER + SHORT, False),
        ("mse(cls(2 * s.final) <- cls(detach(s.final)))", CAUSAL, True),
    ],
)
def test_the_token_that_stands_for_a_text_is_the_last_of_a_decoder(loss: str, models: str, last: bool) -> None:
    checked = check(spec(f"loss a = {loss}\n" + stage("minimize a"), models, "" if last else REVIEWS))
    assert checked.ok
    found = [node(checked, key) for key in checked.graph if key.startswith("op/cls")]
    assert [op.attr("last") for op in found if isinstance(op, OpNode)] == [last, last]


def test_logits_that_are_projected_still_predict_the_next_token() -> None:
    text = "project W = linear(s.V -> t.V)\nloss soft = kl(s.logits |> W <- t.logits)\n" + stage("minimize soft")
    (made,) = parts(good(spec(text, CAUSAL, "")), "soft")
    assert made.endswith(f"valid=and(a={VALID}, b=next_token(x={VALID})))")


@pytest.mark.parametrize("student", ["2 * p.final", "p.final |> W", "(2 * p.final) |> W"])
def test_what_is_made_of_other_texts_counts_their_tokens(student: str) -> None:
    text = "project W = linear(s.H -> t.H)\npass p = s(roll(batch))\npass q = t(roll(batch))\n"
    text += f"loss a = mse({student} <- q.final)\n" + stage("minimize a")
    checked = check(spec(text, models=TEACHER + SHORT))
    assert [d.code for d in checked.diagnostics if d.code != "W0701"] == []
    (made,) = parts(checked, "a")
    assert made.endswith("valid=valid_tokens(x=roll(x=batch/attention_mask)))")


def test_the_mean_of_tensors_is_their_sum_over_their_number() -> None:
    text = "let {0} = {1}(s.layer[i].out for i in 0 ..< 4)\n"
    text = text.format("total", "sum") + text.format("middle", "mean")
    text += "loss a = mse(total <- detach(s.final))\nloss b = mse(middle <- detach(s.final))\n"
    checked = good(spec(text + stage("minimize a + b"), STUDENT))
    found = [op for op in (node(checked, key) for key in checked.graph) if isinstance(op, OpNode) and op.op == "mul"]
    assert [op.attr("b") for op in found] == [0.25]
    (made,) = parts(checked, "b")
    assert made.startswith("mse(student=mul(a=add(a=add(a=add(")


def test_a_loss_that_is_taken_by_samples_counts_as_it_did_alone() -> None:
    masked = "mse(s.final <- t.final, mask = batch.input_ids != 7)"
    text = f"let w = softmax(t.logits)\nloss a = mean(w[0] * per_sample({masked}))\nmetric m = {masked}\n"
    checked = good(spec(text + stage("minimize a\nevaluate m every 1 epoch"), TEACHER + SHORT))
    counted = f"and(a={VALID}, b=not_equal(a=batch/input_ids))"
    (key,) = (key for key in checked.graph if key.startswith("op/per_sample"))
    for found in (key, "metric/m"):
        assert tree(checked, inputs(checked, found)["valid"]) == counted


def test_a_column_of_whole_numbers_masks_where_it_is_not_zero() -> None:
    text = "loss a = mse(s.final <- t.final, mask = batch.token_type_ids)\n" + stage("minimize a")
    checked = good(spec(text, TEACHER + SHORT))
    assert parts(checked, "a")[0].endswith(f"valid=and(a={VALID}, b=not_equal(a=batch/token_type_ids)))")
    found = [op for op in (node(checked, key) for key in checked.graph) if isinstance(op, OpNode)]
    assert [op.attr("b") for op in found if op.op == "not_equal"] == [0.0]
