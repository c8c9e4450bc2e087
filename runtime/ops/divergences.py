"""Losses between distributions: values per row of logits, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd_dsl.runtime.ops.common import full, mask_for, on_rows, zero_where_not
from gkd_dsl.runtime.ops.registry import function


def expectation(p: Tensor, value: Tensor) -> Tensor:
    """sum_c p_c value_c over the last axis, where p = 0 counts nothing, whatever the value there."""
    held = p > 0
    return (p * torch.where(held, value, value.new_zeros(()))).sum(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities over the last axis; a class that p excludes adds 0."""
    return expectation(log_p.exp(), log_p - log_q)


def log_probs(x: Tensor, temperature: float) -> Tensor:
    """Log-softmax of x / T over the last axis, in fp32."""
    return F.log_softmax(full(x) / temperature, dim=-1)


def _real(x: Tensor, align: str, vocabulary: int | None) -> Tensor:
    return x[..., :vocabulary] if align == "trim" else x


@function("cross_entropy")
def cross_entropy(
    student: Tensor,
    labels: Tensor,
    *,
    valid: Tensor | None = None,
    label_smoothing: float = 0.0,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """-log softmax(student)[label]: [..., C], [...] -> [...]; 0 where the label is -100.

    Raises ValueError for a label outside 0 .. C-1 (on the CPU, where looking costs nothing).
    """
    counted = labels != -100
    mask = mask_for(labels.shape, dims, valid, False, labels.device)
    if mask is not None:
        counted = counted & mask
    targets = labels[counted]
    check_labels(targets, student.shape[-1])
    losses = F.cross_entropy(full(student[counted]), targets, reduction="none", label_smoothing=label_smoothing)
    return losses.new_zeros(labels.shape).masked_scatter(counted, losses)


@function("squared_error")
def squared_error(
    student: Tensor, labels: Tensor, *, valid: Tensor | None = None, dims: Sequence[str] | None = None
) -> Tensor:
    """(student - label)^2 in fp32: [B] or [B, 1], [B] -> [B]; 0 where the mask does not hold."""
    x = full(student).reshape(labels.shape)
    mask = mask_for(labels.shape, dims, valid, False, labels.device)
    # Chosen before the subtraction: what does not count may be infinite.
    return (zero_where_not(mask, x) - zero_where_not(mask, labels.to(x.dtype))).square()


def check_labels(targets: Tensor, classes: int) -> None:
    """Raises ValueError for a label outside 0 .. classes - 1, on the CPU, where looking costs nothing."""
    if targets.device.type == "cpu" and targets.numel() and not (targets.min() >= 0 and targets.max() < classes):
        raise ValueError(
            f"labels run from {int(targets.min())} to {int(targets.max())}, but the model has {classes} classes"
        )


@function("soft_cross_entropy")
def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    t2: bool = True,
    align: str = "exact",
    vocabulary: int | None = None,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """-sum p log q, p the teacher's softmax and q the student's: [..., C] twice -> [...]."""

    def rows(s: Tensor, t: Tensor) -> Tensor:
        return -expectation(log_probs(t, temperature).exp(), log_probs(s, temperature))

    pair = (_real(student, align, vocabulary), _real(teacher, align, vocabulary))
    return _scaled(on_rows(rows, pair, dims, valid), temperature, t2)


def _scaled(values: Tensor, temperature: float, t2: bool) -> Tensor:
    return values * temperature**2 if t2 else values


@function("kl")
def kl(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    t2: bool = True,
    align: str = "exact",
    vocabulary: int | None = None,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """KL(teacher || student) of softmax(x / T), times T^2 with `t2`: [..., C] twice -> [...]. arXiv 1503.02531."""

    def rows(s: Tensor, t: Tensor) -> Tensor:
        return divergence(log_probs(t, temperature), log_probs(s, temperature))

    pair = (_real(student, align, vocabulary), _real(teacher, align, vocabulary))
    return _scaled(on_rows(rows, pair, dims, valid), temperature, t2)


@function("reverse_kl")
def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    t2: bool = True,
    align: str = "exact",
    vocabulary: int | None = None,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """KL(student || teacher) of softmax(x / T), times T^2 with `t2`: [..., C] twice -> [...]. arXiv 2306.08543."""

    def rows(s: Tensor, t: Tensor) -> Tensor:
        return divergence(log_probs(s, temperature), log_probs(t, temperature))

    pair = (_real(student, align, vocabulary), _real(teacher, align, vocabulary))
    return _scaled(on_rows(rows, pair, dims, valid), temperature, t2)


@function("jsd")
def jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    t2: bool = False,
    beta: float = 0.5,
    align: str = "exact",
    vocabulary: int | None = None,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """Generalized JSD, arXiv 2306.13649: [..., C] twice -> [...].

    beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, p the teacher's. At beta = 0 it is KL(p || q)
    and at beta = 1 KL(q || p) by definition: the formula's own limits there are 0.
    """

    def rows(s: Tensor, t: Tensor) -> Tensor:
        log_q, log_p = log_probs(s, temperature), log_probs(t, temperature)
        if beta <= 0.0:
            return divergence(log_p, log_q)
        if beta >= 1.0:
            return divergence(log_q, log_p)
        p, q = log_p.exp(), log_q.exp()
        mixed = beta * p + (1.0 - beta) * q
        log_m = torch.where(mixed > 0, mixed, mixed.new_ones(())).log()
        return beta * expectation(p, log_p - log_m) + (1.0 - beta) * expectation(q, log_q - log_m)

    pair = (_real(student, align, vocabulary), _real(teacher, align, vocabulary))
    return _scaled(on_rows(rows, pair, dims, valid), temperature, t2)


@function("tvd")
def tvd(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    t2: bool = False,
    align: str = "exact",
    vocabulary: int | None = None,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """0.5 sum |p - q| of softmax(x / T): [..., C] twice -> [...], in [0, 1]. arXiv 2307.15190."""

    def rows(s: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (log_probs(t, temperature).exp() - log_probs(s, temperature).exp()).abs().sum(-1)

    pair = (_real(student, align, vocabulary), _real(teacher, align, vocabulary))
    return _scaled(on_rows(rows, pair, dims, valid), temperature, t2)


@function("attention_kl")
def attention_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    causal: bool = False,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """KL of attention rows from scores, over the keys that count: [B, A, L, L] twice -> [B, A, L]. arXiv 2002.10957.

    A key counts where `valid` (Bool[B, L]) holds and, with `causal`, up to the query; a query that does not count
    gives 0.
    """
    cells = mask_for(student.shape, ("B", "*", "L", "L"), valid, causal, student.device)
    log_q, log_p = (_row_log_probs(x, temperature, cells) for x in (student, teacher))
    return divergence(log_p, log_q)


def _row_log_probs(scores: Tensor, temperature: float, cells: Tensor | None) -> Tensor:
    """Log-softmax over the keys that count; a row without any is uniform, so that it gives 0 and no gradient."""
    scaled = full(scores) / temperature
    if cells is not None:
        scaled = torch.where(cells, scaled, scaled.new_full((), torch.finfo(scaled.dtype).min))
    return F.log_softmax(scaled, dim=-1)
