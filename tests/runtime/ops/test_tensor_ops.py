import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from scipy.stats import ortho_group
from torch.distributions import Categorical

from gkd_dsl.runtime.ops import arithmetic, masks, relations, tensors


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6), st.floats(0.2, 10.0))
@settings(max_examples=20, deadline=None)
def test_distributions_are_scipys(seed, T):
    x = randn(2, 3, 5, seed=seed)
    np.testing.assert_allclose(tensors.softmax(x, temperature=T), special.softmax(x.numpy() / T, -1))
    np.testing.assert_allclose(tensors.softmin(x, temperature=T), special.softmax(-x.numpy() / T, -1))
    np.testing.assert_allclose(tensors.log_softmax(x, temperature=T), special.log_softmax(x.numpy() / T, -1))
    torch.testing.assert_close(tensors.entropy(x, temperature=T), Categorical(logits=x / T).entropy())


def test_entropy_at_its_ends():
    uniform, sure = torch.zeros(1, 8), torch.tensor([[0.0, -math.inf, -math.inf]]).requires_grad_()
    assert tensors.entropy(uniform).item() == pytest.approx(math.log(8))
    value = tensors.entropy(sure)
    assert value.item() == 0.0
    value.sum().backward()
    assert torch.isfinite(sure.grad).all()


@pytest.mark.parametrize("name", ["softmax", "softmin", "log_softmax", "entropy", "l2norm", "layernorm"])
def test_half_precision_is_computed_in_fp32(name):
    x = torch.tensor([[60000.0, -60000.0, 3.0], [0.1, 0.2, 0.3]], dtype=torch.float16)
    value = getattr(tensors, name)(x)
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    torch.testing.assert_close(value.double(), getattr(tensors, name)(x.double()), rtol=1e-5, atol=1e-6)


def test_norms():
    x = randn(3, 4, 5)
    np.testing.assert_allclose(tensors.l2norm(x), x.numpy() / np.linalg.norm(x.numpy(), axis=-1, keepdims=True))
    zero = torch.zeros(2, 3).requires_grad_()
    tensors.l2norm(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(
        tensors.layernorm(x, eps=1e-3), centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    )
    torch.testing.assert_close(tensors.layernorm(3 * x + 2, eps=0.0), tensors.layernorm(x, eps=0.0))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_pool_is_the_mean_of_the_cropped_text(sizes, seed):
    x = randn(len(sizes), 5, 3, seed=seed)
    valid = torch.arange(5)[None] < torch.tensor(sizes)[:, None]
    x[~valid] = math.nan
    x.requires_grad_()
    value = tensors.pool(x, valid=valid)
    for row, size in enumerate(sizes):
        expected = x[row, :size].mean(0) if size else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(value[row], expected)
    value.sum().backward()
    assert (x.grad[~valid] == 0).all()
    whole = randn(2, 5, 3)
    torch.testing.assert_close(tensors.pool(whole), whole.mean(1))
    torch.testing.assert_close(tensors.pool(whole, valid=torch.tensor([True, False]))[0], whole[0].mean(0))


def test_stack_index_and_concat():
    parts = {str(i): randn(2, 3, seed=i) for i in range(12)}
    stacked = tensors.stack(**dict(reversed(parts.items())))
    assert stacked.shape == (2, 3, 12)
    for i in range(12):
        assert torch.equal(tensors.index(stacked, i=i), parts[str(i)])
    assert torch.equal(tensors.index(stacked, i=-1), parts["11"])
    joined = tensors.concat(**{"0": randn(2, 3), "1": randn(2, 4, seed=1)})
    assert torch.equal(joined, torch.cat((randn(2, 3), randn(2, 4, seed=1)), -1))


def test_heads_are_cut_and_put_back():
    x = randn(2, 5, 12)
    heads = tensors.split_heads(x, heads=3)
    assert heads.shape == (2, 3, 5, 4)
    assert torch.equal(heads[:, 1], x[..., 4:8])
    assert torch.equal(tensors.merge_heads(heads), x)


def test_project_is_the_block_in_its_own_precision():
    block = torch.nn.Linear(4, 6)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(tensors.project(x, block), x @ block.weight.T + block.bias)
    assert tensors.project(x.bfloat16(), block).dtype == torch.float32


def test_detach_cuts_the_gradient():
    x = randn(3).requires_grad_()
    assert not tensors.detach(x).requires_grad
    assert torch.equal(tensors.detach(x), x)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.booleans())
