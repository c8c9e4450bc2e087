"""Schedules: numbers that change over a stage, as values.

A schedule is a frozen tree; `value(clock)` is a pure function of where the stage is, so nothing of it
needs saving. `number(1)` and arithmetic make constants of what does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gkd_dsl import aligners

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
        if self.amount <= 0:
            return math.inf
        if self.unit == "percent":
            # The last step of a stage is step total - 1; `until = 100%` ends there.
            return clock.step / max(1.0, (clock.total_steps - 1) * self.amount / 100.0)
        if self.unit == "steps":
            return clock.step / self.amount
        if self.unit == "epochs":
            return clock.epoch / self.amount
        return clock.tokens / self.amount

    def __str__(self) -> str:
        amount = f"{self.amount:g}"
        return f"{amount}%" if self.unit == "percent" else f"{amount} {self.unit}"


def _between(first: float, second: float, value: float) -> float:
    """The value, kept from leaving the two ends by rounding."""
    return min(max(value, min(first, second)), max(first, second))


@dataclass(frozen=True)
class Constant:
    """The same number throughout."""

    amount: float

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        return self.amount

    def __str__(self) -> str:
        return f"{self.amount:g}"


@dataclass(frozen=True)
class Ramp:
    """Linear from `start` to `end`, reached after `until` and kept."""

    start: float
    end: float
    until: Span

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        passed = self.until.fraction(clock)
        if passed >= 1.0:
            return self.end
        return _between(self.start, self.end, self.start + (self.end - self.start) * passed)

    def __str__(self) -> str:
        return f"ramp({self.start:g} -> {self.end:g}, until = {self.until})"


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end`, reached after `until` and kept."""

    start: float
    end: float
    until: Span

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        passed = self.until.fraction(clock)
        if passed >= 1.0:
            return self.end
        share = 0.5 * (1.0 - math.cos(math.pi * passed))
        return _between(self.start, self.end, self.start + (self.end - self.start) * share)

    def __str__(self) -> str:
        return f"cosine({self.start:g} -> {self.end:g}, until = {self.until})"


@dataclass(frozen=True)
class StepAt:
    """`before` until the duration has passed, `after` from then on."""

    before: float
    after: float
    at: Span

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        # A quotient that should be 1 may fall just short of it.
        return self.after if self.at.fraction(clock) >= 1.0 - 1e-9 else self.before

    def __str__(self) -> str:
        return f"step_at({self.before:g} -> {self.after:g}, at = {self.at})"


@dataclass(frozen=True)
class Arithmetic:
    """Two schedules joined; a division by zero is NaN."""

    op: Literal["+", "-", "*", "/"]
    left: Schedule
    right: Schedule

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        left, right = self.left.value(clock), self.right.value(clock)
        if self.op == "+":
            return left + right
        if self.op == "-":
            return left - right
        if self.op == "*":
            return left * right
        return left / right if right else math.nan

    def __str__(self) -> str:
        return f"({self.left} {self.op} {self.right})"


@dataclass(frozen=True)
class InDrawnMap:
    """1 while a pair of blocks is in the map that `random_sorted` drew, 0 otherwise.

    `students`, `teachers`, `n` and `seed` are those of the aligner; the map is drawn anew every `every` epochs.
    """

    student: int
    teacher: int
    students: int
    teachers: int
    n: int | None
    seed: int
    every: float = 1.0

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        # The quotient of two whole epochs may fall just short of a whole number.
        draw = math.floor(clock.epoch / self.every + 1e-9)
        pairs = aligners.random_sorted(self.students, self.teachers, n=self.n, seed=self.seed, epoch=draw)
        return 1.0 if (self.student, self.teacher) in pairs else 0.0

    def __str__(self) -> str:
        return f"drawn({self.student} <- {self.teacher}, every = {self.every:g} epochs, seed = {self.seed})"


Schedule = Constant | Ramp | Cosine | StepAt | Arithmetic | InDrawnMap


def combine(op: Literal["+", "-", "*", "/"], left: Schedule, right: Schedule) -> Schedule:
    """`left op right`, folded where both are constant or one is neutral."""
    if isinstance(left, Constant) and isinstance(right, Constant):
        return Constant(Arithmetic(op, left, right).value(Clock(0, 1, 1.0)))
    if op == "*" and left == Constant(1.0):
        return right
    if op in "*/" and right == Constant(1.0):
        return left
    if op in "+-" and right == Constant(0.0):
        return left
    return Arithmetic(op, left, right)


def is_zero(schedule: Schedule) -> bool:
    """Whether the schedule is zero throughout: the constant, or a product such as `0 * ramp(0 -> 1, until = 10%)`."""
    return bounds(schedule) == (0.0, 0.0)


def bounds(schedule: Schedule) -> tuple[float, float] | None:
    """Numbers that the schedule never leaves, by interval arithmetic; None where a divisor may be zero."""
    match schedule:
        case Constant(amount=amount):
            return amount, amount
        case Ramp(start=first, end=second) | Cosine(start=first, end=second):
            return min(first, second), max(first, second)
        case StepAt(before=first, after=second):
            return min(first, second), max(first, second)
        case InDrawnMap():
            return 0.0, 1.0
    left, right = bounds(schedule.left), bounds(schedule.right)
    if left is None or right is None or (schedule.op == "/" and right[0] <= 0.0 <= right[1]):
        return None
    ends = [Arithmetic(schedule.op, Constant(a), Constant(b)).value(Clock(0, 1, 1.0)) for a in left for b in right]
    return min(ends), max(ends)
