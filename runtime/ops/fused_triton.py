"""The elementwise part of losses fused with a head as one Triton kernel: a program reads its row, keeps nothing.

The formulas are those of `fused_rows`. A row is read two or three times: its largest logit and the sum of its
exponentials, then, where the gradient needs an inner sum (`reverse_kl`, `jsd`), that, then values and gradient, that is
written over the logits of the student. Arithmetic is in fp32, and no copy of a tile is made in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_dsl.runtime.ops.fused_rows import RowLoss

BLOCK = 2048
"""Columns that a program takes at a time."""
WARPS = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SOFT = {"kl": 1, "soft_cross_entropy": 2, "reverse_kl": 3, "jsd": 4}


@dataclass(frozen=True)
class Shape:
    """What makes logits of a linear map's values: times `scale`, then the softcap where there is one."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Job:
    """Losses that one kernel takes together: at most one over a teacher, and at most one with labels.

    soft, hard      their places among the losses; None where there is none
    kind            0 without a teacher, else that of the loss over it
    """

    soft: int | None
    hard: int | None
    kind: int
    losses: tuple[RowLoss, ...]
    soft_weight: Tensor | None
    hard_weight: Tensor | None
    labels: Tensor | None


def job(losses: Sequence[RowLoss], teachers: int, device: torch.device) -> Job | None:
    """The losses as one job; None where the kernel does not know them together."""
    soft = [number for number, loss in enumerate(losses) if loss.op in _SOFT]
    hard = [number for number, loss in enumerate(losses) if loss.op == "cross_entropy"]
    if not losses or len(soft) + len(hard) != len(losses) or len(soft) > 1 or len(hard) > 1 or teachers > 1:
        return None
    kind, soft_weight, hard_weight, labels = 0, None, None, None
    if soft:
        loss = losses[soft[0]]
        if not loss.exact or loss.columns is not None or loss.stored is not None:
            return None
        kind = _SOFT[loss.op]
        beta = float(loss.attrs.get("beta", 0.5))
        if loss.op == "jsd" and not 0.0 < beta < 1.0:
            kind = _SOFT["kl" if beta <= 0.0 else "reverse_kl"]
        soft_weight = loss.weight.to(device, torch.float32).contiguous()
    if hard:
        given = losses[hard[0]].labels
        assert given is not None
        labels = given.to(device, torch.int64).contiguous()
        hard_weight = losses[hard[0]].weight.to(device, torch.float32).contiguous()
    places = (soft[0] if soft else None, hard[0] if hard else None)
    return Job(*places, kind, tuple(losses), soft_weight, hard_weight, labels)


def rows(
    made: Job,
    student: Tensor,
    shape: Shape,
    teacher: Tensor | None,
    taught: Shape,
    picked: Tensor | None,
    first: int,
    values: Tensor,
    gradient: bool,
) -> None:
    """The losses of the rows of a tile, which are those from `first` on of all.

    student   [r, V], what the student's linear map gives; gets the gradient at it in its place if `gradient`
    teacher   the tile of a teacher [r, V]; with `picked` [n] or without, logits of which the rows from `first` on count
    values    [losses, n] fp32, gets the value of each row times its weight, 0 where that is 0
    """
    soft = made.losses[made.soft] if made.soft is not None else None
    hard = made.losses[made.hard] if made.hard is not None else None
    temperature = soft.temperature if soft is not None else 1.0
    columns = student.shape[1]
    nothing = student
    _rows[(student.shape[0],)](
        student,
        student.stride(0),
        nothing if teacher is None else teacher,
        0 if teacher is None else teacher.stride(0),
        nothing if picked is None else picked,
        nothing if made.labels is None else made.labels,
        nothing if made.soft_weight is None else made.soft_weight,
        nothing if made.hard_weight is None else made.hard_weight,
        nothing if made.soft is None else values[made.soft],
        nothing if made.hard is None else values[made.hard],
        first,
        columns,
        1.0 / temperature,
        float(soft.times) if soft is not None else 1.0,
        float(soft.scale) if soft is not None else 0.0,
        float(soft.attrs.get("beta", 0.5)) if soft is not None else 0.0,
        float(hard.scale) if hard is not None else 0.0,
        float(hard.attrs.get("label_smoothing", 0.0)) if hard is not None else 0.0,
        float(shape.scale),
        float(shape.softcap or 1.0),
        float(taught.scale),
        float(taught.softcap or 1.0),
        KIND=made.kind,
        HARD=hard is not None,
        APART=soft is not None and hard is not None and temperature != 1.0,
        SMOOTH=hard is not None and bool(hard.attrs.get("label_smoothing", 0.0)),
        CAP=shape.softcap is not None,
        TAUGHT_CAP=taught.softcap is not None,
        PICKED=picked is not None,
        GRADIENT=gradient,
        BLOCK=min(BLOCK, triton.next_power_of_2(columns)),
        num_warps=WARPS,
    )


