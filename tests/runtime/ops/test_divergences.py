import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp
from scipy.stats import entropy
from torch.distributions import Categorical, kl_divergence

from gkd_dsl.runtime.ops import divergences as ops
from gkd_dsl.runtime.ops.reduce import reduce_loss

PAIRS = {
    "soft_cross_entropy": ops.soft_cross_entropy,
    "kl": ops.kl,
    "reverse_kl": ops.reverse_kl,
    "jsd": ops.jsd,
    "tvd": ops.tvd,
}
ZERO_AT_EQUAL = ["kl", "reverse_kl", "jsd", "tvd"]
shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 9), st.integers(0, 10**6))


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def numpy_loop(name, student, teacher, T, t2, beta=0.5):
    out = np.zeros(student.shape[:-1])
    for place in np.ndindex(out.shape):
        log_q = student[place] / T - logsumexp(student[place] / T)
        log_p = teacher[place] / T - logsumexp(teacher[place] / T)
        p, q = np.exp(log_p), np.exp(log_q)
        if name == "kl":
            value = entropy(p, q)
        elif name == "reverse_kl":
            value = entropy(q, p)
        elif name == "soft_cross_entropy":
            value = -sum(pc * lq for pc, lq in zip(p, log_q, strict=True))
        elif name == "tvd":
            value = sum(abs(pc - qc) for pc, qc in zip(p, q, strict=True)) / 2
        else:
            m = beta * p + (1 - beta) * q
            value = beta * entropy(p, m) + (1 - beta) * entropy(q, m)
        out[place] = value * (T * T if t2 else 1)
    return out


@pytest.mark.parametrize("name", PAIRS)
@given(shape=shapes, T=st.floats(0.3, 20.0), t2=st.booleans())
@settings(max_examples=25, deadline=None)
def test_values_are_those_of_a_numpy_loop(name, shape, T, t2):
    b, l, c, seed = shape
    s, t = logits(b, l, c, seed=seed), logits(b, l, c, seed=seed + 1)
    found = PAIRS[name](s, t, temperature=T, t2=t2)
    np.testing.assert_allclose(found.numpy(), numpy_loop(name, s.numpy(), t.numpy(), T, t2), rtol=1e-9, atol=1e-12)


def test_t2_is_the_default_of_kl_and_not_of_jsd_or_tvd():
    s, t = logits(2, 5), logits(2, 5, seed=1)
    for name, default in {
        "kl": True,
        "reverse_kl": True,
        "soft_cross_entropy": True,
        "jsd": False,
        "tvd": False,
    }.items():
        torch.testing.assert_close(PAIRS[name](s, t, temperature=3.0), PAIRS[name](s, t, temperature=3.0, t2=default))


def test_kl_is_torchs_kldivloss_batchmean_and_that_of_distributions():
    s, t, T = logits(6, 7), logits(6, 7, seed=1), 2.5
    total, count = reduce_loss(ops.kl(s, t, temperature=T), ("B",), None)
    oracle = torch.nn.KLDivLoss(reduction="batchmean")(F.log_softmax(s / T, -1), F.softmax(t / T, -1)) * T**2
    torch.testing.assert_close(total / count, oracle)
    forward = kl_divergence(Categorical(logits=t / T), Categorical(logits=s / T))
    torch.testing.assert_close(ops.kl(s, t, temperature=T, t2=False), forward)
    backward = kl_divergence(Categorical(logits=s / T), Categorical(logits=t / T))
    torch.testing.assert_close(ops.reverse_kl(s, t, temperature=T, t2=False), backward)


def test_which_side_is_which():
    # A teacher with two modes: the forward divergence blows up for a student on one of them, the reverse does not.
    teacher, one_mode = torch.tensor([[5.0, 5.0, -5.0]]), torch.tensor([[9.0, -9.0, -9.0]])
    assert ops.kl(one_mode, teacher) > 5.0
    assert ops.reverse_kl(one_mode, teacher) < 1.0
    torch.testing.assert_close(ops.kl(one_mode, teacher), ops.reverse_kl(teacher, one_mode))


def test_soft_cross_entropy_is_kl_and_the_entropy_of_the_teacher():
    s, t, T = logits(4, 6), logits(4, 6, seed=1), 3.0
    difference = ops.soft_cross_entropy(s, t, temperature=T, t2=False) - ops.kl(s, t, temperature=T, t2=False)
    torch.testing.assert_close(difference, Categorical(logits=t / T).entropy())
    one_hot = torch.full((4, 6), -math.inf, dtype=torch.float64)
    one_hot[torch.arange(4), torch.tensor([0, 5, 2, 2])] = 0.0
    torch.testing.assert_close(
        ops.soft_cross_entropy(s, one_hot), F.cross_entropy(s, torch.tensor([0, 5, 2, 2]), reduction="none")
    )


