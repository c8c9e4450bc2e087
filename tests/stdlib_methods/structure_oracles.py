"""Relations and angles from their definitions: loops over rows without padding, nothing of the operators."""

from __future__ import annotations

from itertools import permutations

import torch
import torch.nn.functional as F
from method_world import row_kl
from torch import Tensor


def mean(values: list[Tensor]) -> Tensor:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else torch.zeros((), dtype=torch.float64)


def relation_rows(s: Tensor, t: Tensor) -> list[Tensor]:
    """KL of each row of cosines of [n, H] and [n, K], the row's own cell left out."""
    rows = []
    for i in range(len(s)):
        others = [k for k in range(len(s)) if k != i]
        if others:
            p, q = (torch.stack([F.cosine_similarity(x[i], x[k], dim=0) for k in others]) for x in (t, s))
            rows.append(row_kl(p, q))
        else:
            rows.append(0.0 * s.sum())
    return rows


def angle(x: Tensor, a: int, j: int, b: int) -> Tensor:
    """The cosine of the angle that rows a and b of [n, H] make at row j."""
    one, two = x[j] - x[a], x[j] - x[b]
    return (one @ two) / ((one @ one).sqrt() * (two @ two).sqrt())


def angle_errors(s: Tensor, t: Tensor, j: int, ends: list[int], error) -> list[Tensor]:
    """The errors at row j of all ordered pairs of different ends."""
    return [error(angle(s, a, j, b) - angle(t, a, j, b)) for a, b in permutations(ends, 2)]


def smooth(d: Tensor) -> Tensor:
    return 0.5 * d * d if d.abs() < 1 else d.abs() - 0.5
