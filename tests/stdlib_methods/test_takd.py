"""TAKD (arXiv 1902.03393): each model of a chain is taught by the one before it, then teaches the next."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from chains import STEPS, Data, Watch, compiled, lines, runner, same, short, stages, state
from method_world import Pair, Step, batch_of, close, made, plans, use

from gkd_dsl.runtime.errors import Stopped
from gkd_dsl.runtime.run_folder import RunFolder


def kd(s, t, labels, T, alpha):
    """Plain distillation by torch's own divergence."""
    soft = F.kl_div(F.log_softmax(s / T, -1), F.log_softmax(t / T, -1), reduction="batchmean", log_target=True)
    return (1 - alpha) * F.cross_entropy(s, labels) + alpha * T * T * soft


def logits(model, batch):
    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_the_stages_are_the_chain_in_its_order():
    found = stages("takd")
    assert list(found) == ["assist.1", "assist.2", "task"]
    assert [sorted(node.name for node in plan.models) for plan in found.values()] == [
        ["a", "t"],
        ["a", "b"],
        ["b", "s"],
    ]
    assert [[(t.kind, t.name) for t in plan.stage.trains] for plan in found.values()] == [
        [("model", "a")], [("model", "b")], [("model", "s")],
    ]  # fmt: skip


@pytest.mark.parametrize(("stage", "pair"), [("assist.1", "at"), ("assist.2", "ba"), ("task", "sb")])
def test_each_stage_is_distillation_from_the_model_before(stage, pair):
    plan = stages("takd", args="T = 3.0, alpha = 0.3")[stage]
    step, batch = Step(plan, made(plan)), batch_of()
    learner, teacher = (step.models[name] for name in pair)
    total, _ = step(batch)
    expected = kd(logits(learner, batch), logits(teacher, batch).detach(), batch["labels"], 3.0, 0.3)
    close(total, expected, stage)
    assert all(name.startswith(f"{pair[0]}/") for name in step.names)
    wanted = torch.autograd.grad(expected, step.parameters, allow_unused=True)
    for one, two in zip(step.gradients(total), wanted, strict=True):
        assert one is None or torch.allclose(one, two, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_without_assistants_it_is_plain_distillation():
    found = stages("takd", "t", "T = 3.0, alpha = 0.3")
    assert list(found) == ["task"]
    plan = plans(Pair().spec(*use("kd", args="T = 3.0, alpha = 0.3")))["m_kd.task"]
    one, two = Step(found["task"], made(plan)), Step(plan, made(plan))
    for name in "st":
        one.models[name].load_state_dict(two.models[name].state_dict())
    close(one(batch_of())[0], two(batch_of())[0], "kd")


def test_what_a_stage_trained_teaches_in_the_next_and_is_not_trained_again():
    plan, kept = short(compiled("takd")), {}
    run = None

    def keep():
        kept.update({name: state(model) for name, model in run.models.items()})

    watch = Watch(("m.assist.1", STEPS), keep)
    run = runner(plan, watch=watch)
    first = {name: state(run.model(name)) for name in "tabs"}
    result = run.run()
    assert same(kept["t"], first["t"])
    assert not same(kept["a"], first["a"])
    assert same(state(result.models["a"]), kept["a"])
    assert not same(state(result.models["b"]), first["b"])
    assert not same(state(result.models["s"]), first["s"])
    # The first step of the second stage reads the assistant as it was after the first.
    term = next(r for r in watch.records if (r.stage, r.step) == ("m.assist.2", 1)).terms["m/assistant_soft.2"]
    batch, T = Data(1).batch(0, 0), 4.0
    for model in (result.models["a"].eval(), result.models["b"].eval()):
        model.requires_grad_(False)
    result.models["b"].load_state_dict(first["b"])
    s, t = logits(result.models["b"], batch), logits(result.models["a"], batch)
    expected = (
        T * T * F.kl_div(F.log_softmax(s / T, -1), F.log_softmax(t / T, -1), reduction="batchmean", log_target=True)
    )
    assert term == pytest.approx(expected.item(), rel=1e-4)
    result.models["a"].load_state_dict(first["a"])
    other = F.kl_div(
        F.log_softmax(s / T, -1), F.log_softmax(logits(result.models["a"], batch) / T, -1), reduction="batchmean",
        log_target=True,
    )  # fmt: skip
    assert term != pytest.approx(T * T * other.item(), rel=1e-3)


@pytest.mark.parametrize(
    "at", [("m.assist.1", STEPS), ("m.assist.2", 1), ("m.assist.2", STEPS - 1), ("m.assist.2", STEPS), ("m.task", 1)]
)
def test_resumed_around_the_border_of_two_stages_it_is_the_run_that_was_not_ended(at, tmp_path):
    plan = short(compiled("takd"))
    whole = RunFolder.create("whole", root=tmp_path)
    wanted = runner(plan, whole).run()
    cut = RunFolder.create("cut", root=tmp_path)
    with pytest.raises(Stopped):
        runner(plan, cut, Watch(at, lambda: os.kill(os.getpid(), signal.SIGINT))).run()
    found = runner(plan, RunFolder.open(cut.path)).run(resume=True)
    assert lines(cut) == lines(whole)
    for name in found.models:
        assert same(state(found.models[name]), state(wanted.models[name])), name