def test_the_gradient_of_kl_is_t_times_the_difference():
    s, t, T = logits(5, 7).requires_grad_(), logits(5, 7, seed=1), 4.0
    total, count = reduce_loss(ops.kl(s, t, temperature=T), ("B",), None)
    (total / count).backward()
    torch.testing.assert_close(s.grad, T * (F.softmax(s / T, -1) - F.softmax(t / T, -1)).detach() / 5)


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_at_a_high_temperature_kl_is_the_squared_difference_of_centred_logits(name):
    s, t = logits(5, 7), logits(5, 7, seed=1)
    d = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    limit = d.square().sum(-1) / (2 * 7)
    torch.testing.assert_close(PAIRS[name](s, t, temperature=1e4), limit, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ZERO_AT_EQUAL)
@pytest.mark.parametrize("T", [1.0, 4.0])
def test_equal_sides_give_zero_and_a_zero_gradient(name, T):
    s = logits(3, 4, 9).requires_grad_()
    value = PAIRS[name](s, s.detach().clone(), temperature=T)
    torch.testing.assert_close(value, torch.zeros(3, 4, dtype=torch.float64), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    torch.testing.assert_close(gradient, torch.zeros_like(s), atol=1e-10, rtol=0)


@given(shape=shapes, beta=st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_jsd_is_symmetric_bounded_and_as_the_gkd_papers_formula(shape, beta):
    b, l, c, seed = shape
    s, t = logits(b, l, c, seed=seed, scale=5.0), logits(b, l, c, seed=seed + 1, scale=5.0)
    value = ops.jsd(s, t, beta=beta)
    torch.testing.assert_close(value, ops.jsd(t, s, beta=1 - beta), atol=1e-10, rtol=1e-8)
    assert (value >= -1e-12).all()
    assert (value <= -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta)) + 1e-12).all()
    assert (ops.jsd(s, t) <= math.log(2) + 1e-12).all()
    # The same number by another way: logsumexp of the weighted log-probabilities, as trainers compute it.
    log_q, log_p = log_softmax(s.numpy(), -1), log_softmax(t.numpy(), -1)
    log_m = np.logaddexp(log_p + np.log(beta), log_q + np.log1p(-beta))
    oracle = beta * (np.exp(log_p) * (log_p - log_m)).sum(-1) + (1 - beta) * (np.exp(log_q) * (log_q - log_m)).sum(-1)
    np.testing.assert_allclose(value.numpy(), oracle, atol=1e-10)


def test_the_ends_of_jsd_are_the_two_divergences_and_its_slopes_there_too():
    s, t = logits(4, 6), logits(4, 6, seed=1)
    torch.testing.assert_close(ops.jsd(s, t, beta=0.0), ops.kl(s, t))
    torch.testing.assert_close(ops.jsd(s, t, beta=1.0), ops.reverse_kl(s, t))
    e = 1e-6
    torch.testing.assert_close(ops.jsd(s, t, beta=e) / e, ops.kl(s, t), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ops.jsd(s, t, beta=1 - e) / e, ops.reverse_kl(s, t), rtol=1e-3, atol=1e-4)


@given(shape=shapes)
@settings(max_examples=40, deadline=None)
def test_tvd_is_a_distance_between_zero_and_one_and_obeys_pinsker(shape):
    b, l, c, seed = shape
    s, t = logits(b, l, c, seed=seed, scale=6.0), logits(b, l, c, seed=seed + 1, scale=6.0)
    value = ops.tvd(s, t)
    assert ((value >= 0) & (value <= 1 + 1e-12)).all()
    torch.testing.assert_close(value, ops.tvd(t, s))
    assert (value <= (ops.kl(s, t) / 2).sqrt() + 1e-9).all()


