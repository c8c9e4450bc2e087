"""Losses over a head whose logits never exist whole, against torch.nn.functional on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from gkd_dsl.runtime.ops.fused_head import Head, Teacher, fused_losses
from gkd_dsl.runtime.ops.fused_rows import RowLoss
from gkd_dsl.tiles import BLOCK_BYTES, TILE_BYTES

N, H, V = 11, 5, 13


def side(seed, width=H, vocabulary=V, dtype=torch.float64, bias=True, rows=N, **shape):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    offset = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return hidden, Head(weight, offset, **shape)


def whole(hidden, head):
    x = F.linear(hidden, head.weight, head.bias)
    x = x / head.scale if head.divide else x * head.scale
    return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)


def by_hand(loss, x, t):
    """The values of each row, by torch's own functions on whole logits."""
    attrs = loss.attrs
    if loss.op == "cross_entropy":
        smoothing = attrs.get("label_smoothing", 0.0)
        return F.cross_entropy(x, loss.labels, reduction="none", label_smoothing=smoothing, ignore_index=-100)
    if attrs.get("align") == "trim":
        x, t = x[:, : attrs["vocabulary"]], t[:, : attrs["vocabulary"]]
    temperature = attrs.get("temperature", 1.0)
    log_q, log_p = F.log_softmax(x / temperature, -1), F.log_softmax(t / temperature, -1)
    times = temperature**2 if attrs.get("t2", loss.op not in ("jsd", "tvd")) else 1.0
    q, p, beta = log_q.exp(), log_p.exp(), attrs.get("beta", 0.5)
    if loss.op == "tvd":
        return times * (p - q).abs().sum(-1) / 2
    if loss.op == "soft_cross_entropy":
        return -times * (p * log_q).sum(-1)
    if loss.op == "kl" or (loss.op == "jsd" and beta == 0.0):
        return times * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if loss.op == "reverse_kl" or beta == 1.0:
        return times * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    first = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    return times * (beta * first + (1 - beta) * F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1))


def weights(seed):
    """Positions that count with their weights; some count in no loss at all."""
    found = torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    found[[2, 7 + seed % 3]] = 0.0
    return found


LABELS = torch.tensor([0, 12, -100, 3, 4, 5, 6, -100, 8, 9, -100])
CASES = {
    "kl": {"teacher": 0},
    "kl.hot": {"op": "kl", "teacher": 0, "attrs": {"temperature": 3.0}},
    "kl.plain": {"op": "kl", "teacher": 0, "attrs": {"temperature": 2.0, "t2": False}},
    "kl.trim": {"op": "kl", "teacher": 1, "attrs": {"align": "trim", "vocabulary": 9, "temperature": 1.5}},
    "reverse_kl": {"teacher": 0, "attrs": {"temperature": 0.7}},
    "jsd": {"teacher": 0},
    "jsd.skew": {"op": "jsd", "teacher": 1, "attrs": {"beta": 0.1, "temperature": 2.0, "t2": True, "align": "trim",
                                                 "vocabulary": 13}},
    "jsd.0": {"op": "jsd", "teacher": 0, "attrs": {"beta": 0.0}},
    "jsd.1": {"op": "jsd", "teacher": 0, "attrs": {"beta": 1.0, "temperature": 2.0}},
    "soft_cross_entropy": {"teacher": 0, "attrs": {"temperature": 2.0}},
    "tvd": {"teacher": 0, "attrs": {"temperature": 2.0}},
    "cross_entropy": {"labels": LABELS},
    "cross_entropy.smooth": {"op": "cross_entropy", "labels": LABELS, "attrs": {"label_smoothing": 0.2}},
}  # fmt: skip


def row_loss(name, scale, seed):
    case = dict(CASES[name])
    weight = weights(seed)
    if "labels" in case:
        weight = weight * (LABELS != -100)
    return RowLoss(case.pop("op", name), scale, weight, **case)


