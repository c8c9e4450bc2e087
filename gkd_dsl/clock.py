"""Where a stage is, and durations measured on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["percent", "steps", "epochs", "tokens"]


@dataclass(frozen=True)
class Clock:
    """Where a stage is, before the step about to be made.

    `step` counts optimiser steps from 0; `total_steps` is fixed when the stage starts. `counters` are the values of
    the stage's counters, `recent(loss, n)` the mean of a loss over the last n steps (NaN before there were n).
    `seed` is the stage's, `micro` the number of the micro-batch in its step.
    """

    step: int
    total_steps: int
    steps_per_epoch: float
    tokens: int = 0
    counters: tuple[tuple[str, int], ...] = ()
    seed: int = 0
    micro: int = 0
    recent: Callable[[str, int], float] | None = field(default=None, compare=False, repr=False)

    @property
    def epoch(self) -> float:
        """Epochs of the stage so far, with their fraction."""
        return self.step / self.steps_per_epoch if self.steps_per_epoch else 0.0


@dataclass(frozen=True)
class Span:
    """A duration: `10%` of the stage, `500 steps`, `3 epochs`, `2M tokens`. A percent's amount is 10."""

    amount: float
    unit: Unit

    def fraction(self, clock: Clock) -> float:
        """How much of the duration has passed, at least 0, 1 at its end (and above after it)."""
        if self.amount > 0 and self.unit == "percent":
            # The last step of a stage is step total - 1; `until = 100%` ends there.
            return clock.step / max(1.0, (clock.total_steps - 1) * self.amount / 100.0)
        return self.share(clock)

    def share(self, clock: Clock) -> float:
        """As `fraction`, but counted in whole steps: `100%` is over when all steps are made, after the last."""
        if self.amount <= 0:
            return math.inf
        if self.unit == "percent":
            return clock.step / (max(1, clock.total_steps) * self.amount / 100.0)
        if self.unit == "steps":
            return clock.step / self.amount
        if self.unit == "epochs":
            return clock.epoch / self.amount
        return clock.tokens / self.amount

    def __str__(self) -> str:
        amount = f"{self.amount:g}"
        if self.unit == "percent":
            return f"{amount}%"
        return f"{amount} {self.unit.removesuffix('s') if self.amount == 1 else self.unit}"
