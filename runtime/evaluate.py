"""Metrics of a stage over its held-out set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.graph.nodes import ReplaceBlock
from gkd_dsl.graph.plan import ForwardPlan, MetricPlan, StagePlan
from gkd_dsl.models.resolve import last_needed
from gkd_dsl.runtime import metrics
from gkd_dsl.runtime.models.interventions import at_clock, edits
from gkd_dsl.runtime.models.tapper import Tapper
from gkd_dsl.runtime.policy import Policies, Policy
from gkd_dsl.runtime.program import Env, Program, batch_keys, plain
from gkd_dsl.runtime.step import Batch
from gkd_dsl.runtime.teachers.base import TeacherSource, run_taps
from gkd_dsl.schedules import Clock


class Place(Protocol):
    """What an evaluation needs of a backend."""

    def move(self, batch: Batch) -> dict[str, Tensor]:
        """A batch on the device."""

    def infer(self, function: Callable[[], None]) -> None:
        """Run a function that reads the parameters of models."""


class Evaluator:
    """Computes metrics: every model in eval mode, no gradient, one forward a model and batch for all of them.

    `teachers` gives the taps of models that are not in memory, by model.
    """

    def __init__(
        self,
        plan: StagePlan,
        models: Mapping[str, PreTrainedModel],
        projections: Mapping[str, nn.Module],
        policies: Mapping[str, Policy] | None = None,
        teachers: Mapping[str, TeacherSource] | None = None,
    ) -> None:
        self._teachers = dict(teachers or {})
        self._plans = {item.metric.name: item for item in plan.metrics}
        run = [forward for item in plan.metrics for forward in item.forwards]
        lent = {c.model for forward in run for c in forward.changes if isinstance(c, ReplaceBlock)}
        used = ({forward.model for forward in run} | lent) - self._teachers.keys()
        self._models = {node.name: models[node.name] for node in plan.models if node.name in used}
        self._tappers = {node.name: Tapper(models[node.name], node.info) for node in plan.models if node.name in used}
        blocks = {node.key: projections[node.name] for node in plan.projections} | dict(projections)
        # A policy chooses here as it does in training, and learns nothing.
        chooses = {"policy": Policies(plan.policies, policies, keep=False).draw} if policies else {}
        self._programs = {
            name: Program(item.program, blocks, item.forwards, chooses) for name, item in self._plans.items()
        }
        self._valid = Program(plan.valid_program, blocks, ())

    @torch.no_grad()
    def __call__(
        self, names: Sequence[str], batches: Iterable[Batch], backend: Place, clock: Clock
    ) -> dict[str, float]:
        """The metrics of these names over all batches, in their order."""
        plans = [self._plans[name] for name in names]
        forwards = _merged(plans)
        accumulators = {item.metric.name: metrics.make(item.metric.op, _attrs(item, clock)) for item in plans}
        training = [name for name, model in self._models.items() if model.training]
        for model in self._models.values():
            model.eval()
        try:
            for number, batch in enumerate(batches):
                held = backend.move(batch)
                backend.infer(partial(self._update, plans, forwards, accumulators, held, replace(clock, micro=number)))
        finally:
            for name in training:
                self._models[name].train()
        return {name: float(accumulator.compute()) for name, accumulator in accumulators.items()}

    def _update(
        self,
        plans: Sequence[MetricPlan],
        forwards: Mapping[str, ForwardPlan],
        accumulators: Mapping[str, Any],
        batch: Batch,
        clock: Clock,
    ) -> None:
        taps: dict[str, dict[str, Tensor]] = {}

        def forward(key: str, env: Env) -> None:
            if key not in taps:
                planned = at_clock(forwards[key], clock)
                changes = edits(planned, env, self._lend)
                taps[key] = (
                    self._teachers[planned.model].taps(planned, batch, env, changes)
                    if planned.model in self._teachers
                    else run_taps(self._tappers[planned.model], planned, batch, env, changes)
                )
            env.update(taps[key])

        shared = batch_keys(batch)
        self._valid.run(shared, clock, forward)
        for item in plans:
            env = dict(shared)
            wanted = {key for _, key in item.inputs}
            self._programs[item.metric.name].run(env, clock, forward, wanted=wanted)
            accumulators[item.metric.name].update(**{slot: env[key] for slot, key in item.inputs})

    def _lend(self, model: str, layers: Sequence[int]) -> Sequence[nn.Module]:
        if model in self._teachers:
            return self._teachers[model].blocks(model, layers)
        return self._tappers[model].blocks(layers)


def _merged(plans: Sequence[MetricPlan]) -> dict[str, ForwardPlan]:
    """One forward for each key, with the taps of all metrics."""
    found: dict[str, ForwardPlan] = {}
    for item in plans:
        for forward in item.forwards:
            before = found.get(forward.key)
            taps = tuple(dict.fromkeys((*(before.taps if before else ()), *forward.taps)))
            whole = forward.stop_after is None or (before is not None and before.stop_after is None)
            stop = None if whole else last_needed(tap.path for tap in taps)
            found[forward.key] = replace(forward, grad=False, taps=taps, stop_after=stop)
    return found


def _attrs(item: MetricPlan, clock: Clock) -> dict[str, Any]:
    return {name: plain(value, clock) for name, value in item.metric.attrs}
