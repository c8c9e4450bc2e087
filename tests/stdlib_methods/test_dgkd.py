"""DGKD (arXiv 2009.08825): every model learns from all before it, each of which speaks by a coin at every step."""

import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from chains import Watch, compiled, lines, runner, same, short, stages, state
from method_world import Step, batch_of, close, made

from gkd_dsl.runtime.errors import Stopped
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.schedules import Clock

TOTAL = 4000


def logits(model, batch):
    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def divergence(s, t, T):
    return T * T * F.kl_div(F.log_softmax(s / T, -1), F.log_softmax(t / T, -1), reduction="batchmean", log_target=True)


def weights(plan, step):
    clock = Clock(step, TOTAL, 10.0, seed=plan.stage.seed)
    return {loss.name.split("/")[1]: w.value(clock) for loss, w in zip(plan.losses, plan.weights, strict=True)}


def speaking(plan, alpha=0.5):
    """Which teachers speak at each step."""
    found = []
    for step in range(TOTAL):
        soft = {name: w for name, w in weights(plan, step).items() if "soft" in name}
        assert set(soft.values()) <= {0.0, alpha}
        found.append(tuple(w > 0 for _, w in sorted(soft.items())))
    return found


def test_every_model_learns_from_all_before_it():
    found = stages("dgkd")
    assert list(found) == ["assist.1", "assist.2", "task"]
    assert [sorted(n.name for n in plan.models) for plan in found.values()] == [["a", "t"], ["a", "b", "t"], [*"abst"]]
    assert [[t.name for t in plan.stage.trains] for plan in found.values()] == [["a"], ["b"], ["s"]]


@pytest.mark.parametrize(("stage", "learner", "before"), [("assist.2", "b", "ta"), ("task", "s", "tab")])
def test_when_all_survive_the_objective_is_the_sum_of_distillations(stage, learner, before):
    plan = stages("dgkd", args="survival = 1.0, T = 3.0, alpha = 0.3")[stage]
    step, batch = Step(plan, made(plan)), batch_of()
    s = logits(step.models[learner], batch)
    expected = 0.7 * F.cross_entropy(s, batch["labels"])
    for name in before:
        expected = expected + 0.3 * divergence(s, logits(step.models[name], batch).detach(), 3.0)
    total, _ = step(batch)
    close(total, expected, stage)
    wanted = torch.autograd.grad(expected, step.parameters, allow_unused=True)
    for one, two in zip(step.gradients(total), wanted, strict=True):
        assert one is None or torch.allclose(one, two, rtol=1e-8, atol=1e-12)


def test_with_one_teacher_that_survives_it_is_a_stage_of_takd():
    plan, other = stages("dgkd", "t", "survival = 1.0")["task"], stages("takd", "t")["task"]
    one, two = Step(plan, made(plan)), Step(other, made(other))
    for name in "st":
        one.models[name].load_state_dict(two.models[name].state_dict())
    close(one(batch_of())[0], two(batch_of())[0], "takd")


@pytest.mark.parametrize("survival", [0.75, 0.3])
def test_each_teacher_speaks_for_itself_with_its_probability(survival):
    found = speaking(stages("dgkd", args=f"survival = {survival}")["task"])
    for teacher in range(3):
        share = sum(row[teacher] for row in found) / TOTAL
        assert share == pytest.approx(survival, abs=5 * math.sqrt(survival * (1 - survival) / TOTAL))
    for one, two in ((0, 1), (0, 2), (1, 2)):
        both = sum(row[one] and row[two] for row in found) / TOTAL
        assert both == pytest.approx(survival**2, abs=0.04)


def test_all_may_be_dropped_unless_one_is_kept():
    free, kept = (speaking(stages("dgkd", args=f"survival = 0.3, keep_one = {k}")["task"]) for k in ("false", "true"))
    dropped = [not any(row) for row in free]
    assert sum(dropped) / TOTAL == pytest.approx(0.7**3, abs=0.04)
    assert all(any(row) for row in kept)
    # Nothing else changes: where some spoke the same speak, where none did the nearest does.
    assert all(two == (one if any(one) else (False, False, True)) for one, two in zip(free, kept, strict=True))


def test_the_labels_count_once_or_with_each_teacher_that_speaks():
    once = stages("dgkd", args="alpha = 0.25")["task"]
    each = stages("dgkd", args="alpha = 0.25, hard_per_teacher = true")["task"]
    for step in range(60):
        assert weights(once, step)["hard"] == 0.75
        found = weights(each, step)
        assert found["hard"] == 0.75 * sum(w > 0 for name, w in found.items() if "soft" in name)


def test_resumed_in_the_middle_the_coins_fall_as_before(tmp_path):
    plan = short(compiled("dgkd", args="survival = 0.5"), 6)
    whole = RunFolder.create("whole", root=tmp_path)
    wanted = runner(plan, whole).run()
    spoken = {tuple(line["weights"].values()) for line in lines(whole) if line["stage"] == "m.task"}
    assert len(spoken) > 1
    for at in (("m.assist.2", 6), ("m.task", 3)):
        cut = RunFolder.create(f"cut{at[1]}", root=tmp_path)
        with pytest.raises(Stopped):
            runner(plan, cut, Watch(at, lambda: os.kill(os.getpid(), signal.SIGINT))).run()
        found = runner(plan, RunFolder.open(cut.path)).run(resume=True)
        assert lines(cut) == lines(whole)
        assert all(same(state(model), state(wanted.models[name])) for name, model in found.models.items())


def test_a_step_in_which_nobody_speaks_has_no_gradient_when_labels_do_not_count():
    plan = short(compiled("dgkd", "t", "survival = 0.05, alpha = 1.0"), 3)
    assert not any(any(weights(plan.stages[0], step).values()) for step in range(3))
    watch = Watch()
    runner(plan, watch=watch).run()
    assert [(record.loss, record.gradient_norm) for record in watch.records] == [(0.0, 0.0)] * 3
