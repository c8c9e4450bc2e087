"""The compiled step in a loop of one's own."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import START, batch_of, cut, infos, models, stage_plan

from gkd_dsl.graph.nodes import OptimSpec
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.distiller import Distiller
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.step import StepModule, make_projections
from gkd_dsl.schedules import Clock


@pytest.fixture
def found(tmp_path):
    return infos(tmp_path)


def test_a_loop_of_ones_own_is_the_run(found):
    plan, batches = (
        stage_plan(found, optim=OptimSpec("sgd", lr=0.1, weight_decay=0.0, clip=None)),
        [batch_of(seed=n) for n in range(3)],
    )
    made = models(found)
    distiller = Distiller(plan, made)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    own = []
    for step, batch in enumerate(batches):
        distiller.step_to(step, 3)
        loss = distiller(batch)
        assert loss.requires_grad
        assert loss.shape == ()
        own.append((loss.item(), {name: value.item() for name, value in distiller.terms.items()}, distiller.weights))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    other = models(found)
    step_module, backend = StepModule(plan, other), LocalBackend()
    backend.begin(step_module, plan.stage.optim)
    for number, batch in enumerate(batches):
        result = backend.step([batch], Clock(number, 3, 3.0), 0.1)
        loss, terms, weights = own[number]
        assert result.loss == pytest.approx(loss, rel=1e-6)
        assert result.terms == pytest.approx(terms, rel=1e-6)
        assert dict(result.weights) == weights
    for one, two in zip(made["s"].parameters(), other["s"].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_its_parameters_are_the_students_and_the_projections(found):
    made = models(found)
    distiller = Distiller(stage_plan(found), made)
    expected = [*made["s"].parameters(), *distiller.projections["W"].parameters()]
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in expected}
    assert [name for name, _ in distiller.named_parameters()][-2:] == ["project/W/weight", "project/W/bias"]
    assert made["s"].training
    distiller(batch_of()).backward()
    assert not made["t"].training
    assert all(p.grad is None for p in made["t"].parameters())


def test_micro_batches_share_their_denominators(found):
    whole = batch_of(8, 9, seed=5)
    parts = [cut(whole, start, start + 2) for start in range(0, 8, 2)]
    distiller = Distiller(stage_plan(found), models(found))
    total = distiller(whole).item()
    counts = distiller.denominators(parts)
    assert sum(distiller(part, counts).item() for part in parts) == pytest.approx(total, rel=1e-5)
    assert sum(distiller(part).item() for part in parts) != pytest.approx(total, rel=1e-2)


def test_schedules_follow_step_to(found):
    distiller = Distiller(stage_plan(found), models(found))
    distiller(batch_of())
    assert distiller.weights["inside"] == 0.5
    distiller.step_to(9, 10)
    distiller(batch_of())
    assert distiller.weights["inside"] == 1.0


def test_closing_puts_requires_grad_back(found):
    made = models(found)
    made["t"].classifier.weight.requires_grad_(False)
    with Distiller(stage_plan(found), made):
        assert not any(p.requires_grad for p in made["t"].parameters())
    frozen = [name for name, p in made["t"].named_parameters() if not p.requires_grad]
    assert frozen == ["classifier.weight"]


def test_projections_can_be_given(found):
    plan = stage_plan(found)
    given = make_projections(plan.projections, seed=9)
    assert Distiller(plan, models(found), given).projections["W"] is given["W"]


def test_a_missing_model_and_a_missing_column_are_named(found):
    made = models(found)
    with pytest.raises(KeyError, match="needs the model `t`"):
        Distiller(stage_plan(found), {"s": made["s"]})
    batch = batch_of()
    del batch["labels"]
    with pytest.raises(RunError, match=r"batch\.labels"):
        Distiller(stage_plan(found), made)(batch)


def test_it_equals_the_step(found):
    plan, made, batch = stage_plan(found), models(found), batch_of()
    step = StepModule(plan, made)
    expected = step(batch, START, step.denominators([batch], START)).loss
    distiller = Distiller(plan, made, step.projections)
    distiller.step_to(START.step, START.total_steps)
    assert torch.equal(distiller(batch), expected)


def test_its_clock_is_the_one_that_it_was_set_to(found):
    """Durations in epochs and in tokens, the seed of the stage, and the number of each micro-batch."""
    plan = stage_plan(found)
    plan = replace(plan, stage=replace(plan.stage, seed=7))
    distiller, seen = Distiller(plan, models(found)), []
    distiller.module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    distiller.step_to(3, 10, steps_per_epoch=5.0, tokens=99)
    for _ in range(2):
        distiller(batch_of())
    with torch.no_grad():
        distiller(batch_of())
    distiller.step_to(4, 10)
    distiller(batch_of())
    at = Clock(3, 10, 5.0, 99, seed=7)
    assert seen == [at, replace(at, micro=1), replace(at, micro=2), Clock(4, 10, 10.0, seed=7)]
