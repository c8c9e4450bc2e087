import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine
from scipy.special import huber as scipy_huber

from gkd_dsl.runtime.ops import distances as ops
from gkd_dsl.runtime.ops.reduce import reduce_loss

FEATURES = {
    "mse": ops.mse,
    "smooth_l1": ops.smooth_l1,
    "huber": ops.huber,
    "normalized_mse": ops.normalized_mse,
    "cosine_distance": ops.cosine_distance,
}
shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 7), st.integers(0, 10**6))


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numpy_loop(name, s, t, parameter):
    out = np.zeros(s.shape[:-1])
    for place in np.ndindex(out.shape):
        x, y = s[place], t[place]
        if name == "mse":
            out[place] = sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x)
        elif name == "normalized_mse":
            out[place] = np.mean((x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2)
        elif name == "cosine_distance":
            out[place] = cosine(x, y)
        elif name == "huber":
            out[place] = np.mean(scipy_huber(parameter, x - y))
        else:
            d = np.abs(x - y)
            out[place] = np.mean([0.5 * v * v / parameter if v < parameter else v - 0.5 * parameter for v in d])
    return out


@pytest.mark.parametrize("name", FEATURES)
@given(shape=shapes, parameter=st.floats(0.1, 3.0))
@settings(max_examples=25, deadline=None)
def test_values_are_those_of_a_numpy_loop(name, shape, parameter):
    b, l, h, seed = shape
    s, t = features(b, l, h, seed=seed), features(b, l, h, seed=seed + 1)
    options = {"huber": {"delta": parameter}, "smooth_l1": {"beta": parameter}}.get(name, {})
    found = FEATURES[name](s, t, **options)
    np.testing.assert_allclose(found.numpy(), numpy_loop(name, s.numpy(), t.numpy(), parameter), rtol=1e-8, atol=1e-12)


def test_mse_is_torchs_over_valid_tokens():
    s, t = features(3, 5, 4), features(3, 5, 4, seed=1)
    valid = torch.arange(5)[None] < torch.tensor([[5], [2], [3]])
    total, count = reduce_loss(ops.mse(s, t, valid=valid), ("B", "L"), valid)
    torch.testing.assert_close(total / count, F.mse_loss(s[valid], t[valid]))
    assert int(count) == 10


@pytest.mark.parametrize("causal", [False, True])
def test_mse_of_attention_maps_counts_cells_whose_query_and_key_are_valid(causal):
    lengths, heads = [4, 2, 3], 2
    s, t = features(3, heads, 4, 4), features(3, heads, 4, 4, seed=1)
    valid = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    dims = ("B", "*", "L", "L")
    total, count = reduce_loss(ops.mse(s, t, valid=valid, causal=causal, dims=dims), dims, valid, causal=causal)
    cells = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    assert int(count) == heads * cells
    oracle = sum(
        float((s[b, a, q, k] - t[b, a, q, k]) ** 2)
        for b, n in enumerate(lengths)
        for a in range(heads)
        for q in range(n)
        for k in range(q + 1 if causal else n)
    )
    assert float(total) == pytest.approx(oracle, rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["mse", "smooth_l1", "huber"])
def test_masked_cells_may_hold_minus_infinity(name, causal):
    valid = torch.tensor([[True, True, False], [True, False, False]])
    dims = ("B", "*", "L", "L")
    cells = (valid[:, None, :, None] & valid[:, None, None, :]).expand(2, 2, 3, 3)
    cells = cells.tril() if causal else cells
    s, t = features(2, 2, 3, 3), features(2, 2, 3, 3, seed=1)
    plain, _ = reduce_loss(FEATURES[name](s, t, valid=valid, dims=dims), dims, valid, causal=causal)
    s2, t2 = torch.where(cells, s, -math.inf).requires_grad_(), torch.where(cells, t, -math.inf)
    value = FEATURES[name](s2, t2, valid=valid, dims=dims, causal=causal)
    assert torch.isfinite(value).all()
    total, _ = reduce_loss(value, dims, valid, causal=causal)
    torch.testing.assert_close(total, plain)
    total.backward()
    assert (s2.grad[~cells] == 0).all()
    assert (s2.grad[cells] != 0).all()


def test_fp16_mask_fills_do_not_overflow():
    fill = torch.finfo(torch.float16).min
    valid = torch.tensor([[True, False]])
    s = torch.tensor([[[[1.0, fill], [fill, fill]]]], dtype=torch.float16)
    value = ops.mse(s, -s, valid=valid, dims=("B", "*", "L", "L"))
    assert value.dtype == torch.float32
    assert value.tolist() == [[[[4.0, 0.0], [0.0, 0.0]]]]
    vector = torch.full((1, 2), 300.0, dtype=torch.float16)
    assert ops.mse(vector, -vector).tolist() == [360000.0]


def test_pkd_distance_is_that_of_directions():
    s, t = features(5, 8), features(5, 8, seed=1)
    value = ops.normalized_mse(s, t)
    torch.testing.assert_close(value * 8, 2 - 2 * F.cosine_similarity(s, t))
    torch.testing.assert_close(value, ops.normalized_mse(3.0 * s, 0.1 * t))


def test_cosine_distance_of_known_vectors():
    s = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    t = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(ops.cosine_distance(s, t), torch.tensor([0.0, 1.0, 2.0, 1.0]))


def test_huber_and_smooth_l1_at_the_joint():
    zero = torch.zeros(1, 3)
    d = torch.tensor([[1.9, 2.0, 4.0]])
    torch.testing.assert_close(ops.huber(d, zero, delta=2.0, dims=("B", "L")), torch.tensor([[1.805, 2.0, 6.0]]))
    torch.testing.assert_close(ops.smooth_l1(d, zero, beta=2.0, dims=("B", "L")), torch.tensor([[0.9025, 1.0, 3.0]]))


@pytest.mark.parametrize("name", FEATURES)
def test_equal_sides_give_zero_and_a_zero_gradient(name):
    s = features(3, 4, 6).requires_grad_()
    value = FEATURES[name](s, s.detach().clone())
    torch.testing.assert_close(value, torch.zeros(3, 4, dtype=torch.float64), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    torch.testing.assert_close(gradient, torch.zeros_like(s), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["normalized_mse", "cosine_distance"])
def test_zero_vectors_have_finite_gradients(name):
    s = torch.zeros(2, 3, 4).requires_grad_()
    value = FEATURES[name](s, torch.ones(2, 3, 4))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("name", FEATURES)
def test_positions_that_do_not_count_are_zero_with_zero_gradient_whatever_is_there(name):
    s, t = features(2, 4, 5), features(2, 4, 5, seed=1)
    valid = torch.tensor([[True, True, False, False], [True, False, True, False]])
    s[~valid], t[~valid] = math.nan, math.inf
    s.requires_grad_()
    value = FEATURES[name](s, t, valid=valid)
    assert (value[~valid] == 0).all()
    value.sum().backward()
    assert (s.grad[~valid] == 0).all()
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("name", FEATURES)
def test_gradcheck(name):
    s, t = features(2, 3, 4).requires_grad_(), features(2, 3, 4, seed=1).requires_grad_()
    valid = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.autograd.gradcheck(lambda a, b: FEATURES[name](a, b, valid=valid), (s, t))


def test_mean_takes_values_as_they_are():
    x, valid = features(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    total, count = reduce_loss(ops.mean(x, valid=valid), ("B", "L"), valid)
    assert float(total) == pytest.approx(float(x[0, 0] + x[0, 1] + x[1, 0]))
    assert int(count) == 3
    torch.testing.assert_close(ops.mean(x[:, 0]), x[:, 0])
