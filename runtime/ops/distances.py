"""Losses between features: values per vector, or per cell of a map over tokens, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_dsl.runtime.ops.common import default_dims, full, mask_for, on_rows, zero_where_not
from gkd_dsl.runtime.ops.registry import function


def _cells(student: Tensor, dims: Sequence[str] | None) -> tuple[tuple[str, ...], bool]:
    """The names of the positions, and whether every element is one."""
    names = tuple(dims) if dims is not None else default_dims(max(1, student.ndim - 1))
    return names, len(names) == student.ndim


def _compare(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    dims: Sequence[str] | None,
    causal: bool,
    each: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`each` element by element, then the mean over the features, unless every element is a position."""
    names, cells = _cells(student, dims)
    if not cells:
        return on_rows(lambda s, t: each(full(s), full(t)).mean(-1), (student, teacher), names, valid)
    mask = mask_for(student.shape, names, valid, causal, student.device)
    # Chosen before the subtraction: (-inf) - (-inf) outside the mask is NaN, and so is its gradient.
    return each(zero_where_not(mask, full(student)), zero_where_not(mask, full(teacher)))


class _SquaredDifference(torch.autograd.Function):
    """(s - t)^2 where the mask holds, 0 elsewhere; with `features` the mean over the last axis.

    One buffer, the difference, serves the value and the gradient. The chain of subtraction, choice, square and
    mean needs three and takes over twice the time.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, features: bool) -> Tensor:
        difference = student - teacher
        if mask is not None:
            difference.masked_fill_((~mask).unsqueeze(-1) if features else ~mask, 0.0)
        ctx.save_for_backward(difference)
        ctx.features = features
        if not features:
            return difference.square()
        return torch.linalg.vector_norm(difference, dim=-1).square_().div_(difference.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (difference,) = ctx.saved_tensors
        scale = (gradient * (2.0 / difference.shape[-1])).unsqueeze(-1) if ctx.features else gradient * 2.0
        to_student = difference * scale
        return to_student, -to_student if ctx.needs_input_grad[1] else None, None, None


@function("mse")
def mse(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    causal: bool = False,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """(student - teacher)^2: [..., H] twice -> [...], the mean over H; [..., L] maps -> [..., L].

    `dims` has as many axes as the tensors for a map, one less for vectors. It can be differentiated once.
    """
    names, cells = _cells(student, dims)
    mask = mask_for(student.shape if cells else student.shape[:-1], names, valid, causal, student.device)
    return _SquaredDifference.apply(full(student), full(teacher), mask, not cells)


@function("smooth_l1")
def smooth_l1(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    beta: float = 1.0,
    causal: bool = False,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """0.5 d^2 / beta below beta, |d| - 0.5 beta above: shapes as `mse`. arXiv 1504.08083."""
    return _compare(
        student, teacher, valid, dims, causal, lambda s, t: F.smooth_l1_loss(s, t, reduction="none", beta=beta)
    )


@function("huber")
def huber(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    delta: float = 1.0,
    causal: bool = False,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """0.5 d^2 below delta, delta (|d| - 0.5 delta) above: shapes as `mse`."""
    return _compare(
        student, teacher, valid, dims, causal, lambda s, t: F.huber_loss(s, t, reduction="none", delta=delta)
    )


@function("normalized_mse")
def normalized_mse(
    student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, dims: Sequence[str] | None = None
) -> Tensor:
    """Mean over H of (student / |student| - teacher / |teacher|)^2: [..., H] twice -> [...]. arXiv 1908.09355."""
    names = tuple(dims) if dims is not None else default_dims(student.ndim - 1)
    return _compare(
        student, teacher, valid, names, False, lambda s, t: (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square()
    )


@function("cosine_distance")
def cosine_distance(
    student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, dims: Sequence[str] | None = None
) -> Tensor:
    """1 - cos(student, teacher): [..., H] twice -> [...]; 1 for a zero vector, 0 where it does not count."""

    def rows(s: Tensor, t: Tensor) -> Tensor:
        return 1.0 - (F.normalize(full(s), dim=-1) * F.normalize(full(t), dim=-1)).sum(-1)

    return on_rows(rows, (student, teacher), dims, valid)


@function("mean")
def mean(x: Tensor, *, valid: Tensor | None = None, dims: Sequence[str] | None = None) -> Tensor:
    """The values themselves, as a loss: [B] -> [B], [B, L] -> [B, L]."""
    return zero_where_not(mask_for(x.shape, dims, valid, False, x.device), full(x))
