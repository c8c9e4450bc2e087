"""Where the taps of models that a stage does not train come from: one interface, and the forward behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from gkd_dsl.graph.plan import ForwardPlan
from gkd_dsl.runtime import rows
from gkd_dsl.runtime.models.interventions import Edits
from gkd_dsl.runtime.models.tapper import Tapper


class TeacherSource(Protocol):
    """Gives the taps of a forward. Every source gives the same tensors, to rounding."""

    def taps(
        self, forward: ForwardPlan, inputs: Mapping[str, Tensor], env: Mapping[str, Tensor], changes: Edits
    ) -> dict[str, Tensor]:
        """The taps of one forward, by their keys; `env` holds what stands in for its inputs.

        Raises RunError from a source that cannot make the changes.
        """

    def blocks(self, model: str, layers: Sequence[int]) -> Sequence[nn.Module]:
        """Blocks of a model, to run in another's place. Raises RunError from a source that cannot lend them."""


def run_taps(
    tapper: Tapper,
    forward: ForwardPlan,
    inputs: Mapping[str, Tensor],
    env: Mapping[str, Tensor],
    changes: Edits | None = None,
) -> dict[str, Tensor]:
    """One forward by a tapper: its taps, by their keys; under no_grad unless the plan wants its gradient.

    `env` holds the tensors that the forward takes in place of columns of the batch.
    """
    if forward.shift:
        inputs = shifted(inputs, forward.shift)
    inputs = {**inputs, **{column: env[key] for column, key in forward.inputs}}
    context: AbstractContextManager[None] = nullcontext() if forward.grad else torch.no_grad()
    with context:
        paths = tuple(dict.fromkeys(tap.path for tap in forward.taps))
        values = tapper.run(inputs, paths, forward.stop_after, changes)
    return {tap.key: values[tap.path] for tap in forward.taps}


def shifted(inputs: Mapping[str, Tensor], shift: int) -> dict[str, Tensor]:
    """All that a model may read of a text, its token types and positions too, of the sample `shift` rows on."""
    return {column: rows.own(rows.whole(value).roll(-shift, 0)) for column, value in inputs.items()}
