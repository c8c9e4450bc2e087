"""Attention over layers against loops and closed forms (arXiv 2012.14022)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dsl.runtime.ops.layers import layer_attention, mean_square


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_it_equals_the_loop(shape, scale) -> None:
    query, layers = draw(*shape, 5), draw(*shape, 5, 3, seed=1)
    found = layer_attention(query, layers, scale=scale)
    flat = zip(query.reshape(-1, 5), layers.reshape(-1, 5, 3), found.reshape(-1, 5), strict=True)
    for q, keys, value in flat:
        products = [float((q * keys[:, j]).sum()) / (5**0.5 if scale else 1.0) for j in range(3)]
        weights = torch.tensor(products, dtype=torch.float64).softmax(0)
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
        torch.testing.assert_close(value, sum(w * keys[:, j] for j, w in enumerate(weights)))


def test_one_layer_is_itself_and_equal_layers_need_no_attention() -> None:
    layer = draw(2, 4)
    for many in (1, 5):
        stacked = layer.unsqueeze(-1).expand(-1, -1, many)
        torch.testing.assert_close(layer_attention(draw(2, 4, seed=1), stacked), layer)


@given(seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_the_order_of_the_layers_does_not_matter_and_rotations_go_through(seed) -> None:
    query, layers = draw(3, 4, seed=seed), draw(3, 4, 5, seed=seed + 1)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    found = layer_attention(query, layers)
    torch.testing.assert_close(layer_attention(query, layers[..., order]), found)
    turn = torch.linalg.qr(draw(4, 4, seed=seed + 2))[0]
    torch.testing.assert_close(layer_attention(query @ turn, turn.t() @ layers), found @ turn)


def test_gradients_reach_the_query_through_the_weights() -> None:
    query, layers = draw(2, 3).requires_grad_(), draw(2, 3, 4, seed=1).requires_grad_()
    for scale in (False, True):
        torch.autograd.gradcheck(lambda q, x, scale=scale: layer_attention(q, x, scale=scale), (query, layers))
    torch.autograd.gradcheck(mean_square, (query,))
    torch.testing.assert_close(mean_square(layers), layers.pow(2).sum(-1) / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_overflow_half_precision_do_not_here(dtype) -> None:
    """768 features of size 30 have the product 691200, past fp16; in fp32 the softmax picks one layer."""
    query = torch.full((1, 768), 30.0, dtype=dtype).requires_grad_()
    layers = torch.stack((torch.full((1, 768), 30.0), torch.full((1, 768), -30.0)), -1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = layer_attention(query, layers)
    value.sum().backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.full((1, 768), 30.0))
    assert torch.isfinite(query.grad).all()
