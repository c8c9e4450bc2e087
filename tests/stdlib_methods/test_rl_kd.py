"""RL-KD (arXiv 2012.06048): the mean over chosen teachers by hand, what the policy sees, and half the sum at pi = 0.5."""

import copy

import pytest
import torch
import torch.nn.functional as F
from method_world import CLOCK, close
from several import batch, logits, step_of, text

from gkd_dsl.schedules import Clock

T = 3.0
ARGS = f"T = {T}, alpha = 0.4, kd_reward = 0.5"


def forced(step, choices):
    """Make the policy choose these actions, whatever it thinks."""
    policy = step.distiller.policies["m/pi"]

    def draw(apply, env, clock, keep=True):
        return torch.tensor(choices, dtype=torch.float32)

    policy.draw = draw


def divergences(found, names):
    return [
        T * T * F.kl_div((found["s"] / T).log_softmax(-1), (found[n] / T).softmax(-1), reduction="none").sum(-1)
        for n in names
    ]


CHOICES = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]


def test_the_mean_over_the_chosen_and_over_all_where_none_is():
    """Four samples by hand. Counting the teachers that were not chosen, as the survey's code does, gives another."""
    step, rows = step_of(text("rl_kd", args=ARGS, teachers=((3, 24), (4, 16), (2, 20))), "m.reinforced"), batch()
    forced(step, CHOICES)
    total, values = step(rows)
    found = logits(step, rows)
    each = torch.stack(divergences(found, "abc"), 1)
    wanted = (each[0, 0] + each[0, 2]) / 2 + each[1].mean() + each[2, 1] + each[3].mean()
    close(values["m/soft"], wanted / 4, "soft", rtol=1e-6)
    hard = F.cross_entropy(found["s"], rows["labels"])
    close(values["m/hard"], hard, "hard")
    close(total, 0.6 * hard + 0.4 * wanted / 4, "total", rtol=1e-6)
    with_zeros = (each * torch.tensor(CHOICES, dtype=each.dtype)).mean()
    assert abs(with_zeros - wanted / 4) > 1e-2


def test_the_first_stage_hears_all():
    step, rows = step_of(text("rl_kd", args=ARGS), "m.average"), batch()
    assert not step.distiller.policies
    found = logits(step, rows)
    close(step(rows)[1]["m/mean_of_all"], torch.stack(divergences(found, "ab")).mean(), "mean_of_all")


def test_what_the_policy_sees():
    """CLS of the first teacher, logits of the teacher, its cross entropy; no gradient goes back to any of them."""
    step, rows = step_of(text("rl_kd", args=ARGS), "m.reinforced"), batch()
    policy = step.distiller.policies["m/pi"]
    total, _ = step(rows)
    policy.learn(0.0, CLOCK)
    states, actions = policy.pending
    found = logits(step, rows)
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    body = copy.deepcopy(step.models["a"]).eval().base_model
    cls = body(**inputs).last_hidden_state[:, 0]
    for k, name in enumerate("ab"):
        told = F.cross_entropy(found[name], rows["labels"], reduction="none")
        wanted = torch.cat([cls, found[name], told[:, None]], 1)
        torch.testing.assert_close(states[:, k], wanted.float().detach(), rtol=1e-5, atol=1e-6)
    assert actions.shape == (4, 2)
    total.backward()
    assert all(p.grad is None for p in policy.selector.parameters())


@pytest.mark.parametrize(("weight", "with_soft"), [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_the_reward(weight, with_soft):
    """r1 = -CE, r2 = -CE - KD: as the losses of the step say."""
    step, rows = step_of(text("rl_kd", args=f"kd_reward = {weight}"), "m.reinforced"), batch()
    out = step.distiller.module(rows, CLOCK, step.distiller.denominators([rows]))
    wanted = -(out.values["m/hard"] + with_soft * out.values["m/soft"])
    close(out.watched["m/pi.reward"], wanted, "reward")


def test_half_the_sum_at_a_chance_of_one_half():
    """The expectation of sum_k pick_k loss_k: over many draws of an indifferent policy, within five standard errors."""
    own = [f"per_sample(kl(s.logits <- {name}.logits, temperature = {T}))" for name in "ab"]
    loss = f"loss picked = mean(m.pi.pick[0] * {own[0]} + m.pi.pick[1] * {own[1]})"
    step, rows = step_of(text("rl_kd", loss, "stage probe for 9 steps {\n  minimize picked\n}"), "probe"), batch()
    with torch.no_grad():
        for parameter in step.distiller.policies["m/pi"].selector.parameters():
            parameter.zero_()
    counts = step.distiller.denominators([rows])
    each = torch.stack(divergences(logits(step, rows), "ab"))
    draws = []
    with torch.no_grad():
        for number in range(400):
            clock = Clock(number, 1000, 1000.0, seed=5)
            draws.append(step.distiller.module(rows, clock, counts).values["picked"])
    error = (0.25 * (each**2).sum() / len(rows["labels"]) ** 2 / len(draws)).sqrt()
    half = each.sum(0).mean() / 2
    assert abs(torch.stack(draws).mean() - half) < 5 * error < half
