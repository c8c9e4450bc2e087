"""Bytes that are alive, by part, and the most that ever were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

PARTS = ("weights", "gradients", "optimizer", "activations", "taps", "logits", "losses", "chunks", "libraries")
"""What memory is used for, in the order of the tables."""


class Ledger:
    """A sum by part. `peak` is the state at which the sum was greatest."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.moment = ""

    def add(self, part: str, count: float) -> None:
        """Take bytes, or give them back where the count is negative."""
        self.now[part] += round(count)

    def mark(self, moment: str, **more: float) -> None:
        """Compare with the peak, with what is alive for a moment on top."""
        found = dict(self.now)
        for part, count in more.items():
            found[part] = found.get(part, 0) + round(count)
        if sum(found.values()) > self.total:
            self.peak, self.moment = found, moment

    @property
    def total(self) -> int:
        """The most bytes that were alive."""
        return sum(self.peak.values())

    def parts(self) -> Mapping[str, int]:
        """The peak by part, empty parts left out."""
        return {part: self.peak[part] for part in PARTS if self.peak.get(part)}
