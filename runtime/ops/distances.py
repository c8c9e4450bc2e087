"""Losses between features: values per vector, or per cell of a map over tokens, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from gkd_dsl.runtime.ops.common import default_dims, full, mask_for, zero_where_not
from gkd_dsl.runtime.ops.registry import function
from torch import Tensor


def _compare(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    dims: Sequence[str] | None,
    causal: bool,
    each: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`each` element by element, then the mean over the features, unless every element is a position."""
    names = tuple(dims) if dims is not None else default_dims(max(1, student.ndim - 1))
    cells = len(names) == student.ndim
    shape = student.shape if cells else student.shape[:-1]
    mask = mask_for(shape, names, valid, causal, student.device)
    inner = mask if mask is None or cells else mask.unsqueeze(-1)
    # Chosen before the subtraction: (-inf) - (-inf) outside the mask is NaN, and so is its gradient.
    values = each(zero_where_not(inner, full(student)), zero_where_not(inner, full(teacher)))
    return values if cells else values.mean(-1)


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

    `dims` has as many axes as the tensors for a map, one less for vectors.
    """
    return _compare(student, teacher, valid, dims, causal, lambda s, t: (s - t).square())


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
    mask = mask_for(student.shape[:-1], dims, valid, False, student.device)
    inner = None if mask is None else mask.unsqueeze(-1)
    s, t = (F.normalize(zero_where_not(inner, full(x)), dim=-1) for x in (student, teacher))
    return zero_where_not(mask, 1.0 - (s * t).sum(-1))


@function("mean")
def mean(x: Tensor, *, valid: Tensor | None = None, dims: Sequence[str] | None = None) -> Tensor:
    """The values themselves, as a loss: [B] -> [B], [B, L] -> [B, L]."""
    return zero_where_not(mask_for(x.shape, dims, valid, False, x.device), full(x))
