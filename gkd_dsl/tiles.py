"""How many rows of logits the losses run with a head take at a time: what the run does and the plan counts."""

from __future__ import annotations

import math

TILE_BYTES = {"cpu": 80 * 2**20, "cuda": 160 * 2**20}
"""The size of a tile, one of each model: on the CPU little beside the gradient of a large head, on a GPU enough to fill
it."""

BLOCK_BYTES = {"cpu": 5 * 2**18, "cuda": 64 * 2**20}
"""The size of the rows that the elementwise work takes at a time: on the CPU what the cache holds."""

STEP = 128
"""On a GPU tiles have a multiple of these rows: what its matrix products take at a time."""


def size_on(table: dict[str, int], device: str) -> int:
    """The size on a type of device; all that are no CPU are taken for a GPU."""
    return table.get(device, table["cuda"])


def rows_of_tile(rows: int, vocabulary: int, element: int, device: str) -> int:
    """How many of `rows` a tile has, all tiles about equal; `element` is the bytes of a logit.

    On a GPU there are two tiles where there are rows for two: with few rows a tile of all of them would take as much
    as half of the head's gradient.
    """
    if not rows:
        return 1
    step = 1 if device == "cpu" else STEP
    most = max(step, size_on(TILE_BYTES, device) // (vocabulary * element) // step * step)
    if device != "cpu" and rows >= 2 * STEP:
        most = min(most, math.ceil(rows / 2 / step) * step)
    if rows <= most:
        return rows
    return math.ceil(rows / math.ceil(rows / most) / step) * step
