"""Attention over layers, in fp32: products of unscaled features are far apart, and their softmax is sharp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.common import full
from gkd_dsl.runtime.ops.registry import function


@function("layer_attention")
def layer_attention(query: Tensor, layers: Tensor, *, scale: bool = False) -> Tensor:
    """sum_j softmax_j(query . layer_j) layer_j: [..., H], [..., H, n] -> [..., H]. arXiv 2012.14022."""
    query, layers = full(query), full(layers)
    with torch.autocast(query.device.type, enabled=False):
        products = (query.unsqueeze(-2) @ layers).squeeze(-2)
        weights = (products / math.sqrt(query.shape[-1]) if scale else products).softmax(-1)
        return (layers @ weights.unsqueeze(-1)).squeeze(-1)


@function("mean_square")
def mean_square(x: Tensor) -> Tensor:
    """The mean of the squares over the last axis: [..., H] -> [...]."""
    return full(x).square().mean(-1)
