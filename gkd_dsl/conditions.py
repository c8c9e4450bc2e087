"""Conditions and events: schedules whose value is 1 or 0, and the numbers that they compare.

All are frozen trees; a draw is a function of the stage's seed and step, so that nothing of it needs saving.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gkd_dsl.clock import Clock

if TYPE_CHECKING:
    from gkd_dsl.schedules import Schedule


@dataclass(frozen=True)
class Coin:
    """1 with probability `p`, else 0, drawn anew at each step.

    The draw depends on the stage's seed, the coin's name and the step alone: it is the same in every micro-batch
    and on every rank.
    """

    p: Schedule
    name: str

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        drawn = random.Random(f"coin {clock.seed} {self.name} {clock.step}").random()
        return 1.0 if drawn < self.p.value(clock) else 0.0

    def __str__(self) -> str:
        return f"coin({self.p}, {self.name})"


@dataclass(frozen=True)
class Draw:
    """A whole number from 0 to `count` - 1, each as likely, drawn anew at each step as a coin is."""

    count: int
    name: str

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        return float(random.Random(f"draw {clock.seed} {self.name} {clock.step}").randrange(self.count))

    def __str__(self) -> str:
        return f"draw({self.count}, {self.name})"


@dataclass(frozen=True)
class Comparison:
    """1 where the comparison holds, 0 where it does not; one with NaN does not."""

    op: Literal["==", "!=", "<", "<=", ">", ">="]
    left: Schedule
    right: Schedule

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        a, b = self.left.value(clock), self.right.value(clock)
        if math.isnan(a) or math.isnan(b):
            return 0.0
        holds = {"==": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[self.op]
        return 1.0 if holds else 0.0

    def __str__(self) -> str:
        return f"({self.left} {self.op} {self.right})"


@dataclass(frozen=True)
class Logic:
    """`and` or `or` of two conditions."""

    op: Literal["and", "or"]
    left: Schedule
    right: Schedule

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        a, b = self.left.value(clock) != 0.0, self.right.value(clock) != 0.0
        return 1.0 if (a and b if self.op == "and" else a or b) else 0.0

    def __str__(self) -> str:
        return f"({self.left} {self.op} {self.right})"


@dataclass(frozen=True)
class Not:
    """1 where a condition is 0."""

    of: Schedule

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        return 0.0 if self.of.value(clock) != 0.0 else 1.0

    def __str__(self) -> str:
        return f"not {self.of}"


@dataclass(frozen=True)
class CounterValue:
    """The value of a counter that runs from `start` to `stop`; `start` where the clock knows none of it."""

    name: str
    start: int
    stop: int

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        return float(counted(clock, self.name, self.start))

    def __str__(self) -> str:
        return self.name.rpartition("/")[2]


def counted(clock: Clock, name: str, start: int) -> int:
    """The value of a counter, `start` where the clock knows none of it."""
    return next((value for held, value in clock.counters if held == name), start)


@dataclass(frozen=True)
class AtCount:
    """`cases[v - start]` while the counter has the value v; the last one beyond them."""

    name: str
    start: int
    cases: tuple[Schedule, ...]

    def now(self, clock: Clock) -> Schedule:
        """The case in force."""
        place = counted(clock, self.name, self.start) - self.start
        return self.cases[min(max(place, 0), len(self.cases) - 1)]

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        return self.now(clock).value(clock)

    def __str__(self) -> str:
        name = self.name.rpartition("/")[2]
        return "; ".join(f"at {name} = {self.start + place}: {case}" for place, case in enumerate(self.cases))


@dataclass(frozen=True)
class StageProgress:
    """How far the stage is: its share of the steps (from 0, below 1), steps made, epochs with their fraction."""

    what: Literal["progress", "step", "epoch"]

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        if self.what == "step":
            return float(clock.step)
        return clock.epoch if self.what == "epoch" else clock.step / max(1, clock.total_steps)

    def __str__(self) -> str:
        return f"stage.{self.what}"


@dataclass(frozen=True)
class Recent:
    """The mean of a named loss over the last `steps` steps; NaN before there were so many."""

    loss: str
    steps: int

    def value(self, clock: Clock) -> float:
        """The number at this step."""
        return clock.recent(self.loss, self.steps) if clock.recent is not None else math.nan

    def __str__(self) -> str:
        return f"mean({self.loss}, last = {self.steps} steps)"
