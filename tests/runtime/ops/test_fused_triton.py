"""The Triton kernels, interpreted on the CPU, against torch.nn.functional in fp64."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import interpreted
import pytest
import torch
import torch.nn.functional as F
from interpreted import CASES, FIRST, ONE, PICKED, ROWS, SHAPES, VALUES, drawn

from gkd_dsl.runtime.ops import fused_head
from gkd_dsl.runtime.ops.fused_head import Head, Teacher, fused_losses
from gkd_dsl.runtime.ops.fused_rows import RowLoss
from gkd_dsl.runtime.ops.fused_sparse import Stored

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
EPS = {"fp32": 0.0, "bf16": 2**-7, "mixed": 2**-7, "fp16": 2**-11}
"""What the dtype of the gradient rounds off; the interpreter cuts bf16 off instead of rounding it."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of all cases."""
    path = tmp_path_factory.mktemp("interpreted") / "found.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, interpreted.__file__, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=False)


def shaped(x, scale, softcap):
    return x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)


def by_hand(loss, x, t, rows):
    """The values of each row, by torch's own functions."""
    attrs = loss.attrs
    if loss.op == "cross_entropy":
        labels = loss.labels[rows]
        return F.cross_entropy(x, labels, reduction="none", label_smoothing=attrs.get("label_smoothing", 0.0))
    temperature = attrs.get("temperature", 1.0)
    log_q, log_p = F.log_softmax(x / temperature, -1), F.log_softmax(t / temperature, -1)
    times = temperature**2 if attrs.get("t2", loss.op != "jsd") else 1.0
    q, p, beta = log_q.exp(), log_p.exp(), attrs.get("beta", 0.5)
    if loss.op == "soft_cross_entropy":
        return F.cross_entropy(x / temperature, p, reduction="none") * times
    if loss.op == "kl" or (loss.op == "jsd" and beta == 0.0):
        return times * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if loss.op == "reverse_kl" or beta == 1.0:
        return times * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    first = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    return times * (beta * first + (1 - beta) * F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1))


def expected(case, many=ROWS):
    """The gradient at the map's values [many, V] and the weighted values [losses, many], in fp64."""
    losses, student, teacher = drawn(case)
    ours, theirs = SHAPES[case[2]]
    z = student[:many].double().requires_grad_()
    total, values = torch.zeros((), dtype=torch.float64), torch.zeros(len(losses), many, dtype=torch.float64)
    for number, loss in enumerate(losses):
        weight = loss.weight[FIRST : FIRST + many].double()
        counts = weight.nonzero().squeeze(-1)
        x, t = shaped(z[counts], *ours), shaped(teacher[FIRST + counts].double(), *theirs)
        value = by_hand(loss, x, t, FIRST + counts) * weight[counts]
        values[number, counts] = value.detach()
        total = total + loss.scale * value.sum()
    (gradient,) = torch.autograd.grad(total, [z])
    return gradient.nan_to_num(0.0), values


def compare(case, result, many=ROWS):
    gradient, values = result
    wanted, wanted_values = expected(case, many)
    losses, student, _ = drawn(case)
    assert gradient.dtype == student.dtype
    eps = EPS[case[3]]
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-5 + eps, atol=2e-6 if eps == 0.0 else 1e-5)
    torch.testing.assert_close(values[:, FIRST : FIRST + many].double(), wanted_values, rtol=1e-5, atol=1e-5)
    outside = [*range(FIRST), *range(FIRST + many, values.shape[1])]
    assert values[:, outside].abs().max() == 0.0
    idle = torch.stack([loss.weight[FIRST : FIRST + many] for loss in losses]).eq(0.0).all(0)
    assert not gradient[idle].any()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_values_and_gradient_are_those_of_whole_logits(case, found):
    compare(case, found["cases"][case])


@pytest.mark.parametrize("case", PICKED, ids="-".join)
def test_a_teacher_may_be_rows_among_others(case, found):
    compare(case, found["picked"][case])


@pytest.mark.parametrize("case", ONE, ids="-".join)
def test_one_row(case, found):
    compare(case, found["one"][case], 1)


@pytest.mark.parametrize("case", VALUES, ids="-".join)
def test_values_alone_leave_the_logits(case, found):
    student, values = found["values"][case]
    torch.testing.assert_close(student, drawn(case)[1], rtol=0.0, atol=0.0, equal_nan=True)
    torch.testing.assert_close(values[:, FIRST : FIRST + ROWS].double(), expected(case)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["kl", "reverse_kl", "soft_cross_entropy", "jsd"])
