"""Tensors over a part of a vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.registry import function


@function("gather_vocabulary")
def gather_vocabulary(x: Tensor, ids: Tensor) -> Tensor:
    """The entries of the last axis at these ids: [..., V], [K] -> [..., K]."""
    return x.index_select(-1, ids.to(x.device))


@function("map_ids")
def map_ids(x: Tensor, rows: Tensor) -> Tensor:
    """Each id as the row that stands for it: [...], [V] -> [...]; what is negative stays."""
    return torch.where(x < 0, x, rows.to(x.device)[x.clamp_min(0)])
