"""What the loss functions share: precision, and the choice of the rows that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.reduce import position_mask


def full(x: Tensor) -> Tensor:
    """The tensor in fp32; fp64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def default_dims(rank: int) -> tuple[str, ...]:
    """The usual meaning of `rank` axes of positions: [B], [B, L], [B, A, L], [B, A, L, L]."""
    usual = {0: (), 1: ("B",), 2: ("B", "L"), 3: ("B", "*", "L"), 4: ("B", "*", "L", "L")}
    return usual.get(rank, ("B", *["*"] * (rank - 1)))


def mask_for(
    shape: Sequence[int], dims: Sequence[str] | None, valid: Tensor | None, causal: bool, device: torch.device
) -> Tensor | None:
    """Bool, broadcastable to positions of this shape; None where all count."""
    names = tuple(dims) if dims is not None else default_dims(len(shape))
    causal = causal and names.count("L") >= 2
    if valid is None and not causal:
        return None
    length = shape[names.index("L")] if "L" in names else None
    return position_mask(names, valid, length, causal, device)


def zero_where_not(mask: Tensor | None, x: Tensor) -> Tensor:
    """The tensor with 0, and no gradient, where the mask does not hold."""
    return x if mask is None else torch.where(mask, x, x.new_zeros(()))


def unit(x: Tensor) -> Tensor:
    """The vectors of the last axis scaled to length 1, in fp32; a zero vector stays zero and gets no gradient."""
    x = full(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    held = length > 1e-12
    return x * zero_where_not(held, torch.where(held, length, torch.ones_like(length)).reciprocal())


def on_rows(
    compute: Callable[..., Tensor], rows: Sequence[Tensor], dims: Sequence[str] | None, valid: Tensor | None
) -> Tensor:
    """`compute` on the rows (last axis) that count, 0 elsewhere.

    Rows that do not count are left out of the arithmetic, which is where the time and the memory of a loss over
    a vocabulary go. `compute` takes tensors [n, C] and gives [n].
    """
    shape = rows[0].shape[:-1]
    mask = mask_for(shape, dims, valid, False, rows[0].device)
    if mask is None:
        return compute(*rows)
    mask = mask.expand(shape)
    values = compute(*(row[mask] for row in rows))
    return values.new_zeros(shape).masked_scatter(mask, values)


def end_token(x: Tensor, valid: Tensor | None, last: bool) -> Tensor:
    """The first token of each text where `valid` `[B, L]` holds, or the last: `[B, L, H]` -> `[B, H]`."""
    if valid is None:
        return x[:, -1 if last else 0]
    found = valid.int()
    place = x.shape[1] - 1 - found.flip(1).argmax(1) if last else found.argmax(1)
    return x[torch.arange(len(x), device=x.device), place]
