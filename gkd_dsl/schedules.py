"""Schedules: numbers that change over a stage, as values.

A schedule is a frozen tree; `value(clock)` is a pure function of where the stage is, so nothing of it
needs saving. `number(1)` and arithmetic make constants of what does not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from gkd_dsl import aligners
from gkd_dsl.clock import Clock, Span, Unit
from gkd_dsl.conditions import AtCount, Coin, Comparison, CounterValue, Draw, Logic, Not, Recent, StageProgress, counted


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
class Stairs:
    """`count` plateaus of equal length from `start` to `end`, at equal distances; the last one is kept.

    Over `100%` of a stage of n steps, plateau number floor(count * step / n) is in force at a step.
    """

    start: float
    end: float
    count: int
    until: Span

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        passed = self.until.share(clock)
        # A quotient that should be a whole number may fall just short of it.
        place = self.count - 1 if passed >= 1.0 else min(self.count - 1, math.floor(passed * self.count + 1e-9))
        if place == self.count - 1:
            return self.end
        return _between(self.start, self.end, self.start + (self.end - self.start) * place / (self.count - 1))

    def __str__(self) -> str:
        return f"stairs({self.start:g} -> {self.end:g}, count = {self.count}, until = {self.until})"


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
        return f"drawn({self.student} <- {self.teacher}, every = {Span(self.every, 'epochs')}, seed = {self.seed})"


Schedule = (
    Constant
    | Ramp
    | Cosine
    | StepAt
    | Stairs
    | Arithmetic
    | InDrawnMap
    | Coin
    | Draw
    | Comparison
    | Logic
    | Not
    | CounterValue
    | AtCount
    | StageProgress
    | Recent
)


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
    if op == "+" and left == Constant(0.0):
        return right
    if op == "*" and Constant(0.0) in (left, right) and _arithmetic(Arithmetic(op, left, right)) == (0.0, 0.0):
        return Constant(0.0)
    return Arithmetic(op, left, right)


def is_zero(schedule: Schedule) -> bool:
    """Whether the schedule is zero throughout: the constant, or a product such as `0 * ramp(0 -> 1, until = 10%)`."""
    return bounds(schedule) == (0.0, 0.0)


def bounds(schedule: Schedule) -> tuple[float, float] | None:
    """Numbers that the schedule never leaves, by interval arithmetic; None where it may be anything, or NaN."""
    match schedule:
        case Constant(amount=amount):
            return amount, amount
        case Ramp(start=first, end=second) | Cosine(start=first, end=second) | Stairs(start=first, end=second):
            return min(first, second), max(first, second)
        case StepAt(before=first, after=second):
            return min(first, second), max(first, second)
        case CounterValue(start=first, stop=second):
            return float(first), float(second)
        case Draw(count=count):
            return 0.0, float(count - 1)
        case StageProgress(what=what):
            return 0.0, 1.0 if what == "progress" else math.inf
        case Recent():
            return None
        case AtCount(cases=cases):
            return _around(cases)
        case Arithmetic():
            return _arithmetic(schedule)
    return _truth(schedule)


def _around(cases: tuple[Schedule, ...]) -> tuple[float, float] | None:
    found = [bounds(case) for case in cases]
    known = [limits for limits in found if limits is not None]
    if len(known) < len(found):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _arithmetic(schedule: Arithmetic) -> tuple[float, float] | None:
    left, right = bounds(schedule.left), bounds(schedule.right)
    if left is None or right is None or (schedule.op == "/" and right[0] <= 0.0 <= right[1]):
        return None
    ends = [Arithmetic(schedule.op, Constant(a), Constant(b)).value(Clock(0, 1, 1.0)) for a in left for b in right]
    return None if any(math.isnan(end) for end in ends) else (min(ends), max(ends))


def _truth(schedule: Coin | Comparison | Logic | Not | InDrawnMap) -> tuple[float, float]:
    """The bounds of what is 1 or 0: both, or the one of them that it always is."""
    match schedule:
        case Coin(p=p):
            held = bounds(p)
            if held is not None and (held[0] >= 1.0 or held[1] <= 0.0):
                return (1.0, 1.0) if held[0] >= 1.0 else (0.0, 0.0)
        case Not(of=of):
            held = bounds(of)
            if held is not None:
                return 1.0 - held[1], 1.0 - held[0]
        case Logic(op=op, left=left, right=right):
            sides = [bounds(side) or (0.0, 1.0) for side in (left, right)]
            pick = min if op == "and" else max
            return pick(low for low, _ in sides), pick(high for _, high in sides)
        case Comparison(op=op, left=left, right=right):
            return _compared(op, bounds(left), bounds(right))
    return 0.0, 1.0


def _compared(op: str, left: tuple[float, float] | None, right: tuple[float, float] | None) -> tuple[float, float]:
    if left is None or right is None:
        return 0.0, 1.0
    if op in (">", ">="):
        left, right, op = right, left, {">": "<", ">=": "<="}[op]
    apart = left[1] < right[0] or right[1] < left[0]
    same = left == right and left[0] == left[1]
    always, never = {
        "<": (left[1] < right[0], left[0] >= right[1]),
        "<=": (left[1] <= right[0], left[0] > right[1]),
        "==": (same, apart),
        "!=": (apart, same),
    }[op]
    return (1.0, 1.0) if always else (0.0, 0.0) if never else (0.0, 1.0)


def settled(condition: Schedule) -> Schedule:
    """A condition, as a constant where it always or never holds."""
    held = bounds(condition)
    return Constant(held[0]) if held is not None and held[0] == held[1] else condition


def is_condition(schedule: Schedule) -> bool:
    """Whether a schedule is 1 or 0 by its kind."""
    return isinstance(schedule, Coin | Comparison | Logic | Not | InDrawnMap)


def parts(schedule: Schedule) -> Iterator[Schedule]:
    """A schedule and all that it is made of."""
    yield schedule
    for item in fields(schedule):
        held = getattr(schedule, item.name)
        for inner in held if isinstance(held, tuple) else (held,):
            if isinstance(inner, Schedule):
                yield from parts(inner)


def watched(schedule: Schedule, clock: Clock) -> set[str]:
    """The losses whose recent values a schedule reads while the counters stand as they do."""
    if isinstance(schedule, Recent):
        return {schedule.loss}
    if isinstance(schedule, AtCount):
        return watched(schedule.now(clock), clock)
    found: set[str] = set()
    for item in fields(schedule):
        held = getattr(schedule, item.name)
        if isinstance(held, Schedule):
            found |= watched(held, clock)
    return found


def counters(schedule: Schedule) -> set[str]:
    """The names of the counters that a schedule reads."""
    return {part.name for part in parts(schedule) if isinstance(part, CounterValue | AtCount)}


__all__ = [
    "Arithmetic",
    "AtCount",
    "Clock",
    "Coin",
    "Comparison",
    "Constant",
    "Cosine",
    "CounterValue",
    "Draw",
    "InDrawnMap",
    "Logic",
    "Not",
    "Ramp",
    "Recent",
    "Schedule",
    "Span",
    "StageProgress",
    "Stairs",
    "StepAt",
    "Unit",
    "bounds",
    "combine",
    "counted",
    "counters",
    "is_condition",
    "is_zero",
    "parts",
    "settled",
    "watched",
]
