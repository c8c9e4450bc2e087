"""Losses over a language-model head whose logits never exist whole.

Every factor of every position is known before the forward, so the gradient is made in it, tile by tile over rows: the
student's logits, the teachers', the gradient in the place of the student's, its products with the hidden states and
with the weight. The backward only scales what is there. At any time two tiles are alive, and one more for each further
teacher; four matrix products are done, where recomputing would do six.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.fused_rows import Block, RowLoss, logits_of

TILE_BYTES = {"cpu": 80 * 2**20, "cuda": 256 * 2**20}
"""The size of a tile: on the CPU little beside the gradient of a large head, on a GPU enough to fill it."""
BLOCK_BYTES = {"cpu": 5 * 2**18, "cuda": 64 * 2**20}
"""The size of the rows that the elementwise work takes at a time: on the CPU what the cache holds."""


@dataclass(frozen=True)
class Head:
    """A linear map onto a vocabulary: scale * (x W^T + b), then cap * tanh(. / cap) where there is a cap.

    weight [V, H], bias [V]. `divide` divides by the scale instead of multiplying, as some configs have it.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    divide: bool = False

    def shaped(self, z: Tensor) -> Tensor:
        """The logits of what the linear map gives, in its place."""
        if self.scale != 1.0:
            z = z.div_(self.scale) if self.divide else z.mul_(self.scale)
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient at what the linear map gives, from that at the logits, in its place."""
        if self.softcap is not None:
            gradient.mul_((logits / self.softcap).square_().neg_().add_(1.0))
        if self.scale != 1.0:
            gradient = gradient.div_(self.scale) if self.divide else gradient.mul_(self.scale)
        return gradient


@dataclass(frozen=True)
class Teacher:
    """Where a teacher's logits come from: its hidden rows [n, H] and its head, or logits of which `rows` [n] count."""

    hidden: Tensor | None = None
    head: Head | None = None
    logits: Tensor | None = None
    rows: Tensor | None = None