@pytest.mark.parametrize("name", PAIRS)
def test_trim_leaves_the_padding_of_a_vocabulary_out(name):
    s, t = logits(2, 3, 8), logits(2, 3, 11, seed=1)
    value = PAIRS[name](s, t, align="trim", vocabulary=7)
    torch.testing.assert_close(value, PAIRS[name](s[..., :7], t[..., :7]))
    s.requires_grad_()
    (gradient,) = torch.autograd.grad(PAIRS[name](s, t, align="trim", vocabulary=7).sum(), s)
    assert (gradient[..., 7:] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing):
    s, labels = logits(3, 4, 6), torch.tensor([[0, 5, -100, 2], [-100] * 4, [1, 1, 1, 1]])
    values = ops.cross_entropy(s, labels, label_smoothing=smoothing)
    oracle = F.cross_entropy(s.transpose(1, 2), labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(values, oracle)
    total, count = reduce_loss(values, ("B", "L"), labels != -100)
    mean = F.cross_entropy(s.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(total / count, mean)
    loop = [-log_softmax(s[0, j].numpy())[labels[0, j]] for j in (0, 1, 3)]
    if not smoothing:
        np.testing.assert_allclose(values[0, [0, 1, 3]].numpy(), loop)


def test_a_label_that_the_model_lacks_is_said():
    with pytest.raises(ValueError, match="labels run from 1 to 6, but the model has 6 classes"):
        ops.cross_entropy(logits(2, 6), torch.tensor([1, 6]))


def test_what_a_mask_leaves_out_may_hold_any_label_and_any_logits():
    s, labels = logits(2, 3, 6), torch.tensor([[0, 5, 17], [1, -7, 2]])
    valid = torch.tensor([[True, True, False], [True, False, True]])
    s[~valid] = math.nan
    s.requires_grad_()
    value = ops.cross_entropy(s, labels, valid=valid)
    torch.testing.assert_close(value[valid], F.cross_entropy(s[valid], labels[valid], reduction="none"))
    assert (value[~valid] == 0).all()
    value.sum().backward()
    assert (s.grad[~valid] == 0).all()
    assert torch.isfinite(s.grad).all()


def test_nothing_counted_is_zero_not_nan():
    s = logits(2, 6).requires_grad_()
    value = ops.cross_entropy(s, torch.tensor([-100, -100]))
    total, count = reduce_loss(value, ("B",), torch.tensor([False, False]))
    assert (total.item(), count.item()) == (0.0, 0)
    total.backward()
    assert (s.grad == 0).all()
    assert (ops.kl(s, s.detach(), valid=torch.tensor([False, False])) == 0).all()


# --- attention rows -----------------------------------------------------------------------------


def attention_loop(s, t, valid, T, causal):
    out = np.zeros(s.shape[:3])
    for b, a, q in np.ndindex(out.shape):
        keys = [k for k in range(s.shape[-1]) if valid[b, k] and (not causal or k <= q)]
        if valid[b, q]:
            out[b, a, q] = entropy(np.exp(log_softmax(t[b, a, q, keys] / T)), np.exp(log_softmax(s[b, a, q, keys] / T)))
    return out


@given(st.integers(0, 10**6), st.booleans(), st.floats(0.5, 4.0))
@settings(max_examples=25, deadline=None)
def test_attention_kl_is_a_loop_over_cropped_rows(seed, causal, T):
    s, t = logits(3, 2, 5, 5, seed=seed), logits(3, 2, 5, 5, seed=seed + 1)
    valid = torch.arange(5)[None] < torch.tensor([[5], [3], [1]])
    if seed % 2:
        valid = valid.flip(1)
    found = ops.attention_kl(s, t, valid=valid, temperature=T, causal=causal)
    np.testing.assert_allclose(
        found.numpy(), attention_loop(s.numpy(), t.numpy(), valid.numpy(), T, causal), atol=1e-10
    )


def test_attention_kl_masks_what_the_model_masked_and_sends_no_gradient_there():
    s, t = logits(2, 2, 4, 4), logits(2, 2, 4, 4, seed=1)
    valid = torch.tensor([[True, True, True, False], [False, False, False, False]])
    ends = torch.where(valid[:, None, None, :], s, -math.inf).requires_grad_()
    value = ops.attention_kl(ends, torch.where(valid[:, None, None, :], t, torch.finfo(torch.float64).min), valid=valid)
    torch.testing.assert_close(value, ops.attention_kl(s, t, valid=valid))
    (gradient,) = torch.autograd.grad(value.sum(), ends)
    cells = valid[:, None, :, None] & valid[:, None, None, :]
    assert torch.isfinite(gradient).all()
    assert (gradient[~cells.expand_as(gradient)] == 0).all()
    assert (gradient[cells.expand_as(gradient)] != 0).any()


def test_heads_permuted_in_both_give_the_same_loss():
    s, t, valid = logits(2, 4, 5, 5), logits(2, 4, 5, 5, seed=1), torch.ones(2, 5, dtype=torch.bool)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        ops.attention_kl(s, t, valid=valid).sum(), ops.attention_kl(s[:, order], t[:, order], valid=valid).sum()
    )


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_logits_at_their_limits_give_finite_values(name, dtype):
    largest = torch.finfo(torch.float16).max
    s = torch.tensor([[largest, -largest, 0.0], [0.0, 1.0, 2.0], [-largest] * 3], dtype=dtype).requires_grad_()
    t = torch.tensor([[-largest, largest, 0.0], [2.0, 1.0, 0.0], [largest] * 3], dtype=dtype)
    value = PAIRS[name](s, t, temperature=2.0)
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert torch.isfinite(gradient).all()
    exact = PAIRS[name](s.detach().double(), t.double(), temperature=2.0)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_rows_of_half_precision_scores_are_those_of_fp64(dtype):
    s, t = logits(1, 2, 3, 3, scale=8.0, dtype=torch.float32).to(dtype), logits(1, 2, 3, 3, seed=1, scale=8.0).to(dtype)
    valid = torch.tensor([[True, True, False]])
    value = ops.attention_kl(s, t, valid=valid, temperature=3.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), ops.attention_kl(s.double(), t.double(), valid=valid, temperature=3.0))


