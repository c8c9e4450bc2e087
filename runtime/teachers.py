"""Where the taps of models that a stage does not train come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.graph.plan import ForwardPlan
from gkd_dsl.runtime.models.tapper import Tapper


class TeacherSource(Protocol):
    """Gives the taps of a forward. Every source gives the same tensors, to rounding."""

    def taps(self, forward: ForwardPlan, inputs: Mapping[str, Tensor], env: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The taps of one forward, by their keys; `env` holds what stands in for its inputs."""


def run_taps(
    tapper: Tapper, forward: ForwardPlan, inputs: Mapping[str, Tensor], env: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One forward by a tapper: its taps, by their keys; under no_grad unless the plan wants its gradient.

    `env` holds the tensors that the forward takes in place of columns of the batch.
    """
    inputs = {**inputs, **{column: env[key] for column, key in forward.inputs}}
    context: AbstractContextManager[None] = nullcontext() if forward.grad else torch.no_grad()
    with context:
        values = tapper.run(inputs, tuple(dict.fromkeys(tap.path for tap in forward.taps)), forward.stop_after)
    return {tap.key: values[tap.path] for tap in forward.taps}


class LiveTeachers:
    """Models in memory, in eval mode. Their weights may be the targets of no gradient; it may flow through them."""

    def __init__(self, nodes: Iterable[ModelNode], models: Mapping[str, PreTrainedModel]) -> None:
        self.models = {node.name: models[node.name] for node in nodes}
        self._tappers = {node.name: Tapper(models[node.name], node.info) for node in nodes}

    def taps(self, forward: ForwardPlan, inputs: Mapping[str, Tensor], env: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The taps of one forward, by their keys; `env` holds what stands in for its inputs."""
        model = self.models[forward.model]
        if model.training:
            model.eval()
        return run_taps(self._tappers[forward.model], forward, inputs, env)
