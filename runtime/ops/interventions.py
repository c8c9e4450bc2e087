"""Samples exchanged within a batch, and spans of tokens drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.registry import function


@function("roll")
def roll(x: Tensor, *, by: int = 1) -> Tensor:
    """Row b is row b + by of x, the last ones the first: the shape of x."""
    return torch.roll(x, -by, dims=0)


@function("random_spans")
def random_spans(
    x: Tensor, source: Tensor | None = None, *, share: float = 0.3, generator: torch.Generator | None = None
) -> Tensor:
    """One run of valid tokens of each row: Bool[B, L]; with `source`, Int[B, L] of positions there, -1 elsewhere.

    The run has max(1, floor(share n)) tokens, n the valid tokens of the row, or the fewer of both rows; none where
    `share` is 0 or there are no tokens. Its start is uniform over all that fit, and padding is never in it.
    """
    mask = x != 0
    other = mask if source is None else source != 0
    counts, other_counts = mask.sum(1), other.sum(1)
    shorter = torch.minimum(counts, other_counts)
    # A product such as 0.3 * 10 may fall just short of a whole number.
    length = (shorter.double() * share + 1e-9).floor().long()
    length = torch.where(shorter > 0, length.clamp_min(1 if share > 0.0 else 0), 0)
    start = _start(counts, length, generator)
    rank = mask.cumsum(1) - 1
    inside = mask & (rank >= start[:, None]) & (rank < (start + length)[:, None])
    if source is None:
        return inside
    begin = _start(other_counts, length, generator)
    # The positions of the valid tokens in their order, then the others.
    order = torch.argsort((~other).to(torch.int8), dim=1, stable=True)
    place = (rank - start[:, None] + begin[:, None]).clamp(0, x.shape[1] - 1)
    return torch.where(inside, order.gather(1, place), -1)


def _start(counts: Tensor, length: Tensor, generator: torch.Generator | None) -> Tensor:
    """A start for each row, uniform from 0 to count - length. Drawn on the CPU: the same on every device."""
    drawn = torch.rand(counts.shape[0], generator=generator, dtype=torch.float64).to(counts.device)
    room = counts - length + 1
    return torch.minimum((drawn * room).floor().long(), room - 1).clamp_min(0)
