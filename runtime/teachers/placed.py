"""Models that live in different places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from gkd_dsl.graph.plan import ForwardPlan
from gkd_dsl.runtime.models.interventions import Edits
from gkd_dsl.runtime.teachers.base import TeacherSource
from gkd_dsl.runtime.teachers.cached import CachedTeachers, FillingTeachers


class PlacedTeachers:
    """Hands each forward to the source of its model; `sources` are by model."""

    def __init__(self, sources: Mapping[str, TeacherSource]) -> None:
        self.sources = dict(sources)
        self.stored = frozenset(n for n, s in sources.items() if isinstance(s, CachedTeachers | FillingTeachers))

    def taps(
        self, forward: ForwardPlan, inputs: Mapping[str, Tensor], env: Mapping[str, Tensor], changes: Edits
    ) -> dict[str, Tensor]:
        """The taps of one forward, by their keys; `env` holds what stands in for its inputs."""
        return self.sources[forward.model].taps(forward, inputs, env, changes)

    def blocks(self, model: str, layers: Sequence[int]) -> Sequence[nn.Module]:
        """Blocks of a model, to run in another's place."""
        return self.sources[model].blocks(model, layers)

    def head(self, model: str, module: str) -> nn.Module | None:
        """A module of a model by its name, where its source has it in memory."""
        find = getattr(self.sources[model], "head", None)
        return find(model, module) if find is not None else None
