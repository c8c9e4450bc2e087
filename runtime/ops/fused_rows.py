"""Losses of a block of rows of logits with the gradient at the logits, in one go: a few rows that a cache holds.

Gradients are closed forms. For softmaxes q of the student and p of the teacher at temperature T, per logit x:
kl and soft_cross_entropy (q - p) / T; reverse_kl q (w - sum q w) / T with w = log q - log p; jsd the same with
w = (1 - beta)(log q - log m); cross_entropy q - (1 - e) onehot - e / C. Others go through the operator's own
gradient, those over a teacher's largest logits at k + 1 classes (`fused_sparse`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd_dsl.runtime.ops.fused_sparse import Stored, over_stored
from gkd_dsl.runtime.ops.registry import functions

_TINY = 1e-37


@dataclass(frozen=True)
class RowLoss:
    """A loss of each row of logits.

    op        the operator: `kl`, `reverse_kl`, `jsd`, `tvd`, `soft_cross_entropy`, `cross_entropy`
    teacher   which of the teachers it reads; None for `cross_entropy`
    attrs     its plain arguments
    scale     the factor of its sum in the total
    weight    Float[n]: what multiplies each row's value, 0 where the row does not count
    labels    Int[n], for `cross_entropy`
    exact     whether the teacher's logits are finite: else the operator itself is used, which knows what excluded
              classes are
    stored    the teacher's largest logits in the place of all
    """

    op: str
    scale: float
    weight: Tensor
    teacher: int | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    exact: bool = True
    stored: Stored | None = None

    @property
    def temperature(self) -> float:
        """The temperature; 1 where the operator has none."""
        return float(self.attrs.get("temperature", 1.0))

    @property
    def columns(self) -> int | None:
        """How many columns it reads, from the first; None for all."""
        return self.attrs.get("vocabulary") if self.attrs.get("align") == "trim" else None

    @property
    def times(self) -> float:
        """What multiplies its formula: T^2 with `t2`."""
        default = self.op not in ("jsd", "tvd", "cross_entropy")
        return self.temperature**2 if self.attrs.get("t2", default) and self.op != "cross_entropy" else 1.0


class Softmax:
    """z = x / T of some rows, with its softmax and its log-sum-exp `[r, 1]`, made when first asked for."""

    def __init__(self, x: Tensor, temperature: float, columns: int | None) -> None:
        x = x if columns is None else x[:, :columns]
        self.z = x if temperature == 1.0 else x / temperature
        self.p = torch.softmax(self.z, dim=-1)
        # The largest probability is 1 / sum exp(z - max z).
        self.lse = self.z.amax(-1, keepdim=True) - self.p.amax(-1, keepdim=True).log_()


class Block:
    """Rows of student and teacher logits, fp32 or fp64; softmaxes are shared by the losses that use the same."""

    def __init__(self, student: Tensor, teachers: Sequence[Tensor]) -> None:
        self.student = student
        self.teachers = teachers
        self._made: dict[tuple[int | None, float, int | None], Softmax] = {}

    def softmax(self, teacher: int | None, temperature: float, columns: int | None) -> Softmax:
        """The softmax of a teacher (None: of the student)."""
        key = (teacher, temperature, columns)
        if key not in self._made:
            x = self.student if teacher is None else self.teachers[teacher]
            self._made[key] = Softmax(x, temperature, columns)
        return self._made[key]

    def losses(self, losses: Sequence[RowLoss], rows: slice, gradient: bool) -> tuple[list[Tensor], Tensor | None]:
        """The weighted sum of each loss, and the gradient of the total `[r, V]`; `rows` are those of the weights."""
        total: Tensor | None = None
        sums: list[Tensor] = []
        for number, loss in enumerate(losses):
            weight = loss.weight[rows].to(self.student.dtype)
            factor = weight * loss.scale if gradient and loss.scale != 0.0 else None
            last = number == len(losses) - 1
            value, found = self._one(loss, rows, factor, last)
            sums.append((value * weight).sum())
            if found is None:
                continue
            if total is None and found.shape == self.student.shape:
                total = found
            else:
                if total is None:
                    total = torch.zeros_like(self.student)
                total[:, : found.shape[1]].add_(found)
        return sums, total

    def _one(self, loss: RowLoss, rows: slice, factor: Tensor | None, last: bool) -> tuple[Tensor, Tensor | None]:
        """Values `[r]` of a loss, and its gradient times `factor`; a row that does not count may hold anything."""
        if loss.op == "cross_entropy":
            return self._hard(loss, rows, factor, last)
        if loss.stored is not None:
            scaled = None if factor is None else factor * loss.times
            value, found = over_stored(
                loss.op, self.student, loss.stored, rows, loss.temperature, loss.attrs, scaled
            )  # fmt: skip
            return torch.where(loss.weight[rows] != 0.0, value, 0.0) * loss.times, found
        if loss.op not in _SOFT or not loss.exact:
            return self._by_operator(loss, factor)
        s = self.softmax(None, loss.temperature, loss.columns)
        t = self.softmax(loss.teacher, loss.temperature, loss.columns)
        scaled = None if factor is None else (factor * (loss.times / loss.temperature)).unsqueeze(-1)
        beta = float(loss.attrs.get("beta", 0.5))
        op = loss.op
        if op == "jsd" and not 0.0 < beta < 1.0:
            op = "kl" if beta <= 0.0 else "reverse_kl"
        if op in ("kl", "soft_cross_entropy"):
            value = (_dot(t.p, t.z - s.z) - t.lse + s.lse) if op == "kl" else s.lse - _dot(t.p, s.z)
            found = None if scaled is None else (s.p.sub_(t.p) if last else s.p - t.p).mul_(scaled)
        elif op == "reverse_kl":
            w = (s.z - t.z).sub_(s.lse - t.lse)
            value = _dot(s.p, w)
            found = None if scaled is None else w.sub_(value).mul_(s.p).mul_(scaled)
        else:
            # Where both are 0 so is what is counted; the bound keeps the logarithm finite there.
            log_m = torch.lerp(s.p, t.p, beta).clamp_(min=_TINY).log_()
            w = (s.z - s.lse).sub_(log_m)
            ours = _dot(s.p, w)
            value = (1.0 - beta) * ours + beta * _dot(t.p, log_m.neg_().add_(t.z).sub_(t.lse))
            found = None if scaled is None else w.sub_(ours).mul_(s.p).mul_(scaled * (1.0 - beta))
        return value.squeeze(-1) * loss.times, found

    def _hard(self, loss: RowLoss, rows: slice, factor: Tensor | None, last: bool) -> tuple[Tensor, Tensor | None]:
        assert loss.labels is not None
        s = self.softmax(None, 1.0, None)
        classes = self.student.shape[-1]
        label = loss.labels[rows].clamp(0, classes - 1).unsqueeze(-1)
        smoothing = float(loss.attrs.get("label_smoothing", 0.0))
        value = s.lse - s.z.gather(-1, label)
        if smoothing:
            value = (1.0 - smoothing) * value + smoothing * (s.lse - s.z.mean(-1, keepdim=True))
        if factor is None:
            return value.squeeze(-1), None
        found = (s.p if last else s.p.clone()).scatter_add_(
            -1, label, s.lse.new_full((), smoothing - 1.0).expand(label.shape)
        )
        if smoothing:
            found.sub_(smoothing / classes)
        return value.squeeze(-1), found.mul_(factor.unsqueeze(-1))

    def _by_operator(self, loss: RowLoss, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert loss.teacher is not None
        function = functions()[loss.op]
        teacher = self.teachers[loss.teacher]
        if factor is None:
            with torch.no_grad():
                return function(self.student, teacher, **loss.attrs), None
        with torch.enable_grad():
            x = self.student.detach().requires_grad_()
            value = function(x, teacher, **loss.attrs)
            (found,) = torch.autograd.grad(value, [x], factor)
        return value.detach(), found


_SOFT = ("kl", "reverse_kl", "jsd", "soft_cross_entropy")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row: [r, C] twice -> [r, 1], without a tensor of their size."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x W^T + b: [n, H], [V, H], [V] -> [n, V]."""
    if out is None:
        return F.linear(x, weight, bias)
    return torch.addmm(bias, x, weight.T, out=out) if bias is not None else torch.mm(x, weight.T, out=out)
