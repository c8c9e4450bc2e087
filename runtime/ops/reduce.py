"""Which positions of a loss count, and the sum over them.

`dims` names the axes of the values: `B`, `L`, and anything else for axes that multiply the count. It takes the
`Dim`s of a `LossType` or their names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gkd_dsl.types import Dim

Dims = Sequence[Dim] | Sequence[str]


def dim_names(dims: Dims) -> tuple[str, ...]:
    """The names of the axes, `*` for those that are neither `B` nor `L`."""
    names = (dim.name if isinstance(dim, Dim) else dim for dim in dims)
    return tuple(name if name in ("B", "L") else "*" for name in names)


def _placed(tensor: Tensor, axes: Sequence[int], rank: int) -> Tensor:
    """A view with the tensor's axes at the given places of `rank` axes, 1 elsewhere."""
    shape = [1] * rank
    for size, axis in zip(tensor.shape, axes, strict=True):
        shape[axis] = size
    return tensor.reshape(shape)


def position_mask(
    dims: Dims,
    valid: Tensor | None,
    length: int | None = None,
    causal: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Where a position counts: Bool, with the rank of `dims`, broadcastable to the values.

    Over each `L` axis a position counts where `valid` (Bool[B, L] or Bool[B]) is true; over two (query, key) where
    both are, and with `causal` where the key is not after the query (`length` gives L where `valid` has none).
    Without `valid` every position counts. Raises ValueError for a `valid` whose axes `dims` lacks.
    """
    names = dim_names(dims)
    rank = len(names)
    device = valid.device if valid is not None else device
    mask = torch.ones([1] * rank, dtype=torch.bool, device=device)
    tokens = [axis for axis, name in enumerate(names) if name == "L"]
    if valid is not None and "B" in names:
        batch = names.index("B")
        valid = valid.bool()
        if valid.ndim == 1:
            mask = mask & _placed(valid, [batch], rank)
        elif not tokens:
            raise ValueError(f"a mask over tokens does not fit a loss with the axes {', '.join(names)}")
        else:
            length = valid.shape[1]
            for axis in tokens:
                mask = mask & _placed(valid, [batch, axis], rank)
    if causal and len(tokens) >= 2:
        if length is None:
            raise ValueError("`length` is needed for a causal mask without `valid`")
        triangle = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask = mask & _placed(triangle, tokens[-2:], rank)
    return mask


def _count(mask: Tensor, shape: Sequence[int]) -> Tensor:
    repeated = math.prod(full for full, own in zip(shape, mask.shape, strict=True) if own == 1)
    return mask.sum(dtype=torch.int64) * repeated


def count_positions(
    dims: Dims,
    sizes: Mapping[str, int],
    valid: Tensor | None,
    batch: int,
    length: int | None,
    causal: bool = False,
) -> Tensor:
    """How many positions of a loss count in one micro-batch, before its values are known: Int64[].

    `sizes` gives the axes that are neither `B` nor `L` by name where their `Dim` has no size. Raises ValueError
    for an axis without a size.
    """
    shape: list[int] = []
    for dim in dims:
        name, size = (dim.name, dim.size) if isinstance(dim, Dim) else (dim, None)
        known = {"B": batch, "L": length}.get(name, size if size is not None else sizes.get(name))
        if known is None:
            raise ValueError(f"the size of the axis `{name}` is not known")
        shape.append(known)
    return _count(position_mask(dims, valid, length, causal), shape)


def reduce_loss(
    values: Tensor,
    dims: Dims,
    valid: Tensor | None,
    *,
    causal: bool = False,
    token_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of the values that count (in their dtype, fp32 at least), and their number (Int64[]).

    `token_weight` (Float[B, L], over the first `L` axis: the query) and `sample_weight` (Float[B]) multiply the
    values and leave the number alone. What does not count gets a gradient of exactly 0.
    """
    names = dim_names(dims)
    if values.ndim != len(names):
        raise ValueError(f"the loss has {values.ndim} axes, and its type has {len(names)}")
    length = values.shape[names.index("L")] if "L" in names else None
    mask = position_mask(names, valid, length, causal, values.device)
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    counted = torch.where(mask, values, values.new_zeros(()))
    for weight, axes in ((token_weight, ("B", "L")), (sample_weight, ("B",))):
        if weight is not None:
            placed = _placed(weight.to(values.dtype), [names.index(axis) for axis in axes], len(names))
            counted = counted * torch.where(mask, placed, placed.new_zeros(()))
    return counted.sum(), _count(mask, values.shape)
