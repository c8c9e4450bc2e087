"""Relations of tokens and layers against loops, and what leaves them unchanged (arXiv 2109.08359)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dsl.runtime.ops.reduce import reduce_loss
from gkd_dsl.runtime.ops.relations import cosine_relation, layer_relation, relation_kl, sample_relation_kl

VALID = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def row_kl(p, q):
    """KL of the softmax of two vectors of scores, in NumPy."""
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p, q))
    return float((p * np.log(p / q)).sum())


def by_hand(student, teacher, valid, temperature=1.0):
    """Row by row of [B, L, L], over the other valid tokens."""
    out = np.zeros(valid.shape)
    for b, row in enumerate(valid.numpy()):
        for i in np.flatnonzero(row):
            others = [k for k in np.flatnonzero(row) if k != i]
            if others:
                s, t = (x[b, i, others].numpy() / temperature for x in (student, teacher))
                out[b, i] = row_kl(t, s)
    return torch.from_numpy(out)


def test_cosines_of_tokens_and_of_layers() -> None:
    x = draw(3, 5, 4)
    found = cosine_relation(x)
    for b in range(3):
        for i in range(5):
            torch.testing.assert_close(found[b, i], F.cosine_similarity(x[b, i][None], x[b], dim=-1))
    torch.testing.assert_close(cosine_relation(x[:, None])[:, 0], found)
    torch.testing.assert_close(layer_relation(x.transpose(-1, -2)), found)
    masked = cosine_relation(torch.where(VALID.unsqueeze(-1), x, x.new_tensor(float("nan"))), valid=VALID)
    cells = VALID.unsqueeze(-1) & VALID.unsqueeze(-2)
    torch.testing.assert_close(masked, torch.where(cells, found, found.new_zeros(())))


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_rows_equal_the_loops(batch, length, temperature, seed) -> None:
    s, t = draw(batch, length, length, seed=seed), draw(batch, length, length, seed=seed + 1)
    valid = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.3
    found = relation_kl(s, t, valid=valid, temperature=temperature)
    torch.testing.assert_close(found, by_hand(s, t, valid, temperature), rtol=1e-9, atol=1e-12)
    in_heads = relation_kl(s[:, None], t[:, None], valid=valid, temperature=temperature, dims=("B", "*", "L"))
    torch.testing.assert_close(in_heads[:, 0], found)


def test_layers_at_each_token() -> None:
    s, t = draw(3, 5, 4, 4), draw(3, 5, 4, 4, seed=1)
    found = relation_kl(s, t, valid=VALID, dims=("B", "L", "*"))
    flat = by_hand(s.reshape(15, 4, 4), t.reshape(15, 4, 4), torch.ones(15, 4).bool()).reshape(3, 5, 4)
    torch.testing.assert_close(found, torch.where(VALID.unsqueeze(-1), flat, flat.new_zeros(())))
    pooled = relation_kl(s[:, 0], t[:, 0], dims=("B", "*"))
    torch.testing.assert_close(pooled, flat[:, 0])


@pytest.mark.parametrize("diagonal", [False, True])
def test_pairs_as_denominator_are_the_rows_spread_over_all_pairs(diagonal) -> None:
    """The authors divide the summed divergence by the number of pairs, the diagonal included."""
    s, t = draw(3, 5, 5), draw(3, 5, 5, seed=1)
    rows = relation_kl(s, t, valid=VALID, diagonal=diagonal)
    cells = relation_kl(s, t, valid=VALID, diagonal=diagonal, denominator="pairs", dims=("B", "L", "L"))
    torch.testing.assert_close(cells.sum(-1), rows)
    (by_row, row_count), (by_pair, pair_count) = (
        reduce_loss(rows, ("B", "L"), VALID), reduce_loss(cells, ("B", "L", "L"), VALID)
    )  # fmt: skip
    torch.testing.assert_close(by_row, by_pair)
    assert (row_count, pair_count) == (4 + 2 + 1, 16 + 4 + 1)


def test_the_authors_masking_is_not_a_number_where_this_is_finite() -> None:
    """-inf at the diagonal and 0 as its target: 0 * inf. Finite here, in value and gradient, without padding too."""
    s, t = draw(2, 4, 4).requires_grad_(), draw(2, 4, 4, seed=1)
    holes = torch.eye(4).bool()
    log_q = F.log_softmax(s.masked_fill(holes, float("-inf")), -1)
    theirs = F.kl_div(log_q, F.softmax(t.masked_fill(holes, float("-inf")), -1), reduction="sum")
    assert torch.isnan(theirs)
    for valid in (
        None,
        torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool(),
        torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]]).bool(),
    ):
        value = relation_kl(s, t, valid=valid)
        (gradient,) = torch.autograd.grad(value.sum(), s)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
        assert gradient.diagonal(dim1=-2, dim2=-1).abs().max() == 0


def test_causal_rows_look_back_only() -> None:
    s, t = draw(1, 4, 4), draw(1, 4, 4, seed=1)
    found = relation_kl(s, t, causal=True)
    wanted = [
        0.0,
        0.0,
        row_kl(t[0, 2, :2].numpy(), s[0, 2, :2].numpy()),
        row_kl(t[0, 3, :3].numpy(), s[0, 3, :3].numpy()),
    ]
    torch.testing.assert_close(found[0], torch.tensor(wanted, dtype=torch.float64))


@given(seed=st.integers(0, 999), scale=st.floats(0.01, 100.0))
@settings(max_examples=15, deadline=None)
def test_rotations_and_lengths_do_not_matter(seed, scale) -> None:
    x = draw(2, 4, 6, seed=seed)
    turn = torch.linalg.qr(draw(6, 6, seed=seed + 1))[0]
    torch.testing.assert_close(cosine_relation(scale * x @ turn), cosine_relation(x))
    torch.testing.assert_close(cosine_relation(1e-9 * x), cosine_relation(x))
    stacked = draw(2, 3, 6, 4, seed=seed)
    turned = (stacked.transpose(-1, -2) @ turn).transpose(-1, -2)
    torch.testing.assert_close(layer_relation(scale * turned), layer_relation(stacked))


@pytest.mark.parametrize("denominator", ["rows", "pairs"])
def test_equal_maps_give_zero_and_no_gradient(denominator) -> None:
    x = draw(3, 5, 5).requires_grad_()
    dims = ("B", "L") if denominator == "rows" else ("B", "L", "L")
    value = relation_kl(x, x.detach().clone(), valid=VALID, denominator=denominator, dims=dims)
    value.sum().backward()
    assert value.abs().max() < 1e-15
    assert x.grad.abs().max() < 1e-15


@pytest.mark.parametrize("denominator", ["rows", "pairs"])
def test_gradients(denominator) -> None:
    x, y = draw(3, 5, 3).requires_grad_(), draw(3, 5, 2, seed=1).requires_grad_()
    dims = ("B", "L") if denominator == "rows" else ("B", "L", "L")

    def loss(a, b):
        maps = (cosine_relation(v, valid=VALID) for v in (a, b))
        return relation_kl(*maps, valid=VALID, denominator=denominator, dims=dims)

    torch.autograd.gradcheck(loss, (x, y))
    torch.autograd.gradcheck(layer_relation, (draw(2, 3, 4).requires_grad_(),))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0.0, float("nan")])
def test_padding_never_counts(side, filler) -> None:
    s, t = draw(3, 5, 4), draw(3, 5, 4, seed=1)
    pad, none = torch.full((3, 2, 4), filler, dtype=torch.float64), torch.zeros(3, 2).bool()
    parts = (lambda x, y: (y, x)) if side == "left" else (lambda x, y: (x, y))
    found = []
    for (a, b), mask in (
        ((s, t), VALID),
        ([torch.cat(parts(x, pad), 1) for x in (s, t)], torch.cat(parts(VALID, none), 1)),
    ):
        a = a.clone().requires_grad_()
        value = relation_kl(cosine_relation(a, valid=mask), cosine_relation(b, valid=mask), valid=mask)
        (gradient,) = torch.autograd.grad(value.sum(), a)
        found.append((value.sum(), gradient[mask]))
        assert gradient[~mask].abs().max() == 0
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_half_precision_and_extreme_lengths_are_finite(dtype, scale) -> None:
    x = (scale * draw(3, 5, 8)).to(dtype).requires_grad_()
    value = relation_kl(cosine_relation(x, valid=VALID), cosine_relation(draw(3, 5, 8, seed=1)), valid=VALID)
    value.sum().backward()
    assert value.dtype in (torch.float32, torch.float64)
    assert torch.isfinite(value).all()
    assert torch.isfinite(x.grad).all()


@given(batch=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_samples_equal_the_loops(batch, seed) -> None:
    s, t = draw(batch, 3, seed=seed), draw(batch, 5, seed=seed + 1)
    rows = torch.rand(batch, generator=torch.Generator().manual_seed(seed)) > 0.2
    maps = [F.cosine_similarity(x[:, None], x[None], dim=-1)[None] for x in (s, t)]
    wanted = by_hand(*maps, rows[None], 2.0)[0]
    found = sample_relation_kl(s, t, valid=rows, temperature=2.0)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(sample_relation_kl(s[order], t[order], valid=rows[order], temperature=2.0), found[order])


def test_gradients_of_samples() -> None:
    s, t = draw(4, 3).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
    torch.autograd.gradcheck(sample_relation_kl, (s, t))
    alone = s[:1].detach().requires_grad_()
    sample_relation_kl(alone, t[:1]).sum().backward()
    assert alone.grad.abs().max() == 0
