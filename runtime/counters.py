"""The counters of a stage as it runs: their values, and what the losses that they watch were lately."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from gkd_dsl.graph.plan import CounterPlan
from gkd_dsl.schedules import Clock, Recent, parts


class Counters:
    """The counters of one stage.

    `values` (by counter) and `recent` (the latest values of each watched loss, oldest first) are all of the state;
    they are changed in place, and may be given as a checkpoint had them.
    """

    def __init__(
        self,
        plans: Iterable[CounterPlan],
        values: dict[str, int] | None = None,
        recent: dict[str, list[float]] | None = None,
    ) -> None:
        self.plans = tuple(plans)
        self.values: dict[str, int] = values if values is not None else {}
        self.recent: dict[str, list[float]] = recent if recent is not None else {}
        self._kept: dict[str, int] = {}
        for plan in self.plans:
            self.values.setdefault(plan.name, plan.start)
            for part in parts(plan.when):
                if isinstance(part, Recent):
                    self._kept[part.loss] = max(part.steps, self._kept.get(part.loss, 0))

    def on(self, clock: Clock) -> Clock:
        """The clock with the counters as they stand."""
        if not self.plans:
            return clock
        return replace(clock, counters=tuple(self.values.items()), recent=self.mean)

    def mean(self, loss: str, steps: int) -> float:
        """The mean of a loss over the last steps; NaN before there were so many."""
        held = self.recent.get(loss, [])
        return math.fsum(held[-steps:]) / steps if len(held) >= steps else math.nan

    def advance(self, watched: Mapping[str, float], clock: Clock) -> None:
        """End a step: `watched` are the losses of that step by name, `clock` is that of the step to come.

        Every condition is read before any counter moves. A loss that was not watched in the step begins anew.
        """
        for loss, steps in self._kept.items():
            if loss not in watched:
                self.recent.pop(loss, None)
                continue
            held = self.recent.setdefault(loss, [])
            held.append(watched[loss])
            del held[:-steps]
        now = self.on(clock)
        up = [plan.name for plan in self.plans if self.values[plan.name] < plan.stop and plan.when.value(now) != 0.0]
        for name in up:
            self.values[name] += 1

    def reset(self) -> None:
        """As before the first step of the stage."""
        self.recent.clear()
        self.values.update({plan.name: plan.start for plan in self.plans})
