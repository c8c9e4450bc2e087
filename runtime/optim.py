"""Optimisers from their specs, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gkd_dsl.graph.nodes import OptimSpec
from gkd_dsl.schedules import Span


def make_optimizer(spec: OptimSpec, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW or SGD over named parameters, in two groups: weight decay, and none for biases and norms.

    A bias or a norm's scale is a parameter of fewer than two axes. The rate is set before each step.
    """
    groups = groups_of(spec, parameters)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)


def groups_of(spec: OptimSpec, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """The two groups of an optimiser: what decays, and biases and the scales of norms."""
    named = list(parameters)
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class LearningRate:
    """The rate at each step of a stage: a linear warm-up from 0, then the decay.

    `linear` and `cosine` fall to 0 at the end of the stage. `tokens_per_step` turns a warm-up in tokens into steps.
    """

    spec: OptimSpec
    total_steps: int
    steps_per_epoch: float
    tokens_per_step: float = 0.0

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return min(
            self.total_steps, span_steps(self.spec.warmup, self.total_steps, self.steps_per_epoch, self.tokens_per_step)
        )

    def at(self, step: int) -> float:
        """The rate of the step that follows `step` finished ones."""
        warm = self.warmup_steps
        if step < warm:
            return self.spec.lr * step / warm
        if self.spec.decay == "constant":
            return self.spec.lr
        passed = min(1.0, (step - warm) / max(1, self.total_steps - warm))
        if self.spec.decay == "linear":
            return self.spec.lr * (1.0 - passed)
        return self.spec.lr * 0.5 * (1.0 + math.cos(math.pi * passed))


def span_steps(span: Span, total_steps: int, steps_per_epoch: float, tokens_per_step: float) -> int:
    """A duration in whole steps, rounded up. Tokens are turned by the mean tokens of a step."""
    if span.unit == "steps":
        steps = span.amount
    elif span.unit == "epochs":
        steps = span.amount * steps_per_epoch
    elif span.unit == "percent":
        steps = span.amount / 100.0 * total_steps
    else:
        steps = span.amount / tokens_per_step if tokens_per_step else 0.0
    # 0.06 * 100 is a little above 6: rounding up must not make it 7.
    return max(0, math.ceil(steps - 1e-9))
