"""A run folder opened again: its metrics, its models."""

from __future__ import annotations

from pathlib import Path

from gkd_dsl.meaning.check import Checked
from gkd_dsl.runtime.backends.base import Settings
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.checkpoint import Position
from gkd_dsl.runtime.errors import CANNOT_RUN, CHECKPOINT, RunError
from gkd_dsl.runtime.evaluate import Evaluator
from gkd_dsl.runtime.export import ExportError, refuse_foreign
from gkd_dsl.runtime.loop import length_of
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.session import export_model, plan_of, students
from gkd_dsl.runtime.stages import Run
from gkd_dsl.schedules import Clock

_NAMES = ("last", "best")


def _open(checked: Checked, folder: Path, checkpoint: str) -> tuple[Run, Position]:
    if checkpoint not in _NAMES:
        raise RunError(CHECKPOINT, f"there is no checkpoint `{checkpoint}`", "it is `last` or `best`")
    # A checkpoint is the same from every backend, and one process is enough to read it.
    plan = plan_of(checked)
    backend = LocalBackend(Settings.of(plan.runtime))
    run = Run(plan, folder=RunFolder.open(folder), root=checked.root, backend=backend)
    return run, run.restore(checkpoint)


def evaluate_run(checked: Checked, folder: Path, checkpoint: str = "last") -> dict[str, dict[str, float]]:
    """The metrics of every stage over its held-out set, with the models of a checkpoint: by stage and name.

    Raises RunError, DataError and SpecError.
    """
    run, position = _open(checked, folder, checkpoint)
    found: dict[str, dict[str, float]] = {}
    for plan in run.plan.stages:
        names = tuple(item.metric.name for item in plan.metrics)
        if not names:
            continue
        loader = run.loader(plan)
        made = run.placed(plan)
        run.make_projections(plan)
        run.make_policies(plan)
        total = length_of(plan.stage, loader).total_steps
        per_epoch = float(loader.steps_per_epoch(plan.stage.accumulate))
        counters = tuple(position.counters.items()) if position.stage == plan.name else ()
        clock = Clock(total, total, per_epoch, counters=counters, seed=plan.stage.seed)
        evaluator = Evaluator(made.plan, made.models, run.projections, run.policies, made.sources)
        with run.enough(f"evaluate stage `{plan.name}`", plan):
            found[plan.name] = dict(evaluator(names, made.loader.held_out(), run.backend, clock))
    if not found:
        hint = "declare one by `metric acc = accuracy(...)`, and write `evaluate acc every 1 epoch` in the stage"
        raise RunError(CANNOT_RUN, "no stage of this spec evaluates a metric", hint)
    return found


def export_run(checked: Checked, folder: Path, checkpoint: str, to: Path, model: str | None) -> tuple[Path, str]:
    """Write a model of a run: its folder and its name in the spec. Raises RunError, ExportError and SpecError."""
    refuse_foreign(to)
    if model is not None and checked.models[model].info.quantised is not None:
        hint = f"it is as it was before the run: load it from {checked.models[model].info.location}"
        raise ExportError(f"`{model}` is quantised, and packed weights are not written", hint)
    run, _ = _open(checked, folder, checkpoint)
    name = model or next(iter(students(run.plan)), None)
    if name is None:
        raise RunError(CANNOT_RUN, "this spec trains no model", "name one: `--model s`")
    with run.enough(f"export `{name}`"):
        return export_model(checked, run.plan, run, name, to), name
