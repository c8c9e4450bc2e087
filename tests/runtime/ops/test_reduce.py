import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dsl.runtime.ops import distances, divergences
from gkd_dsl.runtime.ops.reduce import count_positions, position_mask, reduce_loss
from gkd_dsl.types import BATCH, LENGTH, Dim

HEADS = Dim("s.A", 3)
DIMS = {
    "B": (BATCH,),
    "B L": (BATCH, LENGTH),
    "B A L": (BATCH, HEADS, LENGTH),
    "B L L": (BATCH, LENGTH, LENGTH),
    "B A L L": (BATCH, HEADS, LENGTH, LENGTH),
    "B A": (BATCH, HEADS),
}
lengths = st.lists(st.integers(0, 5), min_size=1, max_size=4)


def counts_by_loop(dims, valid, batch, length, causal):
    """Every position one by one, as the plan describes it."""
    sizes = [{"B": batch, "L": length}.get(dim.name, dim.size) for dim in dims]
    counted = np.zeros(sizes, dtype=bool)
    for place in itertools.product(*(range(size) for size in sizes)):
        row = place[0]
        tokens = [index for index, dim in zip(place, dims, strict=True) if dim.name == "L"]
        holds = True
        if valid is not None and valid.ndim == 1:
            holds = bool(valid[row])
        elif valid is not None:
            holds = all(bool(valid[row, token]) for token in tokens)
        if causal and len(tokens) == 2:
            holds = holds and tokens[1] <= tokens[0]
        counted[place] = holds
    return counted


def mask_of(kind, sizes, length=5):
    if kind == "none":
        return None
    tokens = torch.arange(length)[None] < torch.tensor(sizes)[:, None]
    return tokens if kind == "tokens" else torch.tensor(sizes) > 2