def scale(x: Tensor, factor: Tensor) -> None:
    """`x` times a scalar, in its place; where that is 1 nothing is read, and nobody waits to learn it."""
    count = x.numel()
    if count:
        programs = min(triton.cdiv(count, BLOCK), 2048)
        _scale[(programs,)](x, factor.to(torch.float32), count, BLOCK=BLOCK, num_warps=WARPS)


@triton.jit
def _scale(X: tl.tensor, FACTOR: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    factor = tl.load(FACTOR)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        while place < count:
            at = place + tl.arange(0, BLOCK)
            x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32) * factor
            tl.store(X + at, x.to(X.dtype.element_ty), mask=at < count)
            place += step


@triton.jit
def _logits(
    X: tl.tensor, at: tl.tensor, inside: tl.tensor, scale: tl.tensor, cap: tl.tensor, CAP: tl.constexpr
) -> tl.tensor:
    """Logits in fp32; -inf outside."""
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32) * scale
    if CAP:
        # cap * tanh(x / cap)
        x = cap - 2.0 * cap / (tl.exp(x * (2.0 / cap)) + 1.0)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _sum(total: tl.tensor, most: tl.tensor, x: tl.tensor, by: tl.tensor) -> tl.tensor:
    """The sum of exp(by (. - most)) with one more in each lane, of which the larger is the new `most`."""
    d = x - most
    e = tl.exp(-tl.abs(d) * by)
    return tl.where(d > 0.0, total * e + 1.0, total + e)


@triton.jit
def _log_sum(total: tl.tensor, most: tl.tensor, top: tl.tensor, by: tl.tensor) -> tl.tensor:
    """log sum exp(by (. - top)) of all lanes."""
    return tl.log(tl.sum(total * tl.exp((most - top) * by), 0))


@triton.jit
def _share(p: tl.tensor, x: tl.tensor) -> tl.tensor:
    """p x, 0 where p is."""
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def _log_mixture(q: tl.tensor, p: tl.tensor, beta: tl.tensor) -> tl.tensor:
    # Where both are 0 so is what is counted; the bound keeps the logarithm finite there.
    return tl.log(tl.maximum(q + beta * (p - q), 1e-37))