@pytest.mark.parametrize("name", PAIRS)
def test_a_class_that_both_exclude_adds_nothing(name):
    s, t = logits(3, 5), logits(3, 5, seed=1)
    out = torch.full((3, 2), -math.inf, dtype=torch.float64)
    s2, t2 = torch.cat((s, out), 1).requires_grad_(), torch.cat((t, out), 1).requires_grad_()
    value = PAIRS[name](s2, t2)
    torch.testing.assert_close(value, PAIRS[name](s, t))
    for gradient in torch.autograd.grad(value.sum(), (s2, t2)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", PAIRS)
def test_positions_that_do_not_count_are_zero_with_zero_gradient_whatever_is_there(name):
    s, t = logits(2, 4, 5), logits(2, 4, 5, seed=1)
    valid = torch.tensor([[True, True, False, False], [True, False, True, False]])
    s[~valid], t[~valid] = math.nan, math.inf
    s.requires_grad_()
    value = PAIRS[name](s, t, valid=valid)
    assert (value[~valid] == 0).all()
    total, _ = reduce_loss(value, ("B", "L"), valid)
    total.backward()
    assert (s.grad[~valid] == 0).all()
    assert torch.isfinite(s.grad).all()
    assert (s.grad[valid] != 0).any()


@pytest.mark.parametrize("name", [n for n in PAIRS if n != "tvd"])
def test_gradcheck(name):
    s, t = logits(2, 3, 4).requires_grad_(), logits(2, 3, 4, seed=1).requires_grad_()
    valid = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.autograd.gradcheck(lambda a, b: PAIRS[name](a, b, temperature=2.0, valid=valid), (s, t))


def test_gradcheck_of_the_others():
    s, t = logits(2, 3, 4).requires_grad_(), logits(2, 3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda a: ops.tvd(a, t, temperature=2.0), (s,))
    labels = torch.tensor([[0, 3, -100], [1, 2, 2]])
    assert torch.autograd.gradcheck(lambda a: ops.cross_entropy(a, labels, label_smoothing=0.1), (s,))
    scores, valid = logits(2, 2, 3, 3).requires_grad_(), torch.tensor([[True, True, False], [True, True, True]])
    other = logits(2, 2, 3, 3, seed=3)
    assert torch.autograd.gradcheck(lambda a: ops.attention_kl(a, other, valid=valid, causal=True), (scores,))


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_squared_error_is_that_of_numpy(shape):
    x, y = torch.randn(shape, dtype=torch.float64), torch.tensor([1, -2, 0, 7, 3])
    x.requires_grad_()
    found = ops.squared_error(x, y)
    wanted = (x.detach().numpy().reshape(5) - y.numpy()) ** 2
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-12)
    (slope,) = torch.autograd.grad(found.sum(), [x])
    np.testing.assert_allclose(slope.numpy().reshape(5), 2 * (x.detach().numpy().reshape(5) - y.numpy()), rtol=1e-12)
    half = ops.squared_error(torch.full(shape, 300.0, dtype=torch.bfloat16), torch.zeros(5))
    assert half.dtype == torch.float32
    assert torch.equal(half, torch.full((5,), 9e4))


def test_squared_error_where_a_row_does_not_count():
    x = torch.tensor([1.0, float("inf"), 2.0], requires_grad=True)
    valid = torch.tensor([True, False, True])
    found = ops.squared_error(x, torch.zeros(3), valid=valid, dims=("B",))
    assert found.tolist() == [1.0, 0.0, 4.0]
    (slope,) = torch.autograd.grad(found.sum(), [x])
    assert slope.tolist() == [2.0, 0.0, 4.0]
