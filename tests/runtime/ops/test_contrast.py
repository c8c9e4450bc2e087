"""The contrastive loss against loops, closed forms, and what leaves it unchanged (arXiv 2012.07335)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dsl.runtime.ops.contrast import contrastive
from gkd_dsl.runtime.ops.reduce import reduce_loss

SIDES = pytest.mark.parametrize("negatives", ["teacher", "student"])


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def g(x, y):
    return 1 - float(np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y)))


def by_hand(student, teacher, valid, negatives):
    """Loops over samples and positions of [B, L, H]."""
    s, t, valid = student.numpy(), teacher.numpy(), valid.numpy()
    out = np.zeros(valid.shape)
    for a in range(len(s)):
        for p in range(valid.shape[1]):
            if not valid[a, p]:
                continue
            others = [b for b in range(len(s)) if b != a and valid[b, p]]
            one, many = (s, t) if negatives == "teacher" else (t, s)
            far = [(2 - g(one[a, p], many[b, p])) / 2 for b in others]
            out[a, p] = g(s[a, p], t[a, p]) + (sum(far) / len(far) if far else 0)
    return torch.from_numpy(out)


@SIDES
@given(batch=st.integers(1, 5), length=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_it_equals_the_loops(negatives, batch, length, seed) -> None:
    s, t = draw(batch, length, 5, seed=seed), draw(batch, length, 5, seed=seed + 1)
    valid = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.3
    torch.testing.assert_close(
        contrastive(s, t, valid=valid, negatives=negatives), by_hand(s, t, valid, negatives), rtol=1e-10, atol=1e-12
    )
    rows = valid[:, 0]
    found = contrastive(s[:, 0], t[:, 0], valid=rows, negatives=negatives, dims=("B",))
    torch.testing.assert_close(
        found, by_hand(s[:, :1], t[:, :1], rows[:, None], negatives)[:, 0], rtol=1e-10, atol=1e-12
    )


@SIDES
def test_orthogonal_everything_is_one_and_a_half(negatives) -> None:
    axes = torch.eye(8, dtype=torch.float64)
    values = contrastive(axes[:4], axes[4:], negatives=negatives)
    torch.testing.assert_close(values, torch.full((4,), 1.5, dtype=torch.float64))


@SIDES
def test_aligned_positive_and_orthogonal_negatives_are_one_half(negatives) -> None:
    axes = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(
        contrastive(3 * axes, axes, negatives=negatives), torch.full((4,), 0.5, dtype=torch.float64)
    )


def test_two_samples_by_hand_and_the_range() -> None:
    def vector(degrees):
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    s = torch.tensor([vector(0), vector(90)], dtype=torch.float64)
    t = torch.tensor([vector(60), vector(180)], dtype=torch.float64)
    # cos: own 1/2 and 0; s_0 with t_1: -1; s_1 with t_0: sin 60.
    wanted = torch.tensor([0.5 + 0.0, 1.0 + (1 + math.sqrt(3) / 2) / 2], dtype=torch.float64)
    torch.testing.assert_close(contrastive(s, t), wanted)
    swapped = torch.tensor([0.5 + (1 + math.sqrt(3) / 2) / 2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(contrastive(s, t, negatives="student"), swapped)
    pole = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(contrastive(pole, pole), torch.zeros(2, dtype=torch.float64))
    same = torch.ones(2, 2, dtype=torch.float64)
    torch.testing.assert_close(contrastive(-same, same), torch.full((2,), 2.0, dtype=torch.float64))
    worst = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(contrastive(-worst, worst), torch.full((2,), 3.0, dtype=torch.float64))


def test_the_positive_term_has_the_weight_one() -> None:
    """GLMKD takes n times the diagonal out of the negatives, which makes the positive term weigh 1.5."""
    s, t = draw(3, 6, seed=4), draw(3, 6, seed=5)
    own = torch.stack([torch.tensor(g(a.numpy(), b.numpy()), dtype=torch.float64) for a, b in zip(s, t, strict=True)])
    total = torch.zeros(3, dtype=torch.float64)
    for a in range(3):
        total[a] = sum((2 - g(s[a].numpy(), t[b].numpy())) / 2 for b in range(3) if b != a) / 2
    value = contrastive(s, t)
    torch.testing.assert_close(value - total, own)
    assert (value - (total + 1.5 * own)).abs().min() > 1e-3


@pytest.mark.parametrize("shape", [(1, 4), (1, 3, 4)])
def test_a_sample_alone_has_no_negatives_and_is_finite(shape) -> None:
    s, t = draw(*shape).requires_grad_(), draw(*shape, seed=1)
    value = contrastive(s, t)
    value.sum().backward()
    torch.testing.assert_close(value.detach(), 1 - torch.cosine_similarity(s, t, dim=-1).detach())
    assert torch.isfinite(s.grad).all()


@SIDES
def test_gradients(negatives) -> None:
    s, t = draw(3, 2, 4).requires_grad_(), draw(3, 2, 4, seed=1).requires_grad_()
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    torch.autograd.gradcheck(lambda a, b: contrastive(a, b, valid=valid, negatives=negatives), (s, t))


@given(seed=st.integers(0, 999), scale=st.floats(0.1, 10.0))
@settings(max_examples=15, deadline=None)
def test_rotations_lengths_and_the_order_of_the_samples_do_not_matter(seed, scale) -> None:
    s, t = draw(4, 3, 5, seed=seed), draw(4, 3, 5, seed=seed + 1)
    turn = torch.linalg.qr(draw(5, 5, seed=seed + 2))[0]
    before = contrastive(s, t)
    torch.testing.assert_close(contrastive(scale * s @ turn, t @ turn), before)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(contrastive(s[order], t[order]), before[order])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0.0, float("nan"), float("inf")])
def test_padding_never_counts(side, filler) -> None:
    s, t = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    pad, none = torch.full((3, 2, 5), filler, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.bool)
    parts = (lambda x, y: (y, x)) if side == "left" else (lambda x, y: (x, y))
    longer = [torch.cat(parts(x, pad), 1).requires_grad_() for x in (s, t)]
    mask = torch.cat(parts(valid, none), 1)
    plain = s.clone().requires_grad_()
    value, count = reduce_loss(contrastive(plain, t, valid=valid), ("B", "L"), valid)
    more, more_count = reduce_loss(contrastive(*longer, valid=mask), ("B", "L"), mask)
    assert count == more_count == 9
    torch.testing.assert_close(more, value)
    value.backward()
    more.backward()
    own = slice(2, 6) if side == "left" else slice(0, 4)
    torch.testing.assert_close(longer[0].grad[:, own], plain.grad)
    outside = torch.ones(6, dtype=torch.bool)
    outside[own] = False
    assert longer[0].grad[:, outside].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_half_precision_and_extreme_lengths_are_finite(dtype, scale) -> None:
    s = (scale * draw(3, 2, 8)).to(dtype).requires_grad_()
    t = draw(3, 2, 8, seed=1).to(dtype)
    value = contrastive(s, t)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()
