"""Maps between the tokens of a text, or between layers, made of features; in fp32, whatever autocast says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd_dsl.runtime.ops.common import default_dims, full, mask_for, unit, zero_where_not
from gkd_dsl.runtime.ops.registry import function
from gkd_dsl.runtime.ops.tensors import merge_heads, split_heads


def _products(a: Tensor, b: Tensor, divisor: float) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return full(a) @ full(b).transpose(-1, -2) / divisor


@function("gram")
def gram(x: Tensor) -> Tensor:
    """x x^T / H: [B, L, H] -> [B, L, L]. arXiv 1707.01219."""
    return _products(x, x, x.shape[-1])


def _in_heads(x: Tensor, heads: int | None) -> Tensor:
    if heads is None:
        return x
    return split_heads(merge_heads(x) if x.ndim == 4 else x, heads=heads)


@function("relation")
def relation(a: Tensor, b: Tensor, *, heads: int | None = None) -> Tensor:
    """a b^T / sqrt(d) in each head: [B, L, H] or [B, A, L, D] twice -> [B, heads, L, L]. arXiv 2012.15828.

    `heads` cuts the features of a token anew; without it [B, A, L, D] keeps its A heads.
    """
    first, second = _in_heads(a, heads), _in_heads(b, heads)
    return _products(first, second, math.sqrt(first.shape[-1]))


@function("self_relation")
def self_relation(x: Tensor, *, heads: int | None = None) -> Tensor:
    """x x^T / sqrt(d) in each head: as `relation` of a tensor with itself."""
    return relation(x, x, heads=heads)


@function("cosine_relation")
def cosine_relation(x: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Cosines between all tokens: [B, L, H] -> [B, L, L], [B, A, L, D] -> [B, A, L, L]. arXiv 2109.08359.

    Tokens where `valid` (Bool[B, L]) does not hold are zero vectors, as zero vectors have the cosine 0.
    """
    mask = mask_for(x.shape[:-1], None, valid, False, x.device)
    rows = unit(x if mask is None else zero_where_not(mask.unsqueeze(-1), x))
    return _products(rows, rows, 1.0)


@function("layer_relation")
def layer_relation(x: Tensor) -> Tensor:
    """Cosines between the last axis' n vectors: [..., H, n] -> [..., n, n]. arXiv 2109.08359."""
    rows = unit(x.transpose(-1, -2))
    return _products(rows, rows, 1.0)


@function("relation_kl")
def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    diagonal: bool = False,
    causal: bool = False,
    denominator: str = "rows",
    dims: Sequence[str] | None = None,
) -> Tensor:
    """KL of the rows of maps [..., n, n] twice -> [..., n], or the cells that it is the sum of. arXiv 2109.08359.

    `dims` names the axes of the values; the last of a row is that of its keys too. A row without keys that count
    gives 0.
    """
    names = tuple(dims) if dims is not None else default_dims(student.ndim - (denominator == "rows"))
    cells = names if denominator == "pairs" else (*names, names[-1])
    mask = mask_for(student.shape, cells, valid, causal, student.device)
    if not diagonal:
        others = ~torch.eye(student.shape[-1], dtype=torch.bool, device=student.device)
        mask = others if mask is None else mask & others
    log_p, log_q = (_log_rows(x, temperature, mask) for x in (teacher, student))
    p = log_p.exp()
    parts = p * zero_where_not(p > 0, log_p - log_q)
    parts = zero_where_not(mask, parts)
    return parts if denominator == "pairs" else parts.sum(-1)


def _log_rows(x: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """Log-softmax over the cells that count.

    The others are the least finite number, not -inf: a row of -inf alone, or -inf - (-inf), would be NaN.
    """
    scaled = full(x) / temperature
    if mask is not None:
        scaled = torch.where(mask, scaled, scaled.new_full((), torch.finfo(scaled.dtype).min))
    return F.log_softmax(scaled, dim=-1)


@function("sample_relation_kl")
def sample_relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    dims: Sequence[str] | None = None,
) -> Tensor:
    """KL of the rows of cosines between the samples of a micro-batch, without a row's own: [B, H], [B, K] -> [B]."""
    mask = mask_for(student.shape[:1], dims, valid, False, student.device)
    rows = None if mask is None else mask.expand(student.shape[:1]).unsqueeze(0)
    maps = (cosine_relation(x.unsqueeze(0), valid=rows) for x in (student, teacher))
    return relation_kl(*maps, valid=rows, temperature=temperature).squeeze(0)
