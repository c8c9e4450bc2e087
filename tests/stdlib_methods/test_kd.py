"""Knowledge distillation against its definition (arXiv 1503.02531)."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from method_cases import Case, stages_of
from method_world import Pair, Step, agree, batch_of, close, made, plans, use


@pytest.mark.parametrize(("case", "stage"), stages_of("kd"))
def test_terms_total_and_gradients(case: Case, stage: str) -> None:
    agree(case.step(stage), case.batch(), case.oracle, case.weights(stage))


def _logit_step(T: float):
    text = Pair().spec(*use("kd", args=f"T = {T}, alpha = 1.0"))
    plan = plans(text)["m_kd.task"]
    return Step(plan, made(plan))


@pytest.mark.parametrize("T", [1.0, 2.5, 8.0])
def test_it_is_torchs_batchmean_times_t_squared(T: float) -> None:
    step, batch = _logit_step(T), batch_of()
    s, t = (step.models[name](batch["input_ids"], attention_mask=batch["attention_mask"]).logits for name in "st")
    expected = T * T * F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean")
    close(step(batch)[0], expected, "soft")


def test_the_gradient_by_the_logits_is_t_times_the_difference_of_probabilities() -> None:
    T, batch = 3.0, batch_of()
    step = _logit_step(T)
    held = []
    handle = step.models["s"].classifier.register_forward_hook(lambda _m, _i, out: held.append(out))
    total, _ = step(batch)
    handle.remove()
    (gradient,) = torch.autograd.grad(total, held)
    t = step.models["t"](batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = T * (F.softmax(held[0] / T, -1) - F.softmax(t / T, -1)) / len(t)
    close(gradient, expected, "gradient")


def test_a_high_temperature_gives_the_mse_of_centred_logits() -> None:
    step, batch = _logit_step(1000.0), batch_of()
    s, t = (step.models[name](batch["input_ids"], attention_mask=batch["attention_mask"]).logits for name in "st")
    gap = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    close(step(batch)[0], (gap**2).sum(-1).mean() / (2 * gap.shape[-1]), "limit", rtol=2e-2)


@given(alpha=st.floats(0.0, 1.0).map(lambda x: round(x, 3)), T=st.floats(0.5, 20.0).map(lambda x: round(x, 2)))
def test_alpha_shares_hard_and_soft(alpha: float, T: float) -> None:
    plan = plans(Pair().spec(*use("kd", args=f"alpha = {alpha}, T = {T}")))["m_kd.task"]
    total, values = Step(plan, _models())(batch_of())
    expected = sum(
        weight * values[name].item() for name, weight in (("m_kd/hard", 1 - alpha), ("m_kd/soft", alpha)) if weight
    )
    assert math.isclose(total.item(), expected, rel_tol=1e-9)
    assert all(value.item() >= 0 for value in values.values())


def _models(held={}):  # noqa: B006
    if not held:
        held.update(made(plans(Pair().spec(*use("kd")))["m_kd.task"]))
    return held
