"""Angle losses against triple loops, their memory by chunks, and what leaves them unchanged."""

import functools
import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dsl.runtime.ops import angles
from gkd_dsl.runtime.ops.angles import anchor_angle, angle_errors, layer_angle, sample_angle, token_angle
from gkd_dsl.runtime.ops.reduce import reduce_loss

VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
ERRORS = ("squared", "smooth_l1")


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(x, a, j, b):
    """The cosine of the angle at row j of an array between rows a and b."""
    first, second = x[j] - x[a], x[j] - x[b]
    sizes = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / sizes) if sizes > 0 else 0.0


def error_of(kind, d):
    return d * d if kind == "squared" else 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5


def at_vertex(s, t, j, ends, kind):
    """Errors of all ordered pairs of different ends at j."""
    return [error_of(kind, cosine(s, a, j, b) - cosine(t, a, j, b)) for a in ends for b in ends if a != b]


def mean(values):
    return sum(values) / len(values) if values else 0.0


def tokens_by_hand(student, teacher, valid, window, kind, divisor=None):
    out = np.zeros(valid.shape)
    for x, (s, t, row) in enumerate(zip(student.numpy(), teacher.numpy(), valid.numpy(), strict=True)):
        for j in np.flatnonzero(row):
            ends = [a for a in np.flatnonzero(row) if a != j and (window is None or abs(a - j) <= window // 2)]
            values = at_vertex(s, t, j, ends, kind)
            out[x, j] = sum(values) / divisor if divisor else mean(values)
    return torch.from_numpy(out)


@pytest.mark.parametrize("kind", ERRORS)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    window=st.sampled_from([None, 3, 5, 21]),
    seed=st.integers(0, 999),
)
@settings(max_examples=15, deadline=None)
def test_tokens_equal_the_triple_loop(kind, batch, length, window, seed) -> None:
    s, t = draw(batch, length, 3, seed=seed), draw(batch, length, 4, seed=seed + 1)
    valid = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.25
    found = token_angle(s, t, valid=valid, window=window, error=kind)
    torch.testing.assert_close(found, tokens_by_hand(s, t, valid, window, kind), rtol=1e-9, atol=1e-12)


def test_four_tokens_in_the_plane() -> None:
    """A square seen by a student that has it squeezed: right angles at the corners, others by hand."""
    square = torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1]]], dtype=torch.float64)
    line = torch.tensor([[[0.0, 0], [1, 0], [2, 0], [3, 0]]], dtype=torch.float64)
    half = 0.5**0.5
    # At the first corner: cosines 0, half, half; on the line 1 for each pair.
    corner = 2 * (1 + 2 * (1 - half) ** 2) / 6
    # At the second corner, ends 0, 2, 3: cosines 0, half, half; on the line -1, -1, 1.
    second = 2 * (1 + (1 + half) ** 2 + (1 - half) ** 2) / 6
    found = token_angle(line, square)[0]
    torch.testing.assert_close(found[:2], torch.tensor([corner, second], dtype=torch.float64))


def test_the_window_as_denominator_is_the_authors_value_away_from_the_ends() -> None:
    """They sum over window^2 members of each valid centre, the vertex and equal ends included, all of which give 0."""
    s, t = draw(1, 7, 3), draw(1, 7, 4, seed=1)
    found = token_angle(s, t, window=5, denominator="window")
    every = torch.ones(1, 7).bool()
    torch.testing.assert_close(found, tokens_by_hand(s, t, every, 5, "squared", divisor=25.0))

    def theirs(x, j):
        around = torch.nn.functional.normalize(x[0, j] - x[0, j - 2 : j + 3], dim=-1)
        return around @ around.T

    for j in (2, 3, 4):
        torch.testing.assert_close(found[0, j], (theirs(s, j) - theirs(t, j)).square().mean())
    whole = token_angle(s, t, denominator="window")
    torch.testing.assert_close(whole, tokens_by_hand(s, t, every, None, "squared", divisor=49.0))


def test_all_members_of_a_window_are_valid_not_its_centre_alone() -> None:
    s, t = draw(1, 5, 3), draw(1, 5, 3, seed=1)
    valid = torch.tensor([[1, 1, 1, 0, 0]]).bool()
    changed = torch.where(valid.unsqueeze(-1), s, 7 * draw(1, 5, 3, seed=9))
    torch.testing.assert_close(token_angle(s, t, valid=valid, window=5), token_angle(changed, t, valid=valid, window=5))


