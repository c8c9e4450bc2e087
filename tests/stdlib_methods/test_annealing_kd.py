"""Annealing-KD (arXiv 2104.07163): logits to a teacher whose logits rise in plateaus, then the labels alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from method_world import Pair, Step, batch_of, close, made, plans, use

from gkd_dsl.schedules import Clock

TOTAL = 70


def step_of(stage="anneal", args=""):
    plan = plans(Pair().spec(*use("annealing_kd", args=args)))[f"m_annealing_kd.{stage}"]
    return Step(plan, made(plan))


def at(step, batch, number, total=TOTAL):
    """The objective at a step of the stage, and each term."""
    module = step.distiller.module
    out = module(batch, Clock(number, total, 10.0), step.distiller.denominators([batch]))
    return out.loss, out.values


def logits(step, batch):
    return {
        name: model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for name, model in step.models.items()
    }


def phi(number, total, plateaus):
    """The factor as the released code counts it: a temperature that comes down from the number of plateaus."""
    left = (1 - number / total) * plateaus
    return 1 - (max(1, math.ceil(left - 1e-9)) - 1) / plateaus


@pytest.mark.parametrize("plateaus", [7, 10])
@pytest.mark.parametrize("number", [0, 9, 10, 34, 35, 59, 60, 69])
def test_the_teacher_is_scaled_by_the_plateau(plateaus, number):
    step, batch = step_of(args=f"plateaus = {plateaus}"), batch_of()
    found, held = at(step, batch, number)[0], logits(step, batch)
    expected = F.mse_loss(held["s"], phi(number, TOTAL, plateaus) * held["t"].detach())
    close(found, expected, "annealed", rtol=1e-12)
    wanted = torch.autograd.grad(expected, step.parameters, allow_unused=True)
    for one, two in zip(step.gradients(found), wanted, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.allclose(one, two, rtol=1e-9, atol=1e-12)


def test_the_table_of_the_factor_and_its_end():
    step, batch = step_of(), batch_of()
    held = logits(step, batch)
    with torch.no_grad():
        s, t = held["s"], held["t"]
        found = []
        for number in range(0, TOTAL, 10):
            value = at(step, batch, number)[0]
            # |s|^2 - 2 phi <s, t> + phi^2 |t|^2, solved for phi: the root that is nearer is the factor.
            a, b, c = (t * t).mean(), -2 * (s * t).mean(), (s * s).mean() - value
            root = torch.sqrt((b * b - 4 * a * c).clamp_min(0))
            wanted = phi(number, TOTAL, 7)
            found.append(min(((-b + root) / (2 * a), (-b - root) / (2 * a)), key=lambda x: abs(x - wanted)).item())
    assert found == pytest.approx([0.142857, 0.285714, 0.428571, 0.571429, 0.714286, 0.857143, 1.0], abs=1e-5)
    close(at(step, batch, TOTAL - 1)[0], F.mse_loss(s, t), "the last step", rtol=1e-12)


def test_the_factor_is_no_temperature_of_a_softmax():
    """A constant added to the teacher's logits is nothing to a softmax, and something here."""
    step, batch = step_of(), batch_of()
    before = at(step, batch, 5)[0].item()
    with torch.no_grad():
        step.models["t"].classifier.bias.add_(3.0)
    held = logits(step, batch)
    after = at(step, batch, 5)[0]
    assert abs(after.item() - before) > 1e-3
    close(after, F.mse_loss(held["s"], held["t"].detach() / 7), "shifted", rtol=1e-12)


def test_the_second_stage_is_the_labels_and_needs_no_teacher():
    step, batch = step_of("task"), batch_of()
    assert set(step.models) == {"s"}
    close(at(step, batch, 3)[0], F.cross_entropy(logits(step, batch)["s"], batch["labels"]), "hard")
