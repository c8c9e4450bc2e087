"""Losses over a head from a teacher's k largest logits, against the operator and autograd on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from gkd_dsl.runtime.ops import fused_head
from gkd_dsl.runtime.ops.fused_head import Head, Teacher, fused_losses
from gkd_dsl.runtime.ops.fused_rows import RowLoss
from gkd_dsl.runtime.ops.fused_sparse import Stored
from gkd_dsl.runtime.ops.sparse import over_top_k, tail_mass
from gkd_dsl.tiles import BLOCK_BYTES, TILE_BYTES

N, H, V = 9, 4, 17
OPS = ("kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy")


def drawn(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept(logits, k, temperatures=(1.0, 2.0), treatment="bucket"):
    values, ids = logits.topk(k, dim=-1)
    return Stored(values, ids.int(), tail_mass(logits, ids, temperatures), temperatures, treatment)


def plain(loss, x):
    """The loss of each row on whole logits."""
    stored = loss.stored
    return over_top_k(loss.op)(
        x, stored.values, stored.ids, stored.tail, temperatures=stored.temperatures, treatment=stored.treatment,
        **loss.attrs,
    )  # fmt: skip


def both(losses, head, hidden, teachers=(), others=lambda x: 0.0, tile_rows=4):
    """Sums and gradients: fused, and on whole logits. `others` is what further losses give there."""
    leaves = [x for x in (hidden, head.weight, head.bias) if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    z = F.linear(hidden, head.weight, head.bias) * head.scale
    x = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    here = [loss for loss in losses if loss.stored is not None]
    sums = [(torch.where(loss.weight != 0, plain(loss, x), 0.0) * loss.weight).sum() for loss in here]
    wanted = sum(loss.scale * value for loss, value in zip(here, sums, strict=True)) + others(x)
    total, found = fused_losses(hidden, head, teachers, losses, tile_rows=tile_rows)
    return (
        (total, found[[loss.stored is not None for loss in losses]], torch.autograd.grad(total, leaves)),
        (wanted, torch.stack(sums), torch.autograd.grad(wanted, leaves)),
    )


def world(**shape):
    weight = drawn(N, seed=3).abs()
    weight[[1, 6]] = 0.0
    return drawn(N, H, seed=1), Head(drawn(V, H, seed=2), drawn(V, seed=4), **shape), weight


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "attrs", [{}, {"temperature": 2.0}, {"temperature": 3.0, "t2": False}, {"temperature": 0.5, "t2": True}]
)
@pytest.mark.parametrize("k", [1, 5, V - 1, V])
def test_each_loss_is_that_of_whole_logits(op, attrs, k):
    hidden, head, weight = world()
    loss = RowLoss(op, 0.7, weight, attrs=attrs, stored=kept(drawn(N, V, seed=5, scale=2.0), k))
    torch.testing.assert_close(*both([loss], head, hidden), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("op", ["kl", "tvd", "soft_cross_entropy"])
@pytest.mark.parametrize("tile_rows", [None, 2])
def test_renormalised(op, tile_rows):
    hidden, head, weight = world(scale=0.5, softcap=2.0)
    stored = kept(drawn(N, V, seed=5), 4, treatment="renormalise")
    loss = RowLoss(op, -1.1, weight, attrs={"temperature": 2.0}, stored=stored)
    torch.testing.assert_close(*both([loss], head, hidden, tile_rows=tile_rows), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("first", [True, False])
def test_beside_other_losses_and_teachers(first):
    hidden, head, weight = world()
    labels = torch.arange(N) % V
    logits = drawn(N, V, seed=8)
    loss = RowLoss("jsd", 0.4, weight, attrs={"beta": 0.2}, stored=kept(drawn(N, V, seed=5), 3))
    hard = RowLoss("cross_entropy", 1.5, torch.ones(N, dtype=torch.float64), labels=labels)
    soft = RowLoss("kl", 0.3, weight, teacher=0)

    def others(x):
        kl = F.kl_div(x.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return 1.5 * F.cross_entropy(x, labels, reduction="sum") + 0.3 * (kl * weight).sum()

    losses = [loss, hard, soft] if first else [hard, soft, loss]
    torch.testing.assert_close(
        *both(losses, head, hidden, [Teacher(logits=logits)], others), rtol=1e-11, atol=1e-11
    )  # fmt: skip


def test_a_sure_student_keeps_a_finite_loss_and_gradient():
    hidden, head, weight = world()
    hidden = (hidden * 300).float()
    head = Head(head.weight.float(), None)
    loss = RowLoss("reverse_kl", 1.0, weight.float(), stored=kept(drawn(N, V, seed=5, dtype=torch.float32), 3))
    fused, whole = both([loss], head, hidden)
    assert torch.isfinite(fused[0])
    torch.testing.assert_close(fused, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_what_is_stored_of_a_row_that_does_not_count_is_not_looked_at(op):
    hidden, head, weight = world()
    stored = kept(drawn(N, V, seed=5), 3)
    loss = RowLoss(op, 0.7, weight, stored=stored)
    wanted = both([loss], head, hidden)[1]
    stored.values[1], stored.tail[6], stored.ids[6] = float("nan"), float("inf"), 0
    torch.testing.assert_close(both([loss], head, hidden)[0], wanted, rtol=1e-11, atol=1e-11)


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    monkeypatch.setitem(TILE_BYTES, "cpu", 8 * 4096 * 4)
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 2 * 4096 * 4)
    hidden, weight = drawn(64, H, dtype=torch.float32).requires_grad_(), torch.ones(64)
    head = Head(drawn(4096, H, dtype=torch.float32), None)
    loss = RowLoss("kl", 1.0, weight, stored=kept(drawn(64, 4096, seed=5, dtype=torch.float32), 8))
    sizes = []
    make = fused_head.logits_of

    def seen(*args):
        found = make(*args)
        sizes.append(found.shape[0])
        return found

    monkeypatch.setattr(fused_head, "logits_of", seen)
    total, _ = fused_losses(hidden, head, [], [loss])
    total.backward()
    assert sizes == [8] * 8
    assert hidden.grad is not None
