"""Masks from batch columns."""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.registry import function


@function("valid_tokens")
def valid_tokens(x: Tensor) -> Tensor:
    """Where a column is not 0: [B, L] -> Bool[B, L]."""
    return x != 0


@function("and")
def both(a: Tensor, b: Tensor) -> Tensor:
    """a and b: Bool; a mask over samples [B] holds for every token of [B, L]."""
    return a & (b.unsqueeze(-1) if b.ndim < a.ndim else b)


@function("or")
def either(a: Tensor, b: Tensor) -> Tensor:
    """a or b: Bool."""
    return a | b


@function("not")
def negation(x: Tensor) -> Tensor:
    """Not x: Bool."""
    return ~x


@function("equal")
def equal(a: Tensor, b: Tensor | float) -> Tensor:
    """a == b: Bool of the shape of a."""
    return a == b


@function("not_equal")
def not_equal(a: Tensor, b: Tensor | float) -> Tensor:
    """a != b: Bool of the shape of a."""
    return a != b


@function("next_token")
def next_token(x: Tensor) -> Tensor:
    """Position l gets what is at l + 1: [B, L] -> [B, L]; the last becomes False, or -100 in ids."""
    last = torch.full_like(x[:, :1], False if x.dtype == torch.bool else -100)
    return torch.cat((x[:, 1:], last), dim=1)
