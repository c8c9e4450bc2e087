"""Spans of neighbouring tokens, each held at its first token."""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.common import full, mask_for, zero_where_not
from gkd_dsl.runtime.ops.registry import function


def _counts(there: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each text the place of each token among those that are there, their number, and that of its spans."""
    number = there.sum(1, keepdim=True)
    spans = (number.double() * share + 0.5).floor().long().clamp_min(1)
    return there.cumsum(1) - 1, number, spans.minimum(number.clamp_min(1))


@function("segment_starts")
def segment_starts(x: Tensor, *, share: float = 0.4) -> Tensor:
    """Where one of the near-equal spans of a text starts: [B, L] -> Bool[B, L], max(1, round(share n)) of n tokens."""
    there = x != 0
    place, number, spans = _counts(there, share)
    number = number.clamp_min(1)
    return there & (place * spans // number != (place - 1) * spans // number)


@function("random_segment_starts")
def random_segment_starts(x: Tensor, *, share: float = 0.4, generator: torch.Generator | None = None) -> Tensor:
    """As `segment_starts`, the first token and others drawn without replacement."""
    there = x != 0
    place, _, spans = _counts(there, share)
    # Drawn by place and then by text: what is appended as padding leaves the draws of the tokens as they were.
    drawn = torch.empty(x.shape[::-1]).uniform_(generator=generator).to(x.device).t()
    score = drawn.gather(1, place.clamp_min(0)).masked_fill(place == 0, -1.0).masked_fill(~there, 2.0)
    return there & (score.argsort(dim=1, stable=True).argsort(dim=1) < spans)


@function("segment_mean")
def segment_mean(x: Tensor, starts: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Means of spans at their first tokens: [B, L, H], Bool[B, L] -> [B, L, H]; 0 elsewhere.

    A span reaches to the next start; its valid tokens alone count, and tokens before the first start are of none.
    """
    x = full(x)
    mask = mask_for(starts.shape, ("B", "L"), valid, False, x.device)
    starts = starts.bool() if mask is None else starts.bool() & mask
    span = starts.cumsum(1)
    inside = span > 0 if mask is None else mask & (span > 0)
    span = (span - 1).clamp_min(0)
    held = inside.unsqueeze(-1)
    where = span.unsqueeze(-1).expand_as(x)
    sums = torch.zeros_like(x).scatter_add(1, where, zero_where_not(held, x))
    number = x.new_zeros(span.shape).scatter_add(1, span, inside.to(x.dtype)).clamp_min(1)
    means = sums / number.unsqueeze(-1)
    return zero_where_not(starts.unsqueeze(-1), means.gather(1, where))
