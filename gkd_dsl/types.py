"""The types of the language: tensors with named axes, losses, and the plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DType = Literal["float", "int", "bool"]


@dataclass(frozen=True)
class Dim:
    """One axis.

    `B` (batch) and `L` (tokens of a batch) have no size before a batch is there. Every other
    axis has a size from a config, or none (`size is None`) inside a method that is not yet used.
    Two axes agree when both are the same per-batch axis or have the same size; `name` and
    `origin` ("config `hidden_size` of ...") are for messages only.
    """

    name: str
    size: int | None = None
    origin: str | None = field(default=None, compare=False)

    @property
    def per_batch(self) -> bool:
        """Whether its size is only known with a batch."""
        return self.name in ("B", "L")

    @property
    def known(self) -> bool:
        """Whether it can be compared."""
        return self.per_batch or self.size is not None

    def agrees(self, other: Dim) -> bool:
        """Whether the two can be the same axis; an unknown size agrees with any other size."""
        if self.per_batch or other.per_batch:
            return self.name == other.name
        return self.size is None or other.size is None or self.size == other.size

    def __str__(self) -> str:
        if self.per_batch or self.size is None:
            return self.name
        return str(self.size) if self.name == "" else f"{self.name} = {self.size}"

    @property
    def short(self) -> str:
        """`B`, `L`, `312`, or the name where the size is not known."""
        return self.name if self.size is None else str(self.size)


BATCH = Dim("B")
LENGTH = Dim("L")


@dataclass(frozen=True)
class TensorType:
    """`Float[B, L, H]`, `Int[B, L]`, `Bool[B, L]`."""

    dtype: DType
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype.capitalize()}[{', '.join(d.short for d in self.dims)}]"

    @property
    def long(self) -> str:
        """With the name and the size of each axis: `[B, L, s.H = 312]`."""
        return f"[{', '.join(str(d) for d in self.dims)}]"


@dataclass(frozen=True)
class LossType:
    """A loss before its reduction: one value for each position, `Loss[B, L]`.

    Over each `L` axis only valid tokens count; the denominator is the number of valid positions.
    """

    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"Loss[{', '.join(d.short for d in self.dims)}]"

    @property
    def long(self) -> str:
        """With the name and the size of each axis."""
        return f"[{', '.join(str(d) for d in self.dims)}]"


ValueType = TensorType | LossType