@triton.jit(do_not_specialize=["first"])
def _rows(
    S: tl.tensor,
    s_row: tl.tensor,
    T: tl.tensor,
    t_row: tl.tensor,
    PICK: tl.tensor,
    LABELS: tl.tensor,
    SOFT_WEIGHT: tl.tensor,
    HARD_WEIGHT: tl.tensor,
    SOFT_VALUE: tl.tensor,
    HARD_VALUE: tl.tensor,
    first: tl.tensor,
    columns: tl.tensor,
    by: tl.tensor,
    times: tl.tensor,
    soft_scale: tl.tensor,
    beta: tl.tensor,
    hard_scale: tl.tensor,
    smoothing: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    taught_scale: tl.tensor,
    taught_cap: tl.tensor,
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    APART: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    TAUGHT_CAP: tl.constexpr,
    PICKED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    number = row + first
    S += row * s_row
    if KIND:
        if PICKED:
            T += tl.load(PICK + number) * t_row
        else:
            T += row * t_row
    cols = tl.arange(0, BLOCK)

    # The largest logits and the sums of exponentials, by lanes; `other` is the student's at temperature 1.
    lowest = tl.full([BLOCK], -3.0e38, tl.float32)
    zeros = tl.zeros([BLOCK], tl.float32)
    most = lowest
    total = zeros
    t_most = lowest
    t_total = zeros
    other = zeros
    summed = zeros
    for start in range(0, columns, BLOCK):
        at = start + cols
        inside = at < columns
        x = _logits(S, at, inside, scale, cap, CAP)
        if APART:
            other = _sum(other, most, x, 1.0)
        if SMOOTH:
            summed += tl.where(inside, x, 0.0)
        total = _sum(total, most, x, by)
        most = tl.maximum(most, x)
        if KIND:
            t = _logits(T, at, inside, taught_scale, taught_cap, TAUGHT_CAP)
            t_total = _sum(t_total, t_most, t, by)
            t_most = tl.maximum(t_most, t)
    # Log-sum-exps over the largest: with that in them they would round off what logits far from 0 differ by.
    top = tl.max(most, 0)
    lse = _log_sum(total, most, top, by)
    lse_1 = lse
    if APART:
        lse_1 = _log_sum(other, most, top, 1.0)
    t_top = top
    t_lse = lse
    if KIND:
        t_top = tl.max(t_most, 0)
        t_lse = _log_sum(t_total, t_most, t_top, by)

    inner = 0.0
    if KIND >= 3:
        # The mean under the student of what the gradient is taken against.
        ours = zeros
        theirs = zeros
        for start in range(0, columns, BLOCK):
            at = start + cols
            inside = at < columns
            log_q = (_logits(S, at, inside, scale, cap, CAP) - top) * by - lse
            log_p = (_logits(T, at, inside, taught_scale, taught_cap, TAUGHT_CAP) - t_top) * by - t_lse
            q = tl.exp(log_q)
            if KIND == 3:
                ours += _share(q, log_q - log_p)
            else:
                p = tl.exp(log_p)
                log_m = _log_mixture(q, p, beta)
                ours += _share(q, log_q - log_m)
                theirs += _share(p, log_p - log_m)
        inner = tl.sum(ours, 0)
        value = inner
        if KIND == 4:
            value = (1.0 - beta) * inner + beta * tl.sum(theirs, 0)
        weight = tl.load(SOFT_WEIGHT + number)
        tl.store(SOFT_VALUE + number, tl.where(weight != 0.0, value * times * weight, 0.0))

    # A row that does not count may hold anything: its factor is 0, and nothing is multiplied with it.
    soft = 0.0
    hard = 0.0
    if KIND:
        soft = tl.load(SOFT_WEIGHT + number) * soft_scale * times * by
    if KIND == 4:
        soft *= 1.0 - beta
    label = 0
    if HARD:
        hard = tl.load(HARD_WEIGHT + number) * hard_scale
        label = tl.minimum(tl.maximum(tl.load(LABELS + number), 0), columns - 1).to(tl.int32)
    soft_sum = zeros
    hit = zeros
    if GRADIENT or (KIND < 3 or HARD):
        for start in range(0, columns, BLOCK):
            at = start + cols
            inside = at < columns
            x = _logits(S, at, inside, scale, cap, CAP)
            g = zeros
            if KIND:
                log_q = (x - top) * by - lse
                log_p = (_logits(T, at, inside, taught_scale, taught_cap, TAUGHT_CAP) - t_top) * by - t_lse
                p = tl.exp(log_p)
                q = tl.exp(log_q)
                if KIND == 1:
                    soft_sum += _share(p, log_p - log_q)
                if KIND == 2:
                    soft_sum -= _share(p, log_q)
                if GRADIENT:
                    if KIND <= 2:
                        g = (q - p) * soft
                    elif KIND == 3:
                        g = _share(q, log_q - log_p - inner) * soft
                    else:
                        g = _share(q, log_q - _log_mixture(q, p, beta) - inner) * soft
                    g = tl.where(soft != 0.0, g, 0.0)
            if HARD:
                here = at == label
                hit += tl.where(here, x - top, 0.0)
                if GRADIENT:
                    h = tl.exp(x - top - lse_1) - tl.where(here, 1.0 - smoothing, 0.0)
                    if SMOOTH:
                        h -= smoothing / columns
                    g += tl.where(hard != 0.0, h * hard, 0.0)
            if GRADIENT:
                if CAP:
                    bent = x / cap
                    # A factor of 0 stays 0 whatever the logit.
                    g = tl.where(g == 0.0, 0.0, g * (1.0 - bent * bent))
                tl.store(S + at, (g * scale).to(S.dtype.element_ty), mask=inside)
    if KIND == 1 or KIND == 2:
        weight = tl.load(SOFT_WEIGHT + number)
        tl.store(SOFT_VALUE + number, tl.where(weight != 0.0, tl.sum(soft_sum, 0) * times * weight, 0.0))
    if HARD:
        weight = tl.load(HARD_WEIGHT + number)
        value = lse_1 - tl.sum(hit, 0)
        if SMOOTH:
            value = (1.0 - smoothing) * value + smoothing * (lse_1 + (top - tl.sum(summed, 0) / columns))
        tl.store(HARD_VALUE + number, tl.where(weight != 0.0, value * weight, 0.0))
