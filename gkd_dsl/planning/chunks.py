"""Gemini's chunks: how parameters are packed into them, and what its fractions come to.

As ColossalAI 0.5.0 has it (`zero/gemini`): parameters go into chunks in their order, one that is larger than a chunk
into one of its own. A fraction is taken of the sum over all parameters of the chunk that each is in, so that a chunk of
many parameters counts many times: half of that can be all of the chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, pstdev

from gkd_dsl.planning.parameters import Parameters

_STEP = 1024
"""Chunk sizes that are tried are multiples of so many numbers."""
_STARTS, _TRIED = 40, 200
"""From how many parameters on rows are looked at, blocks being alike, and how many sizes are enough."""


@dataclass(frozen=True)
class Chunks:
    """Chunks of parameters, in numbers.

    total    in all chunks, with what is not filled
    largest  in one of them
    times    how many parameters a chunk holds, by size: what Gemini's fractions are multiplied with
    """

    total: int
    largest: int
    times: float

    def gathered(self, shard: float) -> float:
        """The share of the chunks that stay whole on every device, where `shard` of them are to be shared out."""
        return min(1.0, (1.0 - shard) * self.times)

    def state_away(self, fraction: float) -> float:
        """The share of the optimiser's state that is in host memory."""
        return min(1.0, fraction * self.times)

    def away(self, fraction: float) -> float:
        """The share of the parameters that are in host memory between their uses: all, or none.

        What is gathered at one moment is compared with what may stay, so that any share that may keeps all of them.
        """
        return 1.0 if (1.0 - fraction) * self.times * self.total < self.largest else 0.0


@lru_cache(maxsize=64)
def chunks(found: Parameters, least: int, reach: int) -> Chunks:
    """How parameters are packed; `least` numbers is the least of a chunk, and `reach` how many more are tried."""
    sizes = [math.prod(shape) for _, shape in found.shapes]
    if not sizes or sum(sizes) < least:
        return Chunks(sum(sizes), sum(sizes), 1.0)
    # What is far larger than the others has no say in the size of a chunk.
    limit = fmean(sizes) + 3 * pstdev(sizes)
    usual = [one for one in sizes if one <= limit]
    first = math.ceil(max(least, *usual) / _STEP) * _STEP
    size = min(_tried(usual, first, reach), key=lambda one: (_unused(usual, one), one))
    made: list[tuple[int, int]] = []
    left = 0
    for one in sizes:
        if one <= left:
            whole, held = made[-1]
            made[-1] = (whole, held + 1)
            left -= one
        else:
            made.append((max(size, one), 1))
            left = made[-1][0] - one
    total = sum(whole for whole, _ in made)
    return Chunks(total, max(whole for whole, _ in made), sum(whole * held for whole, held in made) / total)


def _tried(sizes: Sequence[int], first: int, reach: int) -> set[int]:
    """Sizes of chunks that some parameters in a row fill, among those that Gemini tries: one of these wastes least."""
    found = {first}
    for start in range(min(len(sizes), _STARTS)):
        total = 0
        for one in sizes[start:]:
            total += one
            if total > first + reach:
                break
            if total > first:
                found.add(first + math.ceil((total - first) / _STEP) * _STEP)
        if len(found) > _TRIED:
            break
    return found


def _unused(sizes: Sequence[int], size: int) -> int:
    """What is left empty in chunks of this size."""
    empty = left = 0
    for one in sizes:
        if one > left:
            empty += left
            left = size
        left -= one
    return empty + left