@settings(max_examples=20, deadline=None)
def test_per_sample_is_each_samples_own_mean(sizes, maps):
    batch = len(sizes)
    x = randn(batch, 2, 4, 4) if maps else randn(batch, 4)
    dims = ("B", "*", "L", "L") if maps else ("B", "L")
    valid = torch.arange(4)[None] < torch.tensor(sizes)[:, None]
    value = tensors.per_sample(x, valid=valid, dims=dims)
    for row, size in enumerate(sizes):
        cropped = x[row, :, :size, :size] if maps else x[row, :size]
        torch.testing.assert_close(value[row], cropped.mean() if size else torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(tensors.per_sample(x), x.flatten(1).mean(1))


def test_per_sample_of_a_causal_map_looks_back_only():
    x = randn(2, 2, 4, 4)
    dims, valid = ("B", "*", "L", "L"), torch.tensor([[True] * 4, [True, True, True, False]])
    for mask, sizes in ((valid, (4, 3)), (None, (4, 4))):
        value = tensors.per_sample(x, valid=mask, causal=True, dims=dims)
        for row, n in enumerate(sizes):
            cells = [x[row, a, q, k] for a in range(2) for q in range(n) for k in range(q + 1)]
            torch.testing.assert_close(value[row], torch.stack(cells).mean())


def test_per_sample_of_one_value_each():
    x = randn(4)
    torch.testing.assert_close(tensors.per_sample(x), x)
    masked = tensors.per_sample(x, valid=torch.tensor([True, False, True, True]))
    assert masked.tolist() == [x[0].item(), 0.0, x[2].item(), x[3].item()]


def test_arithmetic_is_numpys():
    a, b = randn(3, 4).abs() + 0.1, randn(3, 4, seed=1).abs() + 0.1
    x, y = a.numpy(), b.numpy()
    for name, oracle in {
        "add": x + y, "sub": x - y, "mul": x * y, "div": x / y, "power": x**y,
        "less": x < y, "less_equal": x <= y, "greater": x > y, "greater_equal": x >= y,
    }.items():  # fmt: skip
        np.testing.assert_allclose(getattr(arithmetic, name)(a, b), oracle)
    np.testing.assert_allclose(arithmetic.sub(1.0, a), 1 - x)
    np.testing.assert_allclose(arithmetic.div(1.0, a), 1 / x)
    np.testing.assert_allclose(arithmetic.power(2.0, a), 2**x)
    for name, oracle in {"neg": -x, "log": np.log(x), "exp": np.exp(x), "sqrt": np.sqrt(x)}.items():
        np.testing.assert_allclose(getattr(arithmetic, name)(a), oracle)
    np.testing.assert_allclose(arithmetic.absolute(-a), x)
    np.testing.assert_allclose(arithmetic.select(a > b, a, 0.0), np.where(x > y, x, 0))
    np.testing.assert_allclose(arithmetic.select(a > b, 1.0, b), np.where(x > y, 1, y))


@pytest.mark.parametrize("name", ["log", "exp", "tanh", "sqrt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_functions_of_half_precision_are_taken_in_fp32(name, dtype):
    x = torch.tensor([0.3, 1.7, 11.5], dtype=dtype)
    value = getattr(arithmetic, name)(x)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), getattr(torch, name)(x.double()), rtol=1e-6, atol=1e-7)
    for power in (arithmetic.power(x, 2.5), arithmetic.power(x, torch.full_like(x, 2.5))):
        torch.testing.assert_close(power.double(), x.double() ** 2.5, rtol=1e-6, atol=1e-7)


def test_the_root_of_zero_has_no_infinite_gradient():
    x = torch.tensor([0.0, 4.0]).requires_grad_()
    arithmetic.sqrt(x).sum().backward()
    assert x.grad.tolist() == [0.0, 0.25]


def test_masks():
    ids = torch.tensor([[5, 6, 7], [8, -100, 9]])
    assert masks.valid_tokens(torch.tensor([[1, 1, 0]])).tolist() == [[True, True, False]]
    assert masks.next_token(ids).tolist() == [[6, 7, -100], [-100, 9, -100]]
    shifted = masks.next_token(torch.tensor([[True, False, True]]))
    assert shifted.tolist() == [[False, True, False]]
    assert shifted.dtype == torch.bool
    assert masks.not_equal(ids, -100.0).tolist() == [[True, True, True], [True, False, True]]
    assert masks.equal(ids, ids).all()
    a, b = torch.tensor([[True, False], [True, True]]), torch.tensor([[True, True], [False, True]])
    assert masks.both(a, b).tolist() == [[True, False], [False, True]]
    assert masks.both(a, torch.tensor([False, True])).tolist() == [[False, False], [True, True]]
    assert masks.either(a, b).tolist() == [[True, True], [True, True]]
    assert masks.negation(a).tolist() == [[False, True], [False, False]]


def test_the_shift_meets_logits_and_labels_as_a_causal_model_trains():
    labels = torch.tensor([[3, 1, 4, 1, -100]])
    logits = randn(1, 5, 6)
    from gkd_dsl.runtime.ops.divergences import cross_entropy
    from gkd_dsl.runtime.ops.reduce import reduce_loss

    shifted = masks.next_token(labels)
    valid = masks.not_equal(shifted, -100)
    total, count = reduce_loss(cross_entropy(logits, shifted, valid=valid), ("B", "L"), valid)
    torch.testing.assert_close(total / count, F.cross_entropy(logits[0, :-1], labels[0, 1:]))
    assert count.item() == 3


# --- relations ----------------------------------------------------------------------------------


def test_gram_and_relations_are_loops():
    x, y = randn(2, 3, 8), randn(2, 3, 8, seed=1)
    gram, rel = relations.gram(x), relations.relation(x, y, heads=4)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                assert gram[b, i, j].item() == pytest.approx(float(x[b, i] @ x[b, j]) / 8)
                for a in range(4):
                    part = slice(2 * a, 2 * a + 2)
                    expected = float(x[b, i, part] @ y[b, j, part]) / math.sqrt(2)
                    assert rel[b, a, i, j].item() == pytest.approx(expected)
    torch.testing.assert_close(relations.self_relation(x, heads=4), relations.relation(x, x, heads=4))


def test_heads_of_the_model_or_cut_anew():
    x = randn(2, 4, 5, 6)
    assert relations.self_relation(x).shape == (2, 4, 5, 5)
    torch.testing.assert_close(relations.self_relation(x), relations.self_relation(x, heads=4))
    anew = relations.self_relation(x, heads=8)
    torch.testing.assert_close(anew, relations.self_relation(tensors.merge_heads(x), heads=8))


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_a_rotation_of_the_features_leaves_relations_alone(seed):
    rotation = torch.from_numpy(ortho_group.rvs(6, random_state=seed % 2**31))
    x = randn(2, 4, 6, seed=seed)
    torch.testing.assert_close(relations.gram(x @ rotation), relations.gram(x))
    torch.testing.assert_close(relations.self_relation(x @ rotation, heads=1), relations.self_relation(x, heads=1))
    values = randn(2, 3, 4, 6, seed=seed)
    torch.testing.assert_close(relations.self_relation(values @ rotation), relations.self_relation(values))


def test_minilm_value_relation_is_scaled_attention_without_a_mask():
    values = randn(2, 3, 4, 6)
    out = F.scaled_dot_product_attention(values, values, values)
    torch.testing.assert_close(tensors.softmax(relations.self_relation(values)) @ values, out)


def test_relations_stay_in_fp32_under_autocast():
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = relations.self_relation(x, heads=2)
    torch.testing.assert_close(value, relations.self_relation(x, heads=2), rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: tensors.softmax(x, temperature=2.0),
        tensors.softmin,
        tensors.log_softmax,
        tensors.entropy,
        tensors.l2norm,
        tensors.layernorm,
        relations.gram,
        lambda x: relations.self_relation(x, heads=2),
        lambda x: tensors.pool(x, valid=torch.tensor([[True, True, False], [True, False, False]])),
    ],
)
def test_gradcheck(function):
    assert torch.autograd.gradcheck(function, (randn(2, 3, 4).requires_grad_(),))


def test_the_token_that_stands_for_a_text_is_the_first_or_the_last_valid_one():
    x = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    valid = torch.tensor([[True, True, False, False], [False, True, True, True]])
    run = tensors.cls
    assert torch.equal(run(x, valid=valid), torch.stack([x[0, 0], x[1, 1]]))
    assert torch.equal(run(x, last=True, valid=valid), torch.stack([x[0, 1], x[1, 3]]))
    assert torch.equal(run(x, last=True), x[:, 3])
    rows = torch.tensor([True, False])
    assert torch.equal(run(x, valid=rows), x[:, 0])
    assert torch.equal(run(x, last=True, valid=rows), x[:, 3])
