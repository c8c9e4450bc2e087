"""The Python API: a spec as an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd_dsl.diagnostics import Diagnostics, SpecError
from gkd_dsl.meaning.check import Checked, check_path, check_text
from gkd_dsl.meaning.resolved import literal, resolved_text

if TYPE_CHECKING:
    import networkx as nx

    from gkd_dsl.graph.plan import SpecPlan
    from gkd_dsl.runtime.distiller import Distiller, Model, Projections
    from gkd_dsl.runtime.records import Listener
    from gkd_dsl.runtime.session import Outcome


class Spec:
    """A distillation spec: its text, its parameters, and what it means.

    Nothing is read before it is asked for, and no weight is loaded before `run` or `compile`.
    """

    def __init__(
        self,
        text: str,
        *,
        name: str = "<text>",
        path: Path | None = None,
        root: Path | None = None,
        params: Mapping[str, object] | None = None,
        offline: bool = True,
        trust: bool = False,
    ) -> None:
        self.text, self.name, self.path = text, name, path
        self.root = root if root is not None else (path.resolve().parent if path is not None else Path.cwd())
        self.params = {
            key: value if isinstance(value, str) else literal(value) for key, value in (params or {}).items()
        }
        self.offline, self.trust = offline, trust

    @cached_property
    def checked(self) -> Checked:
        """The result of the check, made once."""
        options: dict[str, Any] = {"params": self.params, "offline": self.offline, "trust": self.trust}
        if self.path is not None:
            return check_path(self.path, **options)
        return check_text(self.text, self.name, root=self.root, **options)

    def check(self) -> Diagnostics:
        """What is wrong or doubtful. `ok` of the result says whether the spec can be compiled."""
        return self.checked.diagnostics

    @property
    def graph(self) -> nx.MultiDiGraph:
        """The typed graph. Raises SpecError where the spec has errors."""
        return self._sound().graph

    def plan(self, *, optimise: bool = True) -> SpecPlan:
        """What each stage runs, compiled from the graph. Raises SpecError."""
        from gkd_dsl.graph.passes import compile_plan

        found = self._sound()
        return compile_plan(found.graph, optimise=optimise, runtime=found.runtime)

    def resolved(self) -> str:
        """The text with every value in place, and where each came from. Raises SpecError."""
        return resolved_text(self._sound())

    def run(
        self,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        listeners: Sequence[Listener] = (),
        measure: bool = True,
    ) -> Outcome:
        """Run all stages and export the student; `runs/<name>/` unless `out` says where.

        Raises SpecError, RunError (with its code and hint), DataError, and Stopped when asked to stop.
        """
        from gkd_dsl.runtime.session import run_spec

        return run_spec(
            self._sound(),
            name=Path(self.name).stem if self.path is None else self.path.stem,
            params=self.params,
            out=Path(out) if out is not None else None,
            resume=resume,
            listeners=listeners,
            measure=measure,
        )

    def compile(
        self,
        stage: str | None = None,
        *,
        projections: Projections | None = None,
        **models: Model,
    ) -> Distiller:
        """The objective of a stage (the first unless named) as a function of a batch.

        `models` are the models by their names in the spec, with their weights:
        `distiller = spec.compile(t=teacher, s=student)`, then `loss = distiller(batch)`.
        Raises SpecError, KeyError for a stage or model that is missing.
        """
        from gkd_dsl.runtime.distiller import Distiller
        from gkd_dsl.runtime.session import plan_of

        plan = plan_of(self._sound())
        names = [found.name for found in plan.stages]
        if stage is not None and stage not in names:
            raise KeyError(f"the spec has no stage {stage!r}; its stages: {', '.join(names)}")
        return Distiller(
            plan.stages[names.index(stage) if stage is not None else 0], models, projections, root=self.root
        )

    def _sound(self) -> Checked:
        if not self.checked.ok:
            raise SpecError(self.checked.diagnostics)
        return self.checked

    def __repr__(self) -> str:
        return f"Spec({self.name!r})"


def load(
    path: str | Path, *, params: Mapping[str, object] | None = None, offline: bool = True, trust: bool = False
) -> Spec:
    """A spec from a file. `params` set declared parameters, as `--set` does.

    With `offline=False`, configs that are not in the local hub cache are fetched; with `trust`, the Python files
    that the spec imports are run while it is checked. Raises OSError where the file cannot be read.
    """
    path = Path(path)
    text = path.read_bytes().decode("utf-8-sig")
    return Spec(text, name=str(path), path=path, params=params, offline=offline, trust=trust)


def loads(
    text: str,
    *,
    name: str = "<text>",
    root: str | Path | None = None,
    params: Mapping[str, object] | None = None,
    offline: bool = True,
) -> Spec:
    """A spec from a text; relative paths in it start at `root`, else at the current folder."""
    return Spec(text, name=name, root=Path(root) if root is not None else None, params=params, offline=offline)
