"""Continuation-KD (arXiv 2212.05998): from a hinge on annealed logits to the labels."""

import pytest
import torch
import torch.nn.functional as F
from method_world import Pair, Step, batch_of, close, made, plans, use

from gkd_dsl.schedules import Clock

BATCH = batch_of((7, 4, 2, 5, 6), seed=3)
NAME = "m_continuation_kd"


def step_of(args="", pair=None):
    plan = plans((pair or Pair()).spec(*use("continuation_kd", args=args)))[f"{NAME}.task"]
    return Step(plan, made(plan))


def at(step, number, total=100, batch=BATCH):
    module = step.distiller.module
    return module(batch, Clock(number, total, 10.0), step.distiller.denominators([batch]))


def logits(step, batch=BATCH):
    return {
        name: model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for name, model in step.models.items()
    }


def hinge(s, t, phi, margin, whole=False):
    """The mean over samples, one sample after the other."""
    found = []
    for row, wanted in zip(s, t.detach(), strict=True):
        distance = sum((a - phi * b) ** 2 for a, b in zip(row, wanted, strict=True)) / len(row)
        past = distance - margin * phi
        found.append((distance if whole else past) if past > 0 else 0.0 * distance)
    return sum(found) / len(found), [value.item() > 0 for value in found]


def test_the_weight_of_the_labels_over_the_stage():
    step = step_of()
    table = {0: 0.0, 1000: 0.25, 1998: 0.4995, 2000: 0.5, 2001: 1.0, 2002: 1.0, 2999: 1.0}
    for number, psi in table.items():
        weights = at(step, number, 3000).weights
        assert weights[f"{NAME}/hard"] == pytest.approx(psi, abs=1e-12)
        assert weights[f"{NAME}/hinge"] == pytest.approx(1 - psi, abs=1e-12)


def between(step, phi):
    """A margin between the distances of the samples: two are past it, three are not."""
    held = logits(step)
    distances = ((held["s"] - phi * held["t"]) ** 2).mean(-1).sort().values
    return round((distances[2] + distances[3]).item() / 2 / phi, 6)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("number", [0, 15, 65, 95])
def test_a_sample_counts_where_it_is_past_the_margin(number, whole):
    phi = (number // 10 + 1) / 10
    margin = between(step_of(), phi)
    step = step_of(f"margin = {margin}" + (", hinge_weight = 0.0, whole_weight = 1.0" if whole else ""))
    held = logits(step)
    expected, past = hinge(held["s"], held["t"], phi, margin, whole)
    name = "whole" if whole else "hinge"
    value = at(step, number).values[f"{NAME}/{name}"]
    close(value, expected, name, rtol=1e-10)
    wanted = torch.autograd.grad(expected, step.parameters, allow_unused=True)
    for one, two in zip(step.gradients(value), wanted, strict=True):
        one, two = (torch.zeros(1, dtype=torch.float64) if g is None else g for g in (one, two))
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12)
    assert sum(past) == 2


def test_the_whole_distance_has_the_gradient_of_the_hinge():
    one, two = step_of("margin = 0.5"), step_of("margin = 0.5, hinge_weight = 0.0, whole_weight = 1.0")
    a, b = at(one, 15).values[f"{NAME}/hinge"], at(two, 15).values[f"{NAME}/whole"]
    assert b.item() > a.item()
    for x, y in zip(one.gradients(a), two.gradients(b), strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.allclose(x, y, rtol=1e-9, atol=1e-12)


def test_within_the_margin_there_is_no_value_and_no_gradient():
    step = step_of("margin = 1000.0")
    out = at(step, 50)
    assert out.values[f"{NAME}/hinge"].item() == 0.0
    assert all(g is None or not g.any() for g in step.gradients(out.values[f"{NAME}/hinge"]))


def test_without_a_margin_the_start_is_annealing_kd():
    step = step_of("margin = 0.0, plateaus = 7")
    plan = plans(Pair().spec(*use("annealing_kd")))["m_annealing_kd.anneal"]
    annealing = Step(plan, made(plan))
    for name in "st":
        annealing.models[name].load_state_dict(step.models[name].state_dict())
    close(at(step, 0).loss, at(annealing, 0).loss, "start", rtol=1e-12)
    for number in (20, 60, 99):
        close(at(step, number).values[f"{NAME}/hinge"], at(annealing, number).loss, f"step {number}", rtol=1e-12)


def test_the_end_of_the_stage_is_the_labels():
    step = step_of()
    close(at(step, 90).loss, F.cross_entropy(logits(step)["s"], BATCH["labels"]), "hard")


def test_the_share_of_the_switch_is_a_parameter():
    step = step_of("switch = 0.5")
    assert [at(step, n).weights[f"{NAME}/hard"] for n in (0, 25, 50, 51)] == pytest.approx([0.0, 0.25, 0.5, 1.0])
