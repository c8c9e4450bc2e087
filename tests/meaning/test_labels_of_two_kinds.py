"""Labels are classes to a classifier and tokens to a language model, also where one spec has both."""

import pytest
from meaning_help import check, codes, node, stage

from gkd_dsl.graph.nodes import BatchNode
from gkd_dsl.graph.passes import compile_plan

BOTH = """gkd 1
import "gkd:distilbert" use distilbert
import "gkd:kd" use kd
teacher t = hf("models/teacher")
teacher tm = hf("models/teacher_mlm")
model lm = hf("models/student_mlm")
student s = with_head(lm, num_labels = 2)
data reviews = csv("data/reviews.csv", text = "text", label = "label")
data lines = text("data/text.txt")
"""
PRETRAIN = "source = lines\nminimize cross_entropy(lm.logits, batch.labels)"
TASK = "source = reviews\nminimize cross_entropy(s.logits, batch.labels)"


def good(text):
    """The check of a text in which nothing but unused names is found."""
    checked = check(text)
    assert [f"{d.code} {d.message}" for d in checked.diagnostics if d.code != "W0701"] == []
    return checked


def columns(checked):
    return {key: node(checked, key).type.long for key in checked.graph if isinstance(node(checked, key), BatchNode)}


@pytest.mark.parametrize("order", [(PRETRAIN, TASK), (TASK, PRETRAIN)])
def test_each_loss_reads_the_labels_that_its_logits_are_compared_with(order):
    checked = good(BOTH + "".join(stage(body, f"n{number}") for number, body in enumerate(order)))
    found = columns(checked)
    assert {found[key] for key in found if "labels" in key} == {"[B]", "[B, L]"}
    plan = compile_plan(checked.graph)
    for held in plan.stages:
        assert held.columns == ("attention_mask", "input_ids", "labels")
        text = repr(held)
        assert "batch/labels" in text
        assert "batch/labels." not in text, "the runtime has one column of this name"


def test_a_method_reads_labels_as_its_own_models_do():
    """DistilBERT compares labels with -100 and KD with classes; neither sees the models of the other."""
    body = "use distilbert(tm -> lm) as d\nuse kd(t -> s) as k\n"
    first = stage("source = lines\nminimize cross_entropy(lm.logits, batch.labels)", "first")
    mlm = BOTH.replace('hf("models/student_mlm")', "truncated(tm, layers = [0, 4, 8])")
    checked = good(
        mlm
        + body
        + first
        + stage("source = lines\nminimize d", "pretrain")
        + stage("source = reviews\nminimize k", "task")
    )
    plan = {held.name: held for held in compile_plan(checked.graph).stages}
    assert "labels" in plan["pretrain"].columns
    assert {c.dims[-1].name for c in plan["pretrain"].counted} == {"L"}
    assert {c.dims[-1].name for c in plan["task"].counted} == {"B"}


def test_a_mask_says_which_labels_it_means():
    body = "mask predicted = batch.token_labels != -100\n"
    lines = stage("source = lines\nminimize kl(lm.logits <- tm.logits, mask = predicted)", "pretrain")
    checked = good(BOTH + body + lines + stage(TASK, "task"))
    assert sorted(columns(checked).values()) == ["[B, L]", "[B, L]", "[B, L]", "[B]"]


def test_labels_of_one_kind_stay_as_strict_as_they_were():
    text = BOTH.replace("student s = with_head(lm, num_labels = 2)\n", "").replace("model lm", "student lm")
    checked = check(
        text.replace('teacher t = hf("models/teacher")\n', "")
        + stage("source = reviews\nminimize cross_entropy(lm.logits, batch.labels)")
    )
    assert "E0506" in codes(checked) or "W0701" in codes(checked)
    only = check(
        'gkd 1\nstudent s = hf("models/student")\ndata reviews = csv("data/reviews.csv", text = "text", label = "label")\n'
        + stage("minimize cross_entropy(s.logits, batch.token_labels)")
    )
    assert codes(only) == ["E0240"]
