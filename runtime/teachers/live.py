"""Models in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.graph.plan import ForwardPlan
from gkd_dsl.runtime.models.interventions import Edits
from gkd_dsl.runtime.models.tapper import Tapper
from gkd_dsl.runtime.teachers.base import run_taps


class LiveTeachers:
    """Models in memory, in eval mode. Their weights may be the targets of no gradient; it may flow through them."""

    def __init__(self, nodes: Iterable[ModelNode], models: Mapping[str, PreTrainedModel]) -> None:
        self.models = {node.name: models[node.name] for node in nodes}
        self._tappers = {node.name: Tapper(models[node.name], node.info) for node in nodes}

    def taps(
        self, forward: ForwardPlan, inputs: Mapping[str, Tensor], env: Mapping[str, Tensor], changes: Edits
    ) -> dict[str, Tensor]:
        """The taps of one forward, by their keys; `env` holds what stands in for its inputs."""
        model = self.models[forward.model]
        if model.training:
            model.eval()
        return run_taps(self._tappers[forward.model], forward, inputs, env, changes)

    def blocks(self, model: str, layers: Sequence[int]) -> Sequence[nn.Module]:
        """Blocks of a model, to run in another's place."""
        return self._tappers[model].blocks(layers)

    def head(self, model: str, module: str) -> nn.Module | None:
        """A module of a model by its name; None where it has none."""
        return dict(self.models[model].named_modules()).get(module)