def test_large_logits_keep_their_digits_and_an_excluded_class_adds_nothing(op, found):
    _, student, teacher = interpreted.extreme(op)
    x = student.double().requires_grad_()
    log_q, log_p = F.log_softmax(x, -1), F.log_softmax(teacher.double(), -1)
    q, p = log_q.exp(), log_p.exp()
    if op == "reverse_kl":
        values = (q * (log_q - log_p)).sum(-1)
    elif op == "jsd":
        log_m = ((p + q) / 2).clamp(min=1e-300).log()
        values = (torch.where(p > 0.0, p * (log_p - log_m), 0.0) + q * (log_q - log_m)).sum(-1) / 2
    else:
        values = -(p * log_q).sum(-1)
        if op == "kl":
            values = values + torch.special.entr(p).neg().sum(-1)
    (gradient,) = torch.autograd.grad(values.sum(), [x])
    torch.testing.assert_close(found["extreme"][op][1].double(), values.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["extreme"][op][0].double(), gradient, rtol=1e-5, atol=1e-6)


def test_the_kernel_takes_what_it_knows_and_leaves_the_rest():
    from gkd_dsl.runtime.ops.fused_triton import job

    ones, cpu = torch.ones(2), torch.device("cpu")
    soft, hard = (
        RowLoss("kl", 1.0, ones, 0),
        RowLoss("cross_entropy", 1.0, ones, labels=torch.zeros(2, dtype=torch.long)),
    )
    trimmed = RowLoss("kl", 1.0, ones, 0, {"align": "trim", "vocabulary": 3})
    assert job([hard, soft], 1, cpu) is not None
    assert job([hard], 0, cpu) is not None
    largest = RowLoss("kl", 1.0, ones, stored=Stored(torch.zeros(2, 3), torch.zeros(2, 3).int(), torch.zeros(2, 1)))
    refused = [
        [], [soft, soft], [hard, hard], [trimmed], [RowLoss("tvd", 1.0, ones, 0)], [replace(soft, exact=False)],
        [largest], [hard, largest],
    ]  # fmt: skip
    assert [job(losses, 1, cpu) for losses in refused] == [None] * len(refused)
    assert job([soft], 2, cpu) is None


def test_a_gradient_is_scaled_in_its_place(found):
    x, kept, few = found["scaled"]
    torch.testing.assert_close(x, torch.arange(5000.0) * 2.5, rtol=0.0, atol=0.0)
    assert kept.eq(3.0).all()
    assert few.eq(1.5).all()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16", "torch.float16"])
def test_a_head_in_tiles_gives_what_the_eager_way_gives(dtype, given, found):
    assert found["failed"] == []
    kernel, eager = (found["head"][dtype, given, way] for way in ("kernel", "eager"))
    assert (kernel[3], eager[3]) == (2, 0)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == "torch.float32" else {"rtol": 3e-2, "atol": 3e-2}
    for one, other in zip((*kernel[:2], *kernel[2]), (*eager[:2], *eager[2]), strict=True):
        torch.testing.assert_close(one, other, **near)


def test_where_triton_cannot_run_the_eager_way_is_taken_and_told_once(monkeypatch, caplog):
    monkeypatch.setattr(fused_head, "KERNEL_DEVICES", {"cpu"})
    monkeypatch.setattr(fused_head, "_failed", [])
    generator = torch.Generator().manual_seed(1)
    hidden, weight, taught = (torch.randn(*size, generator=generator) for size in ((5, 3), (20, 3), (5, 20)))
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = RowLoss("kl", 1.0, torch.ones(5), 0)
    # Not interpreted, there is no driver for tensors on the CPU.
    with caplog.at_level("WARNING", "gkd_dsl"):
        for _ in range(2):
            total, _ = fused_losses(hidden, Head(weight, softcap=2.0), [Teacher(logits=taught)], [loss], tile_rows=2)
    whole = shaped(hidden @ weight.T, 1.0, 2.0)
    wanted = by_hand(loss, whole, taught, slice(None)).sum()
    torch.testing.assert_close(total, wanted)
    pairs = zip(
        torch.autograd.grad(3.0 * total, [hidden, weight]),
        torch.autograd.grad(3.0 * wanted, [hidden, weight]),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)
    assert len([record for record in caplog.records if "the slower way is taken" in record.message]) == 1
