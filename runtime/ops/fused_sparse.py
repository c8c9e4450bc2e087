"""A divergence from a teacher whose k largest logits are stored, of a block of rows with the gradient at the logits.

`sparse` has the loss: both distributions in k + 1 classes. It hangs on the student's logits through the k stored ones
and the log-sum-exp of the others, so the operator's own gradient at k + 1 numbers a row is enough: what the last
of them gets is shared out over the others by their softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.registry import functions
from gkd_dsl.runtime.ops.sparse import teacher_classes

_READ_HERE = ("temperature", "t2", "align", "vocabulary")


@dataclass(frozen=True)
class Stored:
    """Stored logits: values and ids [n, k], the log mass of the others [n, T] at each of `temperatures`."""

    values: Tensor
    ids: Tensor
    tail: Tensor
    temperatures: tuple[float, ...] = (1.0,)
    treatment: str = "bucket"


def over_stored(
    op: str, x: Tensor, stored: Stored, rows: slice, temperature: float, attrs: Mapping[str, Any], factor: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Values `[r]` of the operator without T^2, and the gradient at `x` [r, V] of their sum times `factor` [r].

    `rows` are those of `stored` that `x` has. A row of factor 0 gets no gradient, whatever is stored of it.
    """
    ids = stored.ids[rows].long()
    others = x.shape[-1] - ids.shape[-1]
    z = x / temperature
    student = z.gather(-1, ids)
    if others > 0:
        # The others alone, not the whole less the stored: that rounds to 0 where the student is sure.
        z.scatter_(-1, ids, float("-inf"))
        top = z.amax(-1, keepdim=True)
        z.sub_(top).exp_()
        total = z.sum(-1, keepdim=True)
        student = torch.cat((student, top + total.log()), -1)
    log_p = teacher_classes(
        stored.values[rows], stored.tail[rows], temperature, stored.temperatures, others, stored.treatment
    )
    options = {name: value for name, value in attrs.items() if name not in _READ_HERE}
    with torch.set_grad_enabled(factor is not None):
        student.requires_grad_(factor is not None)
        log_q = torch.log_softmax(student, dim=-1)
        value = functions()[op](log_q, log_p, temperature=1.0, t2=False, **options)
    if factor is None:
        return value, None
    (found,) = torch.autograd.grad(value, [student], factor)
    found = torch.where(factor.unsqueeze(-1) != 0.0, found, 0.0).div_(temperature)
    if others > 0:
        z.mul_(found[:, -1:] / total)
        found = found[:, :-1]
    return value.detach(), z.scatter_(-1, ids, found)
