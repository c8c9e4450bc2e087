"""What a run tells whoever listens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class StageRecord:
    """A stage begins, or goes on after `step` steps. `counters` holds the last value of each counter."""

    stage: str
    order: int
    stages: int
    step: int
    total_steps: int
    losses: tuple[str, ...]
    metrics: tuple[str, ...]
    parameters: int
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step: `step` counts from 1.

    loss              the objective
    terms             each loss before its weight
    weights           the weight of each loss
    gradient_norm     before clipping
    tokens            of this stage so far, without padding
    tokens_per_second of this step
    counters          the value of each counter in this step
    rewards           the reward of each policy, for its choices of the step before
    skipped           whether the gradients were beyond the numbers of fp16: nothing was updated, the norm is not known
    """

    stage: str
    step: int
    total_steps: int
    epoch: float
    loss: float
    terms: Mapping[str, float]
    weights: Mapping[str, float]
    lr: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    counters: Mapping[str, int] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)
    skipped: bool = False


@dataclass(frozen=True)
class EvaluateRecord:
    """Metrics over the held-out set after `step` steps. `best` says that the chosen metric was never better."""

    stage: str
    step: int
    metrics: Mapping[str, float]
    best: bool = False


class Listener(Protocol):
    """Hears of a run as it goes."""

    def on_stage(self, record: StageRecord) -> None:
        """A stage begins or goes on."""

    def on_step(self, record: StepRecord) -> None:
        """A step is done."""

    def on_evaluate(self, record: EvaluateRecord) -> None:
        """An evaluation is done."""

    def close(self) -> None:
        """The run is over, well or not."""