@pytest.mark.parametrize("kind", ERRORS)
def test_layers_equal_the_triple_loop(kind) -> None:
    s, t = draw(4, 5, 3, 4), draw(4, 5, 2, 4, seed=1)
    found = layer_angle(s, t, valid=VALID, error=kind)
    for b in range(4):
        for p in range(5):
            one, two = (x[b, p].T.numpy() for x in (s, t))
            each = [at_vertex(one, two, j, [i for i in range(4) if i != j], kind) for j in range(4)]
            wanted = mean(functools.reduce(operator.iadd, each, [])) if VALID[b, p] else 0.0
            assert abs(found[b, p].item() - wanted) < 1e-12
    torch.testing.assert_close(layer_angle(s[:, 0], t[:, 0], error=kind), found[:, 0])


@pytest.mark.parametrize("kind", ERRORS)
@given(batch=st.integers(1, 5), heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 999))
@settings(max_examples=12, deadline=None)
def test_samples_equal_the_triple_loop(kind, batch, heads, seed) -> None:
    s, t = draw(batch, 8, seed=seed), draw(batch, 4 * 3, seed=seed + 1)
    rows = torch.rand(batch, generator=torch.Generator().manual_seed(seed)) > 0.2
    found = sample_angle(s, t, valid=rows, heads=heads, error=kind)
    for i in range(batch):
        each = []
        for h in range(heads):
            one, two = (x.reshape(batch, heads, -1)[:, h].numpy() for x in (s, t))
            ends = [a for a in range(batch) if a != i and rows[a]]
            each.append(mean(at_vertex(one, two, i, ends, kind)))
        assert abs(found[i].item() - (mean(each) if rows[i] else 0.0)) < 1e-12


@pytest.mark.parametrize("batch", [1, 2])
def test_fewer_than_three_samples_have_no_angle(batch) -> None:
    s = draw(batch, 4).requires_grad_()
    value = sample_angle(s, draw(batch, 4, seed=1), heads=2)
    value.sum().backward()
    assert value.abs().max() == 0
    assert s.grad.abs().max() == 0


@pytest.mark.parametrize("kind", ERRORS)
def test_anchors_equal_the_triple_loop(kind) -> None:
    s, t = draw(3, 6, 3), draw(3, 6, 5, seed=1)
    anchors = torch.tensor([[0, 3], [5, -1], [-1, -1]])
    neighbours = torch.tensor([[[1, 2, 4], [0, 3, 5]], [[0, -1, 2], [1, 2, 3]], [[1, 2, 3], [1, 2, 3]]])
    found = anchor_angle(s, t, anchors=anchors, neighbours=neighbours, error=kind)
    for b in range(3):
        values = []
        for n, anchor in enumerate(anchors[b].tolist()):
            if anchor >= 0:
                ends = [m for m in neighbours[b, n].tolist() if m >= 0 and m != anchor]
                values += at_vertex(s[b].numpy(), t[b].numpy(), anchor, ends, kind)
        assert abs(found[b].item() - mean(values)) < 1e-12
    rows = torch.tensor([False, True, True])
    masked = anchor_angle(s, t, anchors=anchors, neighbours=neighbours, error=kind, valid=rows)
    torch.testing.assert_close(masked, torch.where(rows, found, found.new_zeros(())))


LOSSES = {
    "token": lambda s, t: token_angle(s, t, valid=VALID[:3]),
    "window": lambda s, t: token_angle(s, t, valid=VALID[:3], window=3),
    "layer": lambda s, t: layer_angle(s.transpose(-1, -2), t.transpose(-1, -2)),
    "sample": lambda s, t: sample_angle(s.flatten(1), t.flatten(1), error="squared"),
    "anchor": lambda s, t: anchor_angle(
        s, t, anchors=torch.tensor([[0, 2]] * 3), neighbours=torch.tensor([[[1, 3, 4], [0, 3, -1]]] * 3)
    ),
}
EACH = pytest.mark.parametrize("name", LOSSES)


@EACH
@pytest.mark.parametrize("budget", [1, 200])
def test_chunks_change_neither_values_nor_gradients(name, budget, monkeypatch) -> None:
    found = []
    for size in (1 << 22, budget):
        monkeypatch.setattr(angles, "BUDGET", size)
        s, t = draw(3, 5, 4).requires_grad_(), draw(3, 5, 4, seed=1).requires_grad_()
        value = LOSSES[name](s, t)
        found.append((value.detach(), *torch.autograd.grad((value * draw(*value.shape, seed=2)).sum(), (s, t))))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)
        assert whole.abs().max() > 0


