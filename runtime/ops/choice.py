"""Which tokens of a text matter, by a map of scores: indices, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.common import full, mask_for, zero_where_not
from gkd_dsl.runtime.ops.registry import function

_CELLS = ("B", "*", "L", "L")


def _best(values: Tensor, there: Tensor, count: int) -> Tensor:
    """Indices of the `count` greatest values of the last axis that are there, best first, then -1.

    Equal values keep their order, so that what is appended in the padding changes no choice.
    """
    ranked = torch.where(there, values, values.new_full((), -torch.inf))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    found = torch.where(there.gather(-1, order), order, order.new_full((), -1))[..., :count]
    missing = count - found.shape[-1]
    return torch.cat((found, found.new_full((*found.shape[:-1], missing), -1)), -1) if missing else found


@function("salient_tokens")
@torch.no_grad()
def salient_tokens(scores: Tensor, *, count: int, valid: Tensor | None = None, causal: bool = False) -> Tensor:
    """The tokens with the most weight after the softmax of the rows, summed over heads and queries.

    [B, A, L, L] -> Int[B, count], best first, -1 where a text has fewer tokens that count.
    """
    scores = full(scores)
    cells = mask_for(scores.shape, _CELLS, valid, causal, scores.device)
    if cells is not None:
        scores = torch.where(cells, scores, scores.new_full((), torch.finfo(scores.dtype).min))
    weights = zero_where_not(cells, scores.softmax(-1)).sum((1, 2))
    return _best(weights, _tokens(weights, valid), count)


@function("related_tokens")
@torch.no_grad()
def related_tokens(
    scores: Tensor, anchors: Tensor, *, count: int, valid: Tensor | None = None, causal: bool = False
) -> Tensor:
    """For each anchor the other tokens with the greatest scores, summed over heads.

    [B, A, L, L], Int[B, n] -> Int[B, n, count], best first, -1 where there are fewer or the anchor is none. With
    `causal` up to the anchor.
    """
    length = scores.shape[-1]
    anchor = anchors.unsqueeze(-1)
    rows = full(scores).sum(1).gather(1, anchor.clamp(0, length - 1).expand(-1, -1, length))
    keys = torch.arange(length, device=scores.device)
    there = _tokens(rows[:, 0], valid).unsqueeze(1) & (keys != anchor) & (anchor >= 0) & (anchor < length)
    return _best(rows, there & (keys <= anchor) if causal else there, count)


def _tokens(like: Tensor, valid: Tensor | None) -> Tensor:
    mask = mask_for(like.shape, ("B", "L"), valid, False, like.device)
    return torch.ones(like.shape, dtype=torch.bool, device=like.device) if mask is None else mask.expand(like.shape)
