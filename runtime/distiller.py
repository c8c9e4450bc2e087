"""The compiled step for people with a training loop of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.graph.plan import StagePlan
from gkd_dsl.runtime.counters import Counters
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.extensions import load_extensions
from gkd_dsl.runtime.policy import make_policies
from gkd_dsl.runtime.step import Batch, StepModule
from gkd_dsl.schedules import Clock

Model = PreTrainedModel
Projections = Mapping[str, nn.Module]


class Distiller:
    """A stage's objective as a function of a batch.

    ```python
    distiller = Distiller(plan, {"t": teacher, "s": student})
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=5e-5)
    for step, batch in enumerate(batches):
        distiller.step_to(step, len(batches))
        distiller(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    ```

    `models` are the models of the stage by their names in the spec, on one device. The trained ones are put in train
    mode, the others in eval mode; what the stage does not train has `requires_grad` False until `close`, which the
    end of a `with` block calls. Policies have optimisers of their own: `step_to` ends the step before, and hands them
    the reward of all its batches; `counters` advance then too, and begin anew at step 0. `projections` (by name) are
    made unless given. `root` is the folder that paths of the user's own operators start from.

    Raises KeyError for a model of the stage that is missing.
    """

    def __init__(
        self,
        plan: StagePlan,
        models: Mapping[str, Model],
        projections: Projections | None = None,
        *,
        root: Path | None = None,
    ) -> None:
        missing = [node.name for node in plan.models if node.name not in models]
        if missing:
            raise KeyError(f"the stage `{plan.name}` needs the model `{missing[0]}`")
        load_extensions(plan, root if root is not None else Path.cwd())
        self.plan = plan
        first = next(iter(models.values()))
        self.policies = make_policies(plan.policies, first.device, plan.stage.seed)
        self.module = StepModule(plan, models, projections, policies=self.policies)
        for block in self.module.projections.values():
            block.to(device=first.device)
        self.module.train()
        self._clock = Clock(0, 1, 1.0, seed=plan.stage.seed)
        self._clock_is_new = True
        self._watched: dict[str, float] | None = None
        self.counters = Counters(plan.counters)
        self._terms: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def __call__(self, batch: Batch, denominators: Mapping[str, int] | None = None) -> Tensor:
        """The objective on a batch of tensors on the models' device: a scalar with its gradient.

        When gradients are accumulated over micro-batches, give each the `denominators` of all of them.

        Raises RunError: a column is missing, or (first batch) a tensor is not of the shape that the plan says; the
        stage has a policy, and `step_to` was not called.
        """
        if self.plan.policies and self._clock_is_new and torch.is_grad_enabled():
            name = self.plan.policies[0].node.name
            hint = "call `step_to(step, total)` before the batches of each step"
            raise RunError(CANNOT_RUN, f"the policy `{name}` learns where a step ends, and no step was begun", hint)
        counts = denominators if denominators is not None else self.denominators([batch])
        out = self.module(batch, self.counters.on(self._clock), counts)
        self._terms, self._weights = out.terms, out.weights
        if torch.is_grad_enabled():
            self._clock = replace(self._clock, micro=self._clock.micro + 1)
        if (self.plan.policies or self.plan.counters) and torch.is_grad_enabled():
            seen = self._watched or {}
            self._watched = {name: seen.get(name, 0.0) + float(value) for name, value in out.watched.items()}
        return out.loss

    @property
    def terms(self) -> dict[str, Tensor]:
        """Each loss of the latest call before its weight, detached."""
        return self._terms

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss in the latest call."""
        return self._weights

    @property
    def projections(self) -> dict[str, nn.Module]:
        """The projections by name; they train, and are no part of the student."""
        return self.module.projections

    def denominators(self, batches: Sequence[Batch]) -> dict[str, int]:
        """How many positions of each loss count in all these micro-batches."""
        return self.module.denominators(batches, self.counters.on(self._clock))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains, by name."""
        yield from self.module.trainable()

    def parameters(self) -> Iterator[nn.Parameter]:
        """What trains: the student (or the parts that the stage names) and the projections."""
        for _, parameter in self.named_parameters():
            yield parameter

    def step_to(self, step: int, total: int, *, steps_per_epoch: float | None = None, tokens: int = 0) -> None:
        """Set the clock of the schedules: `step` optimiser steps of `total` are done.

        `steps_per_epoch` matters to durations in epochs (one epoch unless given), `tokens` to those in tokens.
        """
        seen, before = self._watched, self._clock
        self._clock_is_new = False
        if seen is not None:
            self.module.policies.learn(seen, before)
            self._watched = None
        per_epoch = steps_per_epoch if steps_per_epoch is not None else float(total)
        self._clock = Clock(step, total, per_epoch, tokens, seed=self.plan.stage.seed)
        if step == 0:
            self.counters.reset()
        elif seen is not None:
            self.counters.advance(seen, self._clock)

    def close(self) -> None:
        """Give every parameter the `requires_grad` that it had before."""
        self.module.release()

    def __enter__(self) -> Distiller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
