"""Which losses over logits are fused: a plan that fits, and each reason for which it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from graph_help import write_llamas

from gkd_dsl.graph.nodes import AddToTap
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.passes.fuse import fuse, fusions, refusals
from gkd_dsl.graph.passes.liveness import made
from gkd_dsl.graph.placed import as_placed
from gkd_dsl.graph.plan import Apply, Free, Fused, StagePlan, TapPlan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.models.taps import TapPath
from gkd_dsl.types import BATCH, LENGTH, Dim, LossType, TensorType

SPEC = """gkd 1
teacher t = hf("t")
student s = hf("s")
data d = csv("rows.csv", text = "text")
loss soft = kl(s.logits <- t.logits, temperature = 3.0)
loss next = cross_entropy(s.logits, batch.labels)
stage main for 10 steps {
  minimize soft + next
}
"""
HIDDEN = TensorType("float", (BATCH, LENGTH, Dim("s.H", 16)))
VALUES = TensorType("float", (BATCH, LENGTH))
S, T = "s/logits", "t/logits"


@pytest.fixture
def plan(tmp_path: Path) -> StagePlan:
    write_llamas(tmp_path)
    checked = check_text(SPEC, "fuse.gkd", root=tmp_path)
    assert checked.ok
    return compile_plan(checked.graph).stages[0]


def applied(plan: StagePlan, op: str) -> Apply:
    return next(step for step in plan.program if isinstance(step, Apply) and step.op == op)


def with_slots(plan: StagePlan, op: str, **slots: str) -> StagePlan:
    """The plan in which an operator has these inputs too."""
    old = applied(plan, op)
    new = replace(old, inputs=tuple((dict(old.inputs) | slots).items()))
    return replace(plan, program=tuple(new if step is old else step for step in plan.program))


def beside(plan: StagePlan, step: Apply, *, last: bool = False) -> StagePlan:
    """The plan with one more operator, before the first loss or at the end."""
    steps = list(plan.program)
    place = len(steps) if last else min(steps.index(applied(plan, op)) for op in ("kl", "cross_entropy"))
    return replace(plan, program=(*steps[:place], step, *steps[place:]))


def with_forward(plan: StagePlan, key: str, **fields: object) -> StagePlan:
    return replace(plan, forwards=tuple(replace(f, **fields) if f.key == key else f for f in plan.forwards))


def ops(plan: StagePlan) -> list[str]:
    return [term.op for group in fusions(plan) for term in group.terms]


def test_both_losses_and_both_heads(plan: StagePlan) -> None:
    (group,) = fusions(plan)
    assert sorted(term.op for term in group.terms) == ["cross_entropy", "kl"]
    assert (group.student.model, [head.model for head in group.teachers]) == ("s", ["t"])
    assert refusals(plan) == {}
    fused = fuse(plan)
    assert sum(isinstance(step, Fused) for step in fused.program) == 1
    assert not {tap.key for forward in fused.forwards for tap in forward.taps} & {S, T}
    assert fusions(replace(plan, fuse_logits="off")) == ()


def test_a_gradient_into_the_teacher(plan: StagePlan) -> None:
    learning = with_slots(with_forward(plan, "t/forward", grad=True), "kl", teacher=T)
    assert refusals(learning)[applied(plan, "kl").key] == "its gradient goes into the teacher too"
    # The logits are whole then, and the other loss has them.
    assert ops(learning) == []


def test_logits_beside_themselves(plan: StagePlan) -> None:
    copy = Apply("op/copy", "detach", (("x", S),), (), applied(plan, "kl").type)
    same = with_slots(beside(plan, copy), "kl", teacher="op/copy")
    assert refusals(same)[applied(plan, "kl").key] == "it compares logits with themselves"
    assert "kl" not in ops(same)


def test_values_that_something_reads(plan: StagePlan) -> None:
    reader = Apply("op/most", "exp", (("x", applied(plan, "kl").key),), (), VALUES)
    assert refusals(beside(plan, reader, last=True))[applied(plan, "kl").key] == (
        "its values are read, not only their mean"
    )
    assert "kl" not in ops(beside(plan, reader, last=True))


def test_weights_that_have_a_gradient(plan: StagePlan) -> None:
    taps = (*plan.forward("s/forward").taps, TapPlan("s/hidden.1", TapPath("hidden", 1), HIDDEN))
    weight = Apply("op/weight", "sum", (("x", "s/hidden.1"),), (), VALUES)
    weighed = with_slots(beside(with_forward(plan, "s/forward", taps=taps), weight), "kl", token_weight="op/weight")
    assert refusals(weighed)[applied(plan, "kl").key] == "its weights have a gradient"
    cut = replace(weight, op="detach")
    still = with_slots(beside(with_forward(plan, "s/forward", taps=taps), cut), "kl", token_weight="op/weight")
    assert refusals(still) == {}
    # A projection is learnt, whatever it is given.
    learnt = replace(weight, op="project", inputs=(("x", "batch/labels"), ("block", "project/W")))
    assert refusals(with_slots(beside(plan, learnt), "kl", token_weight="op/weight"))[applied(plan, "kl").key]


def test_logits_that_weigh_a_loss(plan: StagePlan) -> None:
    """Of these something else than a fused row is wanted."""
    assert ops(with_slots(plan, "cross_entropy", token_weight=S)) == []
    assert [head.model for g in fusions(with_slots(plan, "cross_entropy", token_weight=T)) for head in g.teachers] == []


@pytest.mark.parametrize("kind", ["logits", "module"])
def test_a_pass_that_changes_them(kind: str, plan: StagePlan) -> None:
    path = TapPath("logits") if kind == "logits" else TapPath("module", name="lm_head")
    changed = with_forward(plan, "s/forward", changes=(AddToTap(path, "add.0"),))
    assert set(refusals(changed).values()) == {"the pass changes the logits of `s`"}
    assert ops(changed) == []
    inside = with_forward(plan, "s/forward", changes=(AddToTap(TapPath("hidden", 1), "add.0"),))
    assert len(ops(inside)) == 2


def test_a_module_of_the_head_that_is_read(plan: StagePlan) -> None:
    tap = TapPlan("s/module", TapPath("module", name="lm_head"), HIDDEN)
    read = with_forward(plan, "s/forward", taps=(*plan.forward("s/forward").taps, tap))
    assert all("is read beside the logits of `s`" in why for why in refusals(read).values())
    assert ops(read) == []


def test_logits_that_enter_a_forward(plan: StagePlan) -> None:
    read = with_forward(plan, "t/forward", values=(("add.0", S),))
    assert set(refusals(read).values()) == {"the forward `t/forward` reads the same logits"}


def test_a_loss_of_a_text(plan: StagePlan) -> None:
    old = applied(plan, "kl")
    new = replace(old, type=LossType((BATCH,)))
    whole = replace(plan, program=tuple(new if step is old else step for step in plan.program))
    assert ops(whole) == []


KEPT = (("t.placement", "cached"), ("t.cache", "kept"))


def test_stored_logits_are_as_many_as_is_said(plan: StagePlan) -> None:
    for top_k, op in ((0, "kl"), (5, "topk.kl"), (None, "kl"), (50, "kl")):
        said = (*KEPT, ("t.top_k", top_k)) if top_k is not None else KEPT
        stage, there = as_placed(plan, said)
        assert op in {step.op for step in stage.program if isinstance(step, Apply)}
        (group,) = fusions(plan, there)
        assert group.teachers == ()
    sizes = {
        tap.key: tap.type.dims[-1].size for tap in as_placed(plan, (*KEPT, ("t.top_k", 5)))[0].forward("t/forward").taps
    }
    assert sizes == {T: 5, f"{T}:ids": 5, f"{T}:tail": 2}


def test_stored_logits_keep_their_temperatures_and_are_let_go(plan: StagePlan) -> None:
    stage, _ = as_placed(plan, (*KEPT, ("t.top_k", 5)))
    attrs = dict(applied(stage, "topk.kl").attrs)
    assert (attrs["temperature"], attrs["temperatures"], attrs["treatment"]) == (3.0, (1.0, 3.0), "bucket")
    forwards = {forward.key: forward for forward in stage.forwards}
    there = {key for step in stage.program if not isinstance(step, Free) for key in made(step, forwards)}
    gone = {key for step in stage.program if isinstance(step, Free) for key in step.keys}
    assert there - gone == {entry.key for entry in stage.counted}
    assert gone <= there