def fused_losses(
    hidden: Tensor,
    head: Head,
    teachers: Sequence[Teacher],
    losses: Sequence[RowLoss],
    *,
    tile_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted total, a scalar with its gradient, and the weighted sum of each loss `[losses]`, without one.

    `hidden` [n, H] is what the head is given, in rows that count. The sum of loss k is sum_i weight_ki value_ki, the
    total sum_k scale_k sum_k. The softmax is taken in fp32 (fp64 stays), products in the autocast dtype where autocast
    is on, else in the dtype of each weight. The gradient goes to `hidden`, the weight and the bias of `head`, and to
    nothing else; it can be taken once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        return _Fused.apply(
            hidden, head.weight, head.bias, head, teachers, losses, dtype, tile_rows, torch.is_grad_enabled()
        )


class _Fused(torch.autograd.Function):
    """See `fused_losses`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teachers: Sequence[Teacher],
        losses: Sequence[RowLoss],
        dtype: torch.dtype | None,
        tile_rows: int | None,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_x, needs_w, needs_b = (grad and needed for needed in ctx.needs_input_grad[:3])
        work = _Work(hidden, weight, bias, head, teachers, losses, dtype, (needs_x, needs_w, needs_b))
        rows = (
            tile_rows
            if tile_rows is not None
            else _tile_rows(hidden.shape[0], weight.shape[0], work.dtype, hidden.device)
        )
        for start in range(0, hidden.shape[0], rows):
            work.tile(start, min(start + rows, hidden.shape[0]), rows)
        sums = work.sums
        total = sum((loss.scale * value for loss, value in zip(losses, sums, strict=True)), sums.new_zeros(()))
        ctx.found = work.gradients()
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError("the gradient of fused losses can be taken once: set `fuse_logits = off` to retain it")
        # Handed over, not copied: autograd keeps a gradient as it is where nobody else holds it.
        found, ctx.found = ctx.found, None
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            found = [None if gradient is None else gradient.mul_(upstream.to(gradient.dtype)) for gradient in found]
        return (*found, None, None, None, None, None, None)


class _Work:
    """The sums and gradients of the tiles so far."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teachers: Sequence[Teacher],
        losses: Sequence[RowLoss],
        dtype: torch.dtype | None,
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.head, self.teachers, self.losses = head, teachers, losses
        self.taught = [_cast(teacher, dtype) for teacher in teachers]
        self.own, dtype = weight.dtype, dtype or weight.dtype
        self.dtype = dtype
        self.soft = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        self.x, self.weight, self.bias = hidden.to(dtype), weight.to(dtype), _to(bias, dtype)
        self.sums = torch.zeros(len(losses), dtype=self.soft, device=hidden.device)
        needs_x, needs_w, needs_b = needs
        self.any = any(needs)
        self.d_x = torch.zeros_like(hidden) if needs_x else None
        # The first tile fills it: a pass of zeros over it would cost as much as a part of a product.
        self.d_w = torch.empty_like(weight) if needs_w else None
        self.d_b = torch.zeros_like(bias, dtype=self.soft) if needs_b and bias is not None else None
        self.tiles: list[Tensor] = []
        self.empty = True

    def tile(self, start: int, stop: int, rows: int) -> None:
        """Do the rows from `start` to `stop`."""
        logits = self._logits(start, stop, rows)
        student, taught = logits[0], logits[1:]
        self._rows(start, student, taught)
        if not self.any:
            return
        if self.d_x is not None:
            _product(student, self.weight, self.d_x[start:stop])
        if self.d_w is not None:
            self._weight(student, self.x[start:stop])
        if self.d_b is not None:
            self.d_b += student.sum(0, dtype=self.soft)
        self.empty = False

    def _logits(self, start: int, stop: int, rows: int) -> list[Tensor]:
        """The tiles of the student and of each teacher; memory is taken once."""
        sources = [(self.x, self.weight, self.bias, self.head)]
        sources += [
            (*made, teacher.head)
            for made, teacher in zip(self.taught, self.teachers, strict=True)
            if made is not None and teacher.head is not None
        ]  # fmt: skip
        if not self.tiles:
            self.tiles = [x.new_empty(rows, weight.shape[0]) for x, weight, *_ in sources]
        made = []
        for (x, weight, bias, head), place in zip(sources, self.tiles, strict=True):
            made.append(head.shaped(logits_of(x[start:stop], weight, bias, place[: stop - start])))
        student, heads = made[0], iter(made[1:])
        found = [student]
        for which, teacher in zip(self.taught, self.teachers, strict=True):
            if which is not None:
                found.append(next(heads))
            else:
                assert teacher.logits is not None
                at = slice(start, stop) if teacher.rows is None else teacher.rows[start:stop]
                found.append(teacher.logits[at])
        return found

    def _rows(self, start: int, student: Tensor, taught: Sequence[Tensor]) -> None:
        """Sums of the losses, and the gradient in the place of the student's logits, by blocks that a cache holds."""
        widest = max(x.shape[1] for x in (student, *taught))
        size = max(1, _of(BLOCK_BYTES, student.device) // (widest * self.soft.itemsize))
        if student.device.type == "cpu":
            # Softmax runs one row a thread.
            threads = torch.get_num_threads()
            size = -(-size // threads) * threads
        for first in range(0, student.shape[0], size):
            here = student[first : first + size]
            x = here.to(self.soft)
            block = Block(x, [t[first : first + size].to(self.soft) for t in taught])
            at = slice(start + first, start + first + here.shape[0])
            sums, gradient = block.losses(self.losses, at, self.any)
            self.sums += torch.stack(sums)
            if not self.any:
                continue
            if gradient is None:
                here.zero_()
            else:
                here.copy_(self.head.back(gradient, x))

    def _weight(self, gradient: Tensor, x: Tensor) -> None:
        assert self.d_w is not None
        if self.dtype == self.own:
            if self.empty:
                torch.mm(gradient.T, x, out=self.d_w)
            else:
                self.d_w.addmm_(gradient.T, x)
            return
        # Products in bf16, their sum in the weight's own precision, a slice of the vocabulary at a time.
        step = max(1, _of(TILE_BYTES, x.device) // (4 * x.shape[1] * self.own.itemsize))
        for first in range(0, gradient.shape[1], step):
            part = gradient[:, first : first + step].T @ x
            if self.empty:
                self.d_w[first : first + step].copy_(part)
            else:
                self.d_w[first : first + step].add_(part)

    def gradients(self) -> list[Tensor | None] | None:
        """Those of the hidden rows, the weight and the bias, in their dtypes; lets go of the tiles."""
        self.tiles = []
        if not self.any:
            return None
        if self.d_w is not None and self.empty:
            self.d_w.zero_()
        return [self.d_x, self.d_w, None if self.d_b is None else self.d_b.to(self.own)]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out` = a b, also where `out` is of another dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _cast(teacher: Teacher, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The rows, the weight and the bias of a teacher in the autocast dtype, else in its own; None for given logits."""
    if teacher.head is None or teacher.hidden is None:
        return None
    dtype = dtype or teacher.head.weight.dtype
    return teacher.hidden.to(dtype), teacher.head.weight.to(dtype), _to(teacher.head.bias, dtype)


def _of(table: dict[str, int], device: torch.device) -> int:
    return table.get(device.type, table["cuda"])


def _tile_rows(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows a tile has: all tiles about equal."""
    most = max(1, _of(TILE_BYTES, device) // (vocabulary * dtype.itemsize))
    return max(1, math.ceil(rows / math.ceil(rows / most))) if rows else 1
