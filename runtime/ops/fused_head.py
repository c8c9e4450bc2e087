"""Losses over a language-model head whose logits never exist whole.

Every factor of every position is known before the forward, so the gradient is made in it, tile by tile over rows: the
student's logits, the teachers', the gradient in the place of the student's, its products with the hidden states and
with the weight. The backward only scales what is there. At any time two tiles are alive, and one more for each further
teacher; four matrix products are done, where recomputing would do six. The elementwise part is one Triton kernel where
there is a GPU and Triton and it knows the losses (`fused_triton`), else that of `fused_rows`, block by block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.fused_rows import Block, RowLoss, logits_of
from gkd_dsl.tiles import BLOCK_BYTES, TILE_BYTES, rows_of_tile, size_on

log = logging.getLogger("gkd_dsl")


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

    @property
    def factor(self) -> float:
        """What the linear map is multiplied with."""
        return 1.0 / self.scale if self.divide else self.scale

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
        rows = tile_rows or rows_of_tile(
            hidden.shape[0], weight.shape[0], work.dtype.itemsize, hidden.device.type
        )  # fmt: skip
        for start in range(0, hidden.shape[0], rows):
            work.tile(start, min(start + rows, hidden.shape[0]), rows)
        sums = work.summed()
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
            for gradient in found:
                if gradient is not None:
                    _scale(gradient, upstream)
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
        self.head, self.teachers = head, teachers
        self.taught = [_cast(teacher, dtype) for teacher in teachers]
        self.own, dtype = weight.dtype, dtype or weight.dtype
        self.dtype = dtype
        # In fp16 a mean over many tokens would round small gradients of logits to 0: the products get its factor.
        largest = max((abs(loss.scale) for loss in losses), default=0.0)
        self.unit = largest if dtype == torch.float16 and largest else 1.0
        self.losses = [loss if self.unit == 1.0 else replace(loss, scale=loss.scale / self.unit) for loss in losses]
        self.soft = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        self.x, self.weight, self.bias = hidden.to(dtype), weight.to(dtype), _to(bias, dtype)
        self.sums = torch.zeros(len(losses), dtype=self.soft, device=hidden.device)
        needs_x, needs_w, needs_b = needs
        self.any = any(needs)
        self.d_x = torch.empty_like(hidden) if needs_x else None
        # The first tile fills it: a pass of zeros over it would cost as much as a part of a product.
        self.d_w = torch.empty_like(weight) if needs_w else None
        self.d_b = torch.zeros_like(bias, dtype=self.soft) if needs_b and bias is not None else None
        self.tiles: list[Tensor] = []
        self.empty = True
        self.job: Any = None
        self.values: Tensor | None = None
        self._find_kernel()

    def _find_kernel(self) -> None:
        """Look for the kernel, and whether it knows these losses of these logits."""
        kernels = _kernels(self.x.device.type)
        if kernels is None or self.dtype not in kernels.DTYPES:
            return
        for made, teacher in zip(self.taught, self.teachers, strict=True):
            logits = teacher.logits if made is None else None
            dtype = made[0].dtype if made is not None else logits.dtype if logits is not None else None
            columns = made[1].shape[0] if made is not None else logits.shape[1] if logits is not None else None
            plain = logits is None or (logits.stride(1) == 1 and logits.device == self.x.device)
            if dtype not in kernels.DTYPES or columns != self.weight.shape[0] or not plain:
                return
        self.job = kernels.job(self.losses, len(self.teachers), self.x.device)
        if self.job is not None:
            # A length that does not change what the kernel is compiled for.
            self.values = self.sums.new_zeros(len(self.losses), -(-self.x.shape[0] // 16) * 16)

    def tile(self, start: int, stop: int, rows: int) -> None:
        """Do the rows from `start` to `stop`."""
        tiles = self._maps(start, stop, rows)
        student = tiles[0]
        if not self._by_kernel(start, tiles):
            self._rows(start, *self._logits(start, stop, tiles))
        if not self.any:
            return
        if self.d_x is not None:
            _product(student, self.weight, self.d_x[start:stop], self.unit)
        if self.d_w is not None:
            self._weight(student, self.x[start:stop])
        if self.d_b is not None:
            self.d_b.add_(student.sum(0, dtype=self.soft), alpha=self.unit)
        self.empty = False

    def _maps(self, start: int, stop: int, rows: int) -> list[Tensor]:
        """What the linear maps of the student and of each teacher with a head give; memory is taken once."""
        sources = [(self.x, self.weight, self.bias), *(made for made in self.taught if made is not None)]
        if not self.tiles:
            rows = min(rows, self.x.shape[0])
            self.tiles = [x.new_empty(rows, weight.shape[0]) for x, weight, _ in sources]
        return [
            logits_of(x[start:stop], weight, bias, place[: stop - start])
            for (x, weight, bias), place in zip(sources, self.tiles, strict=True)
        ]

    def _logits(self, start: int, stop: int, tiles: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The logits of the student and of each teacher."""
        found, heads = [], iter(tiles[1:])
        for which, teacher in zip(self.taught, self.teachers, strict=True):
            if which is not None and teacher.head is not None:
                found.append(teacher.head.shaped(next(heads)))
            else:
                assert teacher.logits is not None
                at = slice(start, stop) if teacher.rows is None else teacher.rows[start:stop]
                found.append(teacher.logits[at])
        return self.head.shaped(tiles[0]), found

    def _by_kernel(self, start: int, tiles: Sequence[Tensor]) -> bool:
        """Sums and gradient by the kernel; False where it is not to be had."""
        kernels = _kernels(self.x.device.type)
        if kernels is None or self.job is None or self.values is None:
            return False
        source = self.teachers[0] if self.teachers else Teacher()
        taught, picked = (tiles[1] if len(tiles) > 1 else source.logits), None
        if source.logits is not None and len(tiles) == 1:
            picked = source.rows
            taught = source.logits if picked is not None else source.logits[start : start + tiles[0].shape[0]]
        shapes = [kernels.Shape(head.factor, head.softcap) for head in (self.head, source.head or Head(self.weight))]
        with _on(self.x.device):
            return _tried(
                lambda: kernels.rows(
                    self.job, tiles[0], shapes[0], taught, shapes[1], picked, start, self.values, self.any
                )
            )

    def _rows(self, start: int, student: Tensor, taught: list[Tensor]) -> None:
        """Sums of the losses, and the gradient in the place of the student's logits, by blocks that a cache holds."""
        widest = max(x.shape[1] for x in (student, *taught))
        size = max(1, size_on(BLOCK_BYTES, student.device.type) // (widest * self.soft.itemsize))
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
                _product(gradient.T, x, self.d_w, self.unit)
            else:
                self.d_w.addmm_(gradient.T, x, alpha=self.unit)
            return
        # Products in bf16, their sum in the weight's own precision, a slice of the vocabulary at a time: where a tile
        # of a teacher is, which is not needed any more, else in a part of the size of a fourth of a tile.
        words, width = gradient.shape[1], x.shape[1]
        place = self.tiles[1].flatten() if len(self.tiles) > 1 and self.tiles[1].dtype == self.dtype else None
        if place is None or place.numel() < width:
            place = x.new_empty(
                min(words, max(1, size_on(TILE_BYTES, x.device.type) // (4 * width * self.own.itemsize))) * width
            )
        step = min(words, place.numel() // width)
        for first in range(0, words, step):
            many = min(step, words - first)
            part = place[: many * width].view(many, width)
            torch.mm(gradient[:, first : first + many].T, x, out=part)
            here = self.d_w[first : first + many]
            if self.empty:
                _copied(part, here, self.unit)
            else:
                here.add_(part, alpha=self.unit)

    def summed(self) -> Tensor:
        """The weighted sum of each loss."""
        return self.sums if self.values is None else self.sums + self.values.sum(1)

    def gradients(self) -> list[Tensor | None] | None:
        """Those of the hidden rows, the weight and the bias, in their dtypes; lets go of the tiles."""
        self.tiles = []
        if not self.any:
            return None
        if self.d_w is not None and self.empty:
            self.d_w.zero_()
        return [self.d_x, self.d_w, None if self.d_b is None else self.d_b.to(self.own)]


def _product(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
    """`out` = factor a b, also where `out` is of another dtype."""
    if out.dtype != a.dtype:
        _copied(a @ b, out, factor)
    elif factor == 1.0:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(out, a, b, beta=0.0, alpha=factor, out=out)


def _copied(x: Tensor, out: Tensor, factor: float) -> None:
    out.copy_(x)
    if factor != 1.0:
        out.mul_(factor)


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _cast(teacher: Teacher, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The rows, the weight and the bias of a teacher in the autocast dtype, else in its own; None for given logits."""
    if teacher.head is None or teacher.hidden is None:
        return None
    dtype = dtype or teacher.head.weight.dtype
    return teacher.hidden.to(dtype), teacher.head.weight.to(dtype), _to(teacher.head.bias, dtype)


KERNEL_DEVICES = {"cuda"}
"""Types of devices that the kernel is for."""
_failed: list[BaseException] = []


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernels(device: str) -> ModuleType | None:
    """The kernels where they can be used: the one place where that is chosen."""
    if device not in KERNEL_DEVICES or _failed or not _has_triton():
        return None
    found: list[ModuleType] = []

    def load() -> None:
        from gkd_dsl.runtime.ops import fused_triton

        found.append(fused_triton)

    return found[0] if _tried(load) else None


def _tried(do: Callable[[], None]) -> bool:
    """Whether a kernel was made and started; if not, no more are in this process, and the log says why, once.

    A driver, a compiler or a version that Triton cannot use shows in many ways; nothing was written by then.
    """
    try:
        do()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not _failed:
            log.warning(
                "the kernel for fused losses does not run here, the slower way is taken: %s: %s",
                type(error).__name__, str(error).strip()[:300],
            )  # fmt: skip
        _failed.append(error)
        return False
    return True


def _on(device: torch.device) -> Any:
    """Kernels start on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _scale(gradient: Tensor, by: Tensor) -> None:
    """`gradient` times a scalar, in its place."""
    kernels = _kernels(gradient.device.type)
    if kernels is not None and gradient.dtype in kernels.DTYPES and gradient.is_contiguous():
        with _on(gradient.device):
            if _tried(lambda: kernels.scale(gradient, by)):
                return
    gradient.mul_(by.to(gradient.dtype))
