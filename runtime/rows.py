"""The rows of a micro-batch that this process has, where several processes share it out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gkd_dsl.runtime.errors import CANNOT_RUN, RunError


@dataclass(frozen=True)
class Share:
    """`sizes[r]` rows of a micro-batch are those of process r, in order; this process is number `rank`.

    A process without a row of its own computes with the last one, which counts nowhere: every process takes part in
    every exchange.
    """

    rank: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, rows: int, rank: int, count: int) -> Share:
        """Rows shared out as evenly as they go, the first processes taking one more."""
        return cls(rank, tuple(rows // count + (number < rows % count) for number in range(count)))

    @property
    def rows(self) -> slice:
        """The rows of this process."""
        first, own = sum(self.sizes[: self.rank]), self.sizes[self.rank]
        return slice(first, first + own) if own else slice(sum(self.sizes) - 1, sum(self.sizes))

    @property
    def idle(self) -> bool:
        """Whether the rows of this process count nowhere."""
        return self.sizes[self.rank] == 0


_SHARE: ContextVar[Share | None] = ContextVar("share", default=None)


@contextmanager
def shared(share: Share | None) -> Iterator[None]:
    """Within, tensors of a micro-batch hold the rows of this share; None: they hold all rows."""
    token = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(token)


def current() -> Share | None:
    """The share in force; None where tensors hold all rows."""
    return _SHARE.get()


def whole(value: Tensor) -> Tensor:
    """All rows of a tensor whose first axis is the micro-batch: [b, ...] -> [B, ...], with its gradient."""
    share = current()
    return value if share is None else _Gather.apply(value, share)


def own(value: Tensor) -> Tensor:
    """The rows of this process of a tensor that holds all: [B, ...] -> [b, ...]."""
    share = current()
    return value if share is None else value[share.rows]


@contextmanager
def collective() -> Iterator[None]:
    """Turn the failure of an exchange into a RunError that says what it means."""
    try:
        yield
    except RuntimeError as error:
        hint = "what it said is above or below; go on with `--resume`"
        raise RunError(CANNOT_RUN, "another process of this run has ended, or cannot be reached", hint) from error


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of a row is the sum of what all processes say of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, share: Share) -> Tensor:
        ctx.share, ctx.dtype = share, value.dtype
        most = max(share.sizes)
        # Equal pieces, and no booleans: not every transport takes others.
        held = value.to(torch.uint8) if value.dtype == torch.bool else value
        piece = held.new_zeros((most, *held.shape[1:]))
        count = share.sizes[share.rank]
        piece[:count] = held[:count]
        pieces = [torch.empty_like(piece) for _ in share.sizes]
        with collective():
            dist.all_gather(pieces, piece)
        found = torch.cat([part[:size] for part, size in zip(pieces, share.sizes, strict=True)])
        return found.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].to(torch.promote_types(ctx.dtype, torch.float32)).contiguous().clone()
        with collective():
            dist.all_reduce(summed)
        found = summed[ctx.share.rows].to(ctx.dtype)
        return (torch.zeros_like(found) if ctx.share.idle else found), None
