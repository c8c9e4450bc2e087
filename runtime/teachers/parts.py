"""Taps as they are stored: bf16 for features, logits whole or as their k largest with the mass of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_dsl.graph.passes.sparse import IDS, TAIL, TopK
from gkd_dsl.graph.plan import ForwardPlan
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.ops.sparse import tail_mass
from gkd_dsl.types import TensorType


@dataclass(frozen=True)
class Layout:
    """The taps of a model by their path, with their types; `top_k` is how its logits are kept (None: whole)."""

    taps: Mapping[TapPath, TensorType]
    top_k: TopK | None = None

    def dims(self) -> dict[str, tuple[str, ...]]:
        """The axes of each part without the batch, "L" for tokens."""
        found: dict[str, tuple[str, ...]] = {}
        for path, type in self.rows():
            names = tuple("L" if dim.name == "L" else "" for dim in type.dims[1:])
            ends = ("", IDS, TAIL) if path.kind == "logits" and self.top_k is not None else ("",)
            found |= {path.key + end: names for end in ends}
        return found

    def rows(self) -> list[tuple[TapPath, TensorType]]:
        """The taps that each row has its own of."""
        return [(path, type) for path, type in self.taps.items() if _of_rows(type)]

    def shared(self) -> list[TapPath]:
        """The taps that are the same for all rows: weights."""
        return [path for path, type in self.taps.items() if not _of_rows(type)]

    def encode(self, values: Mapping[TapPath, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """The parts of a batch `[B, ...]`; what stands at padding is 0. `mask` is `[B, L]`."""
        found: dict[str, Tensor] = {}
        for path, type in self.rows():
            value = values[path].detach()
            if path.kind == "logits" and self.top_k is not None:
                made = self._top(value.float())
            elif not value.is_floating_point():
                made = {"": value if value.dtype == torch.bool else value.int()}
            elif path.kind == "logits":
                made = {"": value.float()}
            else:
                # What masks attention is the least number of fp32, and no number of bf16.
                limit = torch.finfo(torch.bfloat16).max
                made = {"": value.float().clamp(-limit, limit).bfloat16()}
            names = [dim.name for dim in type.dims]
            for end, part in made.items():
                found[path.key + end] = _without_padding(part, names, mask)
        return found

    def decode(self, parts: Mapping[str, Tensor], forward: ForwardPlan, device: torch.device) -> dict[str, Tensor]:
        """The taps of a forward by their keys, on the device: features and logits in fp32, ids in int64."""
        found: dict[str, Tensor] = {}
        for tap in forward.taps:
            end = next((end for end in (IDS, TAIL) if tap.key.endswith(end)), "")
            value = parts[tap.path.key + end].to(device, non_blocking=True)
            found[tap.key] = (
                value.float() if value.is_floating_point() else value if value.dtype == torch.bool else value.long()
            )
        return found

    def _top(self, logits: Tensor) -> dict[str, Tensor]:
        assert self.top_k is not None
        values, ids = logits.topk(self.top_k.count, dim=-1)
        return {"": values, IDS: ids.int(), TAIL: tail_mass(logits, ids, self.top_k.temperatures)}


def _of_rows(type: TensorType) -> bool:
    return bool(type.dims) and type.dims[0].name == "B"


def _without_padding(value: Tensor, names: list[str], mask: Tensor) -> Tensor:
    for axis, name in enumerate(names):
        if name == "L":
            shape = [1] * value.ndim
            shape[0], shape[axis] = mask.shape
            value = torch.where(mask.bool().view(shape), value, value.new_zeros(()))
    return value


def spans(mask: Tensor) -> tuple[list[int], list[int]]:
    """The first token and the number of tokens of each row of a mask `[B, L]`."""
    mask = mask.bool()
    return mask.int().argmax(1).tolist(), mask.sum(1).tolist()


def own_tokens(
    parts: Mapping[str, Tensor], dims: Mapping[str, tuple[str, ...]], row: int, start: int, count: int
) -> dict[str, Tensor]:
    """The parts of one row of a batch, without padding."""
    found: dict[str, Tensor] = {}
    for name, value in parts.items():
        at = tuple(slice(start, start + count) if dim == "L" else slice(None) for dim in dims[name])
        found[name] = value[row][at]
    return found


def together(forwards: Iterable[ForwardPlan]) -> dict[TapPath, TensorType]:
    """All taps of some forwards."""
    return {tap.path: tap.type for forward in forwards for tap in forward.taps}
