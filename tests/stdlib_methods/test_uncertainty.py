"""Uncertainty (arXiv 2109.11295): weights of four samples by hand, its limits, and where its gradient may not go."""

import math

import pytest
import torch
from method_world import close, row_kl
from several import batch, logits, step_of, text

ALL = "hard_weight = 1.0, authors_weight = 1.0, T = 2.0"
T = 2.0


def entropy(row):
    p = [math.exp(z - row.max()) for z in row.tolist()]
    p = [x / sum(p) for x in p]
    return -sum(x * math.log(x) for x in p if x > 0)


def unsure(z):
    return [entropy(row) / math.log(len(row)) for row in z]


def by_hand(found, names, weight_of):
    """mean_b sum_k w_k(b) T^2 KL(t_k || s)."""
    s = found["s"]
    rows = len(s)
    return sum(
        weight_of(row, k) * T * T * row_kl(found[name][row] / T, s[row] / T)
        for row in range(rows)
        for k, name in enumerate(names)
    ) / rows  # fmt: skip


@pytest.mark.parametrize("teachers", [((2, 16), (3, 24)), ((2, 16), (3, 24), (4, 32))])
def test_soft_and_hard_weights_of_four_samples(teachers):
    step, rows = step_of(text("uncertainty", args=ALL, teachers=teachers), "m.task"), batch()
    _, values = step(rows)
    found, names = logits(step, rows), "abc"[: len(teachers)]
    u, count = unsure(found["s"]), len(teachers)

    def share(row, k):
        raw = [u[row] + (1 - 2 * u[row]) * j / (count - 1) for j in range(count)]
        # The survey's code scales the rates to the sum K, and divides the loss by K.
        return count * raw[k] / sum(raw) / count

    def chosen(row, k):
        place = sorted(range(len(u)), key=lambda r: -u[r]).index(row)
        return float(place * count // len(u) == k)

    close(values["m/soft"], by_hand(found, names, share), "soft")
    close(values["m/authors"], by_hand(found, names, share), "authors")
    close(values["m/selected"], by_hand(found, names, chosen), "selected")
    hard = torch.nn.functional.cross_entropy(found["s"], rows["labels"])
    close(values["m/hard"], hard, "hard")


def with_student_logits(step, rows, z):
    """Make the student's head say the same logits for every text."""
    head = step.models["s"].classifier
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor(z, dtype=head.bias.dtype))
    return step(rows)[1], logits(step, rows)


@pytest.mark.parametrize("variant", ["soft", "authors"])
@pytest.mark.parametrize(("z", "teacher"), [([0.0, 0.0, 0.0], "a"), ([800.0, 0.0, 0.0], "b")])
def test_a_uniform_student_hears_the_small_teacher_and_a_sure_one_the_large(variant, z, teacher):
    step, rows = step_of(text("uncertainty", args="authors_weight = 1.0"), "m.task"), batch()
    values, found = with_student_logits(step, rows, z)
    alone = torch.nn.functional.kl_div(
        found["s"].log_softmax(-1), found[teacher].log_softmax(-1), reduction="batchmean", log_target=True
    )
    close(values[f"m/{variant}"], alone, variant, rtol=1e-6)


def test_a_probability_of_zero_gives_no_nan():
    """log of a softmax that is 0 is -inf, and 0 * -inf is NaN, in the value or in the gradient."""
    step, rows = step_of(text("uncertainty", args="hard_weight = 1.0, authors_weight = 1.0"), "m.task"), batch()
    values, _ = with_student_logits(step, rows, [1e5, 0.0, -1e5])
    for name, value in values.items():
        assert torch.isfinite(value), name
        assert all(torch.isfinite(g).all() for g in step.gradients(value) if g is not None), name


def test_the_weights_are_constants_for_the_gradient():
    """The gradient of the loss with the weights held; the authors' reading differs from it."""
    step, rows = step_of(text("uncertainty", args="authors_weight = 1.0"), "m.task"), batch()
    _, values = step(rows)
    model, found = step.models["s"], logits(step, rows)
    u = torch.tensor(unsure(found["s"]), dtype=torch.float64)
    s = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    kl = [(found[n].softmax(-1) * (found[n].log_softmax(-1) - s.log_softmax(-1))).sum(-1) for n in "ab"]
    held = (u * kl[0] + (1 - u) * kl[1]).mean()
    wanted = torch.autograd.grad(held, step.parameters, allow_unused=True, retain_graph=True)
    for name, one, two in zip(step.names, step.gradients(values["m/soft"]), wanted, strict=True):
        assert (one is None) == (two is None), name
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-10)
    p = s.softmax(-1)
    live = -(p * p.log()).sum(-1) / math.log(3)
    wanted = torch.autograd.grad((live * kl[0] + (1 - live) * kl[1]).mean(), step.parameters, allow_unused=True)
    gaps = []
    found_soft = step.gradients(values["m/soft"])
    for one, two, soft in zip(step.gradients(values["m/authors"]), wanted, found_soft, strict=True):
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-10)
            gaps.append((one - soft).abs().max().item())
    assert max(gaps) > 1e-4


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_shares_of_a_sample_sum_to_one(count):
    """Teachers that are all alike: whoever is heard, the divergence is that of one of them."""
    teachers = ((2, 16),) * count
    step, rows = step_of(text("uncertainty", args="hard_weight = 1.0", teachers=teachers), "m.task"), batch()
    for name in "abcd"[1:count]:
        step.models[name].load_state_dict(step.models["a"].state_dict())
    _, values = step(rows)
    found = logits(step, rows)
    alone = torch.nn.functional.kl_div(
        found["s"].log_softmax(-1), found["a"].log_softmax(-1), reduction="batchmean", log_target=True
    )
    close(values["m/soft"], alone, "soft")
    close(values["m/selected"], alone, "selected")


def test_the_order_of_the_teachers_matters():
    first, rows = step_of(text("uncertainty"), "m.task"), batch()
    other = step_of(text("uncertainty", order="ba"), "m.task", first.models)
    assert abs(first(rows)[1]["m/soft"].item() - other(rows)[1]["m/soft"].item()) > 1e-4