@EACH
def test_gradients(name) -> None:
    s, t = draw(3, 5, 3).requires_grad_(), draw(3, 5, 4, seed=1).requires_grad_()
    torch.autograd.gradcheck(LOSSES[name], (s, t))
    torch.autograd.gradcheck(lambda x: LOSSES[name](x, t.detach()), (s,))


@EACH
def test_equal_sides_give_zero_and_no_gradient(name) -> None:
    s = draw(3, 5, 4).requires_grad_()
    value = LOSSES[name](s, s.detach().clone())
    value.sum().backward()
    assert value.abs().max() == 0
    assert s.grad.abs().max() == 0


@EACH
@given(seed=st.integers(0, 999), scale=st.floats(0.1, 10.0), far=st.floats(-5.0, 5.0))
@settings(max_examples=10, deadline=None)
def test_rotation_scale_and_translation_do_not_matter(name, seed, scale, far) -> None:
    s, t = draw(3, 5, 4, seed=seed), draw(3, 5, 4, seed=seed + 1)
    turn = torch.linalg.qr(draw(4, 4, seed=seed + 2))[0]
    moved = scale * s @ turn + far
    torch.testing.assert_close(LOSSES[name](moved, t), LOSSES[name](s, t), rtol=1e-6, atol=1e-9)


@given(seed=st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_the_order_of_samples_and_of_layers_does_not_matter(seed) -> None:
    s, t = draw(4, 6, seed=seed), draw(4, 6, seed=seed + 1)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(sample_angle(s[order], t[order], heads=2), sample_angle(s, t, heads=2)[order])
    one, two = draw(2, 3, 5, 4, seed=seed), draw(2, 3, 5, 4, seed=seed + 1)
    torch.testing.assert_close(layer_angle(one[..., order], two[..., order]), layer_angle(one, two))


@EACH
def test_equal_points_have_finite_gradients(name) -> None:
    """An edge of length 0 has no direction: it adds the cosine 0 and no gradient."""
    s = torch.ones(3, 5, 4, dtype=torch.float64).requires_grad_()
    value = LOSSES[name](s, draw(3, 5, 4))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert s.grad.abs().max() == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 3])
def test_padding_never_counts(side, window) -> None:
    s, t = draw(4, 5, 3), draw(4, 5, 4, seed=1)
    parts = (lambda x, y: (y, x)) if side == "left" else (lambda x, y: (x, y))
    found = []
    for pad in (0, 3):
        mask = torch.cat(parts(VALID, torch.zeros(4, pad).bool()), 1)
        one, two = (torch.cat(parts(x, x.new_full((4, pad, x.shape[-1]), float("nan"))), 1) for x in (s, t))
        one.requires_grad_()
        value, count = reduce_loss(token_angle(one, two, valid=mask, window=window), ("B", "L"), mask)
        (gradient,) = torch.autograd.grad(value, one)
        found.append((value, count, gradient[mask]))
        assert gradient[~mask].abs().max() == 0
    torch.testing.assert_close(found[0], found[1])


@EACH
def test_inputs_are_left_as_they_were(name) -> None:
    s, t = draw(3, 5, 4).requires_grad_(), draw(3, 5, 4, seed=1).requires_grad_()
    kept, versions = (s.detach().clone(), t.detach().clone()), (s._version, t._version)
    LOSSES[name](s, t).sum().backward()
    assert (s._version, t._version) == versions
    assert torch.equal(s, kept[0])
    assert torch.equal(t, kept[1])


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_half_precision_and_extreme_lengths_are_finite(name, dtype, scale) -> None:
    s = (scale * draw(3, 5, 4)).to(dtype).requires_grad_()
    value = LOSSES[name](s, draw(3, 5, 4, seed=1).to(dtype))
    value.sum().backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()


def test_memory_is_bounded_by_the_budget() -> None:
    """What autograd keeps is the points; the edges of a chunk are never all there at once."""
    sizes = []

    def pack(x):
        sizes.append(x.numel())
        return x

    points = draw(60, 8).requires_grad_()
    members = torch.arange(60).expand(60, 60)
    vertex = torch.arange(60)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        angle_errors(points, points.detach(), vertex, members, members != vertex.unsqueeze(-1), "squared", 4096)
    assert max(sizes) <= 60 * 60
    assert [len(range(60)[rows]) for rows in angles._chunks(members, 16, 4096)] == [1] * 60
    assert [len(range(60)[rows]) for rows in angles._chunks(members, 16, 1 << 16)] == [8] * 7 + [4]
