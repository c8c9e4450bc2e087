"""Operators and sources written in Python: their files are run, and their functions put where the runtime looks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gkd_dsl import extension
from gkd_dsl.graph.plan import Apply, SpecPlan, StagePlan
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.ops.registry import function


def load_extensions(plan: SpecPlan | StagePlan, root: Path) -> None:
    """Run the files that the plan's operators (`ops.py:gram2`) and sources come from; each runs once.

    `root` is the folder that their paths start from. Raises RunError: no such file or function, or it fails.
    """
    stages = plan.stages if isinstance(plan, SpecPlan) else (plan,)
    for name in dict.fromkeys(name for stage in stages for name in _operators(stage)):
        function(name, replace=True)(_load("op", name, root).function)
    for stage in stages:
        if stage.stage.source is not None and ":" in stage.stage.source.kind:
            _load("source", stage.stage.source.kind, root)


def _operators(plan: StagePlan) -> Iterator[str]:
    programs = (plan.valid_program, plan.program, *(item.program for item in plan.metrics))
    for program in programs:
        for step in program:
            if isinstance(step, Apply) and ":" in step.op:
                yield step.op


def _load(kind: extension.Kind, name: str, root: Path) -> extension.Registered:
    path, _, last = name.rpartition(":")
    try:
        found = extension.load(path, root)
    except extension.ExtensionError as error:
        raise RunError(CANNOT_RUN, f"the {kind} `{name}` cannot be used: {error}", error.hint or "") from error
    if (kind, last) not in found:
        raise RunError(CANNOT_RUN, f"{path} has no {kind} `{last}`", "check the spec again: the file has changed")
    return found[kind, last]
