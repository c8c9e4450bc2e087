"""The loop of one stage: steps, evaluations, checkpoints, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from torch import Tensor

from gkd_dsl.graph.nodes import StageNode
from gkd_dsl.graph.plan import StagePlan
from gkd_dsl.runtime.backends.base import Backend, StepResult
from gkd_dsl.runtime.checkpoint import Position
from gkd_dsl.runtime.counters import Counters
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.optim import LearningRate, span_steps
from gkd_dsl.runtime.records import EvaluateRecord, Listener, StepRecord
from gkd_dsl.schedules import Clock, Span

_MINUTES_BETWEEN_CHECKPOINTS = 10.0
_BATCHES_FOR_AN_ESTIMATE = 64


class Loader(Protocol):
    """The batches of a stage, in an order that seed and epoch alone decide."""

    def steps_per_epoch(self, accumulate: int) -> int:
        """Optimiser steps in an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The micro-batches of an epoch, from number `start` on."""

    def held_out(self) -> Iterator[dict[str, Tensor]]:
        """The held-out set."""

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """Tokens without padding."""


@dataclass(frozen=True)
class Length:
    """How long a stage is. `total_steps` is an estimate where the duration is in tokens."""

    total_steps: int
    steps_per_epoch: int
    tokens_per_step: float = 0.0
    tokens: float | None = None
    seed: int = 0

    def over(self, position: Position) -> bool:
        """Whether the stage is over at this position."""
        if self.tokens is not None:
            return position.tokens >= self.tokens
        return position.step >= self.total_steps

    def clock(self, position: Position) -> Clock:
        """The clock of the step about to be made."""
        return Clock(position.step, self.total_steps, float(self.steps_per_epoch), position.tokens, seed=self.seed)


def length_of(stage: StageNode, loader: Loader) -> Length:
    """The length of a stage over its data.

    Tokens are turned into steps by the mean over the first micro-batches of the first epoch; the stage itself ends
    at the first step that has seen so many tokens.
    """
    per_epoch = loader.steps_per_epoch(stage.accumulate)
    tokens = 0.0
    if "tokens" in (stage.duration.unit, stage.optim.warmup.unit):
        stream = loader.epoch(0)
        counts = [loader.tokens(batch) for batch in islice(stream, _BATCHES_FOR_AN_ESTIMATE)]
        _close(stream)
        tokens = stage.accumulate * sum(counts) / max(1, len(counts))
    steps = max(1, span_steps(stage.duration, 0, per_epoch, tokens))
    target = stage.duration.amount if stage.duration.unit == "tokens" else None
    return Length(steps, per_epoch, tokens, target, stage.seed)


Evaluate = Callable[[Sequence[str], Iterable[dict[str, Tensor]], Backend, Clock], dict[str, float]]
"""Gives metrics over batches."""


class StageLoop:
    """Runs a stage from a position to its end.

    `save(position, best)` writes a checkpoint. `stopping` is asked after each step; when it says so the state is
    saved and `run` gives False.
    """

    def __init__(
        self,
        plan: StagePlan,
        loader: Loader,
        backend: Backend,
        position: Position,
        length: Length,
        *,
        evaluator: Evaluate,
        listeners: Sequence[Listener],
        save: Callable[[Position, bool], None],
        restore_best: Callable[[Position], None],
        stopping: Callable[[], bool],
    ) -> None:
        self.plan, self.stage, self.loader, self.backend = plan, plan.stage, loader, backend
        self.position, self.length = position, length
        self.rate = LearningRate(
            self.stage.optim, length.total_steps, float(length.steps_per_epoch), length.tokens_per_step
        )
        self.counters = Counters(plan.counters, position.counters, position.recent)
        self._evaluator = evaluator
        self._listeners, self._save, self._restore_best, self._stopping = listeners, save, restore_best, stopping
        self._saved_at = time.monotonic()
        self._greater = {item.metric.name: item.metric.greater_is_better for item in plan.metrics}

    @property
    def clock(self) -> Clock:
        """The clock of the step about to be made, with the counters as they stand."""
        return self.counters.on(self.length.clock(self.position))

    def run(self) -> bool:
        """Run to the end of the stage (True), or until a stop is asked for (False)."""
        position = self.position
        position.total_steps = self.length.total_steps
        if position.step == 0:
            self._evaluate_before()
        empty = 0
        while not self.length.over(position):
            stream = self.loader.epoch(position.epoch, position.batch)
            steps_before = position.step
            try:
                while group := list(islice(stream, self.stage.accumulate)):
                    if not self._one(group):
                        return False
                    if self.length.over(position):
                        return True
            finally:
                _close(stream)
            empty = empty + 1 if position.step == steps_before else 0
            if empty > 1:
                raise RunError(CANNOT_RUN, f"the source of stage `{self.plan.name}` gives no batch")
            position.epoch, position.batch = position.epoch + 1, 0
        return True

    def _one(self, group: list[dict[str, Tensor]]) -> bool:
        position, clock = self.position, self.clock
        started, rate = time.perf_counter(), self.rate.at(position.step)
        result = self.backend.step(group, clock, rate)
        seconds = time.perf_counter() - started
        tokens = sum(self.loader.tokens(batch) for batch in group)
        position.step += 1
        position.batch += len(group)
        position.tokens += tokens
        counted = dict(self.counters.values)
        self.counters.advance(result.watched, self.length.clock(position))
        self._tell(result, counted, rate, tokens / max(seconds, 1e-9))
        last, stop = self.length.over(position), self._stopping()
        best = self._evaluate(clock, last)
        if last:
            if self.stage.keep_best is not None and position.best_step is not None and not best:
                self._restore_best(position)
            position.finished = True
        if last or stop or best or self._due_for_saving(clock):
            self._save(position, best)
            self._saved_at = time.monotonic()
        return last or not stop

    def _tell(self, result: StepResult, counted: Mapping[str, int], rate: float, speed: float) -> None:
        position = self.position
        record = StepRecord(
            self.plan.name,
            position.step,
            self.length.total_steps,
            position.step / self.length.steps_per_epoch,
            result.loss,
            result.terms,
            result.weights,
            rate,
            result.gradient_norm,
            position.tokens,
            speed,
            counted,
            {policy.node.name: result.watched[policy.reward] for policy in self.plan.policies},
            result.skipped,
        )
        for listener in self._listeners:
            listener.on_step(record)

    def _evaluate_before(self) -> None:
        """Every metric before the first step, so that a run can say what the stage changed."""
        names = tuple(dict.fromkeys(name for spec in self.stage.evaluate for name in spec.metrics))
        if names:
            found = self._metrics(names)
            for listener in self._listeners:
                listener.on_evaluate(EvaluateRecord(self.plan.name, 0, found))

    def _evaluate(self, before: Clock, last: bool) -> bool:
        """Evaluate what is due; whether the chosen metric was never better."""
        position = self.position
        names = tuple(
            dict.fromkeys(
                name
                for spec in self.stage.evaluate
                if last or (spec.every is not None and self._passed(spec.every, before))
                for name in spec.metrics
            )
        )
        if not names:
            return False
        found = self._metrics(names)
        best, chosen = False, self.stage.keep_best
        if chosen in found and not math.isnan(found[chosen]):
            value = found[chosen]
            better = position.best is None or (
                value > position.best if self._greater[chosen] else value < position.best
            )
            if better:
                best, position.best, position.best_step = True, value, position.step
        record = EvaluateRecord(self.plan.name, position.step, found, best)
        for listener in self._listeners:
            listener.on_evaluate(record)
        return best

    def _metrics(self, names: Sequence[str]) -> dict[str, float]:
        """The metrics over the held-out set; the last bit of the first process decides for all."""
        found = self._evaluator(names, self.loader.held_out(), self.backend, self.clock)
        return self.backend.processes.told(found)

    def _due_for_saving(self, before: Clock) -> bool:
        every = self.stage.checkpoint_every
        if every is not None:
            return self._passed(every, before)
        late = time.monotonic() - self._saved_at > 60.0 * _MINUTES_BETWEEN_CHECKPOINTS
        return self.backend.processes.any(late)

    def _passed(self, every: Span, before: Clock) -> bool:
        """Whether this step ended one of the stretches of length `every`."""
        if every.amount <= 0:
            return True
        return self._stretches(every, self.length.clock(self.position)) > self._stretches(every, before)

    def _stretches(self, every: Span, clock: Clock) -> int:
        progress = {
            "steps": float(clock.step),
            "epochs": clock.epoch,
            "percent": 100.0 * clock.step / clock.total_steps,
            "tokens": float(clock.tokens),
        }[every.unit]
        return math.floor(progress / every.amount + 1e-9)


def _close(stream: Iterator[dict[str, Tensor]]) -> None:
    """Let a generator end, and with it whatever reads ahead."""
    close = getattr(stream, "close", None)
    if close is not None:
        close()