def compare(losses, student, *, given=False, tile_rows=None, tolerance=1e-11):
    hidden, head = student
    sources = [side(5, 4, V), side(6, 3, V + 2, bias=False)]
    taught = [whole(*source) for source in sources]
    wanted = [x for x in (hidden, head.weight, head.bias) if x is not None]
    for x in wanted:
        x.requires_grad_()
    x = whole(hidden, head)
    sums = []
    for loss in losses:
        values = by_hand(loss, x, taught[loss.teacher] if loss.teacher is not None else None)
        sums.append((torch.where(loss.weight != 0, values, 0.0) * loss.weight).sum())
    expected = sum(loss.scale * value for loss, value in zip(losses, sums, strict=True))
    gradients = torch.autograd.grad(expected, wanted)
    teachers = [Teacher(*source) for source in sources]
    if given:
        teachers = [Teacher(logits=logits) for logits in taught]
    total, found = fused_losses(hidden, head, teachers, losses, tile_rows=tile_rows)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.stack(sums).detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(torch.autograd.grad(total, wanted), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile_rows", [None, 4])
@pytest.mark.parametrize("name", CASES)
def test_each_loss_is_that_of_whole_logits(name, tile_rows):
    compare([row_loss(name, 0.7, 1)], side(1), tile_rows=tile_rows)


@pytest.mark.parametrize("name", [name for name in CASES if "teacher" in CASES[name]])
def test_a_teacher_may_be_given_by_its_logits(name):
    compare([row_loss(name, -1.3, 2)], side(1), given=True, tile_rows=3)


@pytest.mark.parametrize(
    "shape",
    [{}, {"bias": False}, {"scale": 0.3}, {"scale": 8.0, "divide": True}, {"softcap": 2.0},
     {"scale": 2.0, "softcap": 1.5, "bias": False}],
)  # fmt: skip
def test_all_losses_at_once_over_heads_of_every_shape(shape):
    losses = [row_loss(name, 0.2 + 0.1 * number, number) for number, name in enumerate(CASES)]
    compare(losses, side(2, **shape), tile_rows=4)


@pytest.mark.parametrize("order", [("kl", "cross_entropy"), ("cross_entropy", "kl"), ("kl.trim", "jsd", "kl")])
def test_the_order_of_losses_that_share_a_softmax_does_not_matter(order):
    compare([row_loss(name, 1.0, 3) for name in order], side(3))


def test_blocks_of_rows_inside_a_tile(monkeypatch):
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 8 * V)
    compare([row_loss("kl", 1.0, 1), row_loss("cross_entropy", 0.5, 1)], side(1), tile_rows=8)


def test_the_gradient_is_the_slope_of_the_total():
    hidden, head = side(4)
    losses = [row_loss("jsd", 0.6, 1), row_loss("kl.hot", 0.3, 2), row_loss("cross_entropy.smooth", 1.0, 0)]
    teachers = [Teacher(*side(5, 4))]

    def total(x, weight, bias):
        return fused_losses(x, Head(weight, bias, softcap=3.0), teachers, losses, tile_rows=5)[0]

    inputs = [x.clone().requires_grad_() for x in (hidden, head.weight, head.bias)]
    gradients = torch.autograd.grad(total(*inputs), inputs)
    step = 1e-6
    for number, gradient in enumerate(gradients):
        for place in range(inputs[number].numel()):
            ends = []
            for sign in (1.0, -1.0):
                moved = [x.detach().clone() for x in inputs]
                moved[number].view(-1)[place] += sign * step
                ends.append(total(*moved))
            slope = (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close(gradient.reshape(-1)[place], slope, rtol=1e-6, atol=1e-7)


def test_the_gradient_scales_with_what_comes_from_above_and_is_taken_once():
    hidden, head = side(1)
    hidden.requires_grad_()
    loss = row_loss("cross_entropy", 1.0, 1)
    (once,) = torch.autograd.grad(fused_losses(hidden, head, [], [loss])[0], [hidden])
    total, _ = fused_losses(hidden, head, [], [loss])
    (thrice,) = torch.autograd.grad(3.0 * total, [hidden], retain_graph=True)
    torch.testing.assert_close(thrice, 3.0 * once)
    with pytest.raises(RuntimeError, match="can be taken once"):
        torch.autograd.grad(total, [hidden])


def test_only_what_trains_gets_a_gradient_and_a_loss_of_factor_0_gives_its_sum():
    hidden, head = side(1)
    teachers = [Teacher(*side(5, 4))]
    losses = [row_loss("kl", 0.0, 1)]
    total, sums = fused_losses(hidden, head, teachers, losses)
    assert not total.requires_grad
    assert total == 0.0
    assert sums[0] > 0.0
    head.bias.requires_grad_()
    total, again = fused_losses(hidden, head, teachers, losses)
    torch.testing.assert_close(again, sums)
    assert torch.autograd.grad(total, [head.bias])[0].abs().max() == 0.0


def test_a_tied_weight_gets_both_gradients():
    ids = torch.arange(N) % V
    weight = side(1)[1].weight.requires_grad_()
    loss = row_loss("cross_entropy", 1.0, 1)
    total, _ = fused_losses(F.embedding(ids, weight), Head(weight), [], [loss])
    values = by_hand(loss, F.embedding(ids, weight) @ weight.T, None)
    (expected,) = torch.autograd.grad((torch.where(loss.weight != 0, values, 0.0) * loss.weight).sum(), [weight])
    torch.testing.assert_close(torch.autograd.grad(total, [weight])[0], expected)


def test_no_row_gives_0_and_a_gradient_of_0():
    hidden, head = side(1, rows=0)
    loss = RowLoss("kl", 1.0, torch.zeros(0), 0)
    for x in (hidden, head.weight):
        x.requires_grad_()
    total, sums = fused_losses(hidden, head, [Teacher(*side(5, 4, rows=0))], [loss])
    assert total == 0.0
    assert sums.tolist() == [0.0]
    gradients = torch.autograd.grad(total, [hidden, head.weight])
    assert gradients[0].shape == (0, H)
    assert gradients[1].abs().max() == 0.0


def test_a_class_that_the_teacher_excludes_adds_nothing():
    hidden, head = side(1)
    hidden.requires_grad_()
    logits = whole(*side(5, 4)).index_fill(1, torch.tensor([3]), -torch.inf)
    loss = RowLoss("kl", 1.0, torch.ones(N), 0, exact=False)
    total, _ = fused_losses(hidden, head, [Teacher(logits=logits)], [loss])
    keep = [column for column in range(V) if column != 3]
    log_p, log_q = F.log_softmax(logits[:, keep], -1), F.log_softmax(whole(hidden, head), -1)[:, keep]
    expected = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, [hidden])[0] for x in (total, expected)))


