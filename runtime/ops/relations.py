"""Maps between the tokens of a text, made of their features; in fp32, whatever autocast says."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.common import full
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