@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
@pytest.mark.parametrize("kind", ["none", "rows", "tokens"])
@given(sizes=lengths, causal=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_what_counts_is_what_the_plan_says(dims, kind, sizes, causal, seed):
    if kind == "tokens" and LENGTH not in dims:
        return
    valid, batch = mask_of(kind, sizes), len(sizes)
    counted = counts_by_loop(dims, valid, batch, 5, causal)
    shape = counted.shape
    mask = position_mask(dims, valid, 5, causal)
    assert mask.ndim == len(dims)
    np.testing.assert_array_equal(mask.expand(shape).numpy(), counted)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    total, count = reduce_loss(values, dims, valid, causal=causal)
    assert count.item() == counted.sum()
    assert count.dtype == torch.int64
    assert total.item() == pytest.approx(values.numpy()[counted].sum(), abs=1e-12)
    assert count_positions(dims, {}, valid, batch, 5, causal).item() == counted.sum()


def test_weights_multiply_the_values_and_leave_the_count_alone():
    values = torch.arange(12.0).reshape(2, 2, 3)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    token, sample = torch.rand(2, 3), torch.rand(2)
    total, count = reduce_loss(values, ("B", "*", "L"), valid, token_weight=token, sample_weight=sample)
    oracle = sum(
        values[b, a, q] * token[b, q] * sample[b] for b in range(2) for a in range(2) for q in range(3) if valid[b, q]
    )
    torch.testing.assert_close(total, oracle)
    assert count.item() == 6


def test_the_token_weight_of_a_map_is_that_of_the_query():
    values, token = torch.ones(1, 2, 2), torch.tensor([[10.0, 1.0]])
    total, _ = reduce_loss(values, ("B", "L", "L"), None, causal=True, token_weight=token)
    assert total.item() == 12.0


def test_what_does_not_count_has_no_part_even_where_it_is_nan():
    values = torch.tensor([[1.0, float("nan")]]).requires_grad_()
    weight = torch.tensor([[2.0, float("nan")]]).requires_grad_()
    total, count = reduce_loss(values, ("B", "L"), torch.tensor([[True, False]]), token_weight=weight)
    total.backward()
    assert (total.item(), count.item()) == (2.0, 1)
    assert values.grad.tolist() == [[2.0, 0.0]]
    assert weight.grad.tolist() == [[1.0, 0.0]]


def test_half_precision_values_are_summed_in_fp32():
    values = torch.full((4096,), 100.0, dtype=torch.float16)
    total, _ = reduce_loss(values, ("B",), None)
    assert total.dtype == torch.float32
    assert total.item() == 409600.0


def test_errors():
    with pytest.raises(ValueError, match="does not fit"):
        position_mask(("B",), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="`length` is needed"):
        position_mask(("B", "L", "L"), None, causal=True)
    with pytest.raises(ValueError, match=r"size of the axis `s\.A`"):
        count_positions((BATCH, Dim("s.A")), {}, None, 2, 3)
    with pytest.raises(ValueError, match="has 1 axes, and its type has 2"):
        reduce_loss(torch.zeros(2), ("B", "L"), None)
    assert count_positions((BATCH, Dim("s.A")), {"s.A": 4}, None, 2, 3).item() == 8


# --- padding and micro-batches, for every loss ------------------------------------------------------


def _pair(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]


CASES = {
    **{name: ((6,), ("B", "L"), function) for name, function in {
        "kl": lambda s, t, v: divergences.kl(s, t, valid=v, temperature=2.0),
        "reverse_kl": lambda s, t, v: divergences.reverse_kl(s, t, valid=v),
        "soft_cross_entropy": lambda s, t, v: divergences.soft_cross_entropy(s, t, valid=v),
        "jsd": lambda s, t, v: divergences.jsd(s, t, valid=v, beta=0.3),
        "tvd": lambda s, t, v: divergences.tvd(s, t, valid=v),
        "mse": lambda s, t, v: distances.mse(s, t, valid=v),
        "normalized_mse": lambda s, t, v: distances.normalized_mse(s, t, valid=v),
        "cosine_distance": lambda s, t, v: distances.cosine_distance(s, t, valid=v),
        "smooth_l1": lambda s, t, v: distances.smooth_l1(s, t, valid=v),
        "huber": lambda s, t, v: distances.huber(s, t, valid=v),
        "cross_entropy": lambda s, t, v: divergences.cross_entropy(s, t.argmax(-1), valid=v),
        "mean": lambda s, t, v: distances.mean(s[..., 0] * t[..., 0], valid=v),
    }.items()},
    "attention_kl": ("map", ("B", "*", "L"), lambda s, t, v: divergences.attention_kl(s, t, valid=v)),
    "attention_kl causal": ("map", ("B", "*", "L"), lambda s, t, v: divergences.attention_kl(s, t, valid=v, causal=True)),
    "mse of maps": (
        "map", ("B", "*", "L", "L"), lambda s, t, v: distances.mse(s, t, valid=v, dims=("B", "*", "L", "L")),
    ),
}  # fmt: skip


def _tensors(tail, batch, length, seed):
    return _pair(batch, 2, length, length, seed=seed) if tail == "map" else _pair(batch, length, *tail, seed=seed)


def _padded(x, tail, extra, left, value=7.0):
    pad = [(extra, 0) if left else (0, extra)]
    spread = [*pad, *pad] if tail == "map" else [(0, 0), *pad]
    return torch.nn.functional.pad(x, [n for both in spread for n in both], value=value)


@pytest.mark.parametrize("name", CASES)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_appended_padding_changes_neither_value_nor_gradient(name, sizes, extra, left, seed):
    tail, dims, function = CASES[name]
    valid = torch.arange(4)[None] < torch.tensor(sizes)[:, None]
    s, t = _tensors(tail, len(sizes), 4, seed)
    s.requires_grad_()
    total, count = reduce_loss(function(s, t, valid), dims, valid)
    (total / count).backward()
    wider = torch.nn.functional.pad(valid, (extra, 0) if left else (0, extra))
    s2 = _padded(s.detach(), tail, extra, left).requires_grad_()
    total2, count2 = reduce_loss(function(s2, _padded(t, tail, extra, left), wider), dims, wider)
    (total2 / count2).backward()
    assert count2.item() == count.item()
    torch.testing.assert_close(total2, total)
    torch.testing.assert_close(s2.grad, _padded(s.grad, tail, extra, left, 0.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_four_micro_batches_of_two_are_one_batch_of_eight(name):
    tail, dims, function = CASES[name]
    valid = torch.arange(5)[None] < torch.tensor([5, 1, 3, 3, 2, 5, 1, 1])[:, None]
    s, t = _tensors(tail, 8, 5, 0)
    whole = s.clone().requires_grad_()
    total, count = reduce_loss(function(whole, t, valid), dims, valid)
    (total / count).backward()
    named = [BATCH if d == "B" else LENGTH if d == "L" else Dim("s.A", 2) for d in dims]
    denominator = sum(count_positions(named, {}, valid[i : i + 2], 2, 5) for i in range(0, 8, 2))
    assert denominator.item() == count.item()
    parts, value = s.clone().requires_grad_(), 0.0
    for i in range(0, 8, 2):
        part, _ = reduce_loss(function(parts[i : i + 2], t[i : i + 2], valid[i : i + 2]), dims, valid[i : i + 2])
        (part / denominator).backward()
        value += part.item() / denominator.item()
    assert value == pytest.approx((total / count).item(), rel=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_left_as_they_are_and_a_detached_teacher_gets_no_gradient(name):
    tail, dims, function = CASES[name]
    valid = torch.tensor([[True, True, False], [True, False, False]])
    s, t = _tensors(tail, 2, 3, 1)
    before = s.clone(), t.clone(), valid.clone()
    s.requires_grad_()
    t.requires_grad_()
    total, _ = reduce_loss(function(s, t.detach(), valid), dims, valid)
    total.backward()
    assert t.grad is None
    assert (s.grad != 0).any()
    for now, was in zip((s.detach(), t.detach(), valid), before, strict=True):
        assert torch.equal(now, was)