def test_extreme_logits_stay_finite_in_fp32():
    hidden, head = side(1, dtype=torch.float32)
    head = Head(head.weight * 300.0, head.bias)
    hidden.requires_grad_()
    losses = [RowLoss(op, 1.0, torch.ones(N), 0) for op in ("kl", "reverse_kl", "jsd", "soft_cross_entropy")]
    hidden_t, head_t = side(5, 4, dtype=torch.float32)
    teachers = [Teacher(hidden_t, Head(head_t.weight * 300.0, head_t.bias))]
    total, sums = fused_losses(hidden, head, teachers, losses)
    assert torch.isfinite(sums).all()
    assert torch.isfinite(torch.autograd.grad(total, [hidden])[0]).all()
    taught = whole(hidden_t, teachers[0].head)
    for loss, value in zip(losses, sums, strict=True):
        expected = by_hand(loss, whole(hidden, head).double(), taught.double())
        expected = expected.nan_to_num(0.0) if loss.op == "jsd" else expected
        if loss.op != "jsd":
            torch.testing.assert_close(value.double(), expected.sum(), rtol=1e-5, atol=1e-4, check_dtype=False)
        else:
            assert 0.0 <= value <= N


@pytest.mark.parametrize("bias", [True, False])
def test_bf16_products_as_autocast_makes_them(bias, monkeypatch):
    monkeypatch.setitem(TILE_BYTES, "cpu", 256)
    hidden, head = side(1, dtype=torch.float32, bias=bias)
    wanted = [x.requires_grad_() for x in (hidden, head.weight, head.bias) if x is not None]
    source = side(5, 4, dtype=torch.float32)
    loss = RowLoss("kl", 1.0, weights(1).float(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = fused_losses(hidden, head, [Teacher(*source)], [loss], tile_rows=N)
        x, t = whole(hidden, head), whole(*source)
    assert x.dtype == torch.bfloat16
    values = by_hand(loss, x.float(), t.float())
    expected = (values * loss.weight).sum()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(total, wanted), torch.autograd.grad(expected, wanted), strict=True)
    for one, other in pairs:
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_a_teacher_in_bf16_has_its_logits_in_bf16():
    hidden, head = side(1, dtype=torch.float32)
    hidden.requires_grad_()
    source = side(5, 4, dtype=torch.bfloat16)
    loss = RowLoss("kl", 1.0, torch.ones(N), 0)
    total, _ = fused_losses(hidden, head, [Teacher(*source)], [loss])
    expected = by_hand(loss, whole(hidden, head), whole(*source).float()).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, [hidden])[0] for x in (total, expected)))


@pytest.mark.parametrize(("autocast", "scale"), [(True, 1e-7), (False, 1e-5)])
def test_the_mean_over_many_tokens_keeps_small_gradients_in_fp16(autocast, scale):
    dtype = torch.float32 if autocast else torch.float16
    hidden, head = side(1, dtype=dtype)
    wanted = [x.requires_grad_() for x in (hidden, head.weight, head.bias)]
    source = side(5, 4, dtype=dtype)
    # Times the scale the gradients at logits are about the least number of fp16, or below.
    loss = RowLoss("kl", scale, torch.ones(N), 0)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        total, _ = fused_losses(hidden, head, [Teacher(*source)], [loss], tile_rows=4)
        x, t = whole(hidden, head), whole(*source)
    assert x.dtype == torch.float16
    expected = by_hand(loss, x.float(), t.float()).sum()
    pairs = zip(torch.autograd.grad(total, wanted), torch.autograd.grad(expected, wanted), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.float() / scale, other.float(), rtol=5e-3, atol=2e-2)
