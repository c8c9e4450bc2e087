"""A whole run: from a checked spec to a run folder, an exported student, and a comparison with its teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from gkd_dsl.diagnostics import Diagnostics, SpecError
from gkd_dsl.diagnostics.render import render_json
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.plan import Apply, SpecPlan, StagePlan
from gkd_dsl.meaning.check import Checked
from gkd_dsl.meaning.resolved import resolved_text
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.resolve import canonical
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.backends.make import make_backend
from gkd_dsl.runtime.compare import Comparison, compare
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.export import export
from gkd_dsl.runtime.logs import evaluations
from gkd_dsl.runtime.loop import Loader
from gkd_dsl.runtime.models import adapters
from gkd_dsl.runtime.models.load import load_tokenizer
from gkd_dsl.runtime.models.vocabulary import expanded, saved_map
from gkd_dsl.runtime.records import Listener
from gkd_dsl.runtime.run_folder import RunFolder, is_named
from gkd_dsl.runtime.stages import Run, RunResult

_SENTENCES = 128
_ABOUT = "run.json"


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: its folder, the exported students, metrics by stage, teacher beside student."""

    folder: Path
    exports: Mapping[str, Path]
    metrics: Mapping[str, Mapping[str, float]]
    before: Mapping[str, Mapping[str, float]]
    comparison: Comparison | None = None
    result: RunResult | None = field(default=None, repr=False)


def plan_of(checked: Checked) -> SpecPlan:
    """The plan of a spec that can run.

    Raises SpecError: it does not check, a parameter has no value, or it asks for what this version does not run; and
    RunError: a file of methods alone.
    """
    problems = Diagnostics(list(checked.diagnostics.errors))
    for diagnostic in checked.later:
        problems.error(
            diagnostic.code,
            diagnostic.message,
            diagnostic.span,
            "not in this version",
            labels=diagnostic.labels[1:],
            notes=diagnostic.notes,
        )
    for name, span in checked.unset.items():
        problems.error("E0420", f"the parameter `{name}` has no value", span, f"run with `--set {name}=...`")
    if not problems.ok:
        raise SpecError(problems)
    if not checked.stages:
        message = f"{checked.file.source.name} holds methods only, and a run is of a spec's stages"
        raise RunError(CANNOT_RUN, message, "`gkd init --method NAME --teacher PLACE` writes a spec that uses a method")
    return compile_plan(checked.graph, runtime=checked.runtime)


def run_spec(
    checked: Checked,
    *,
    name: str,
    params: Mapping[str, str] | None = None,
    out: Path | None = None,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    measure: bool = True,
) -> Outcome:
    """Run a checked spec, export its students and measure them beside their teacher.

    `name` names the run folder below `runs/` unless `out` is given. With `resume` the newest folder of that name
    (or `out`) is gone on with. Raises SpecError (see `plan_of`), RunError and ExportError, and Stopped on a request
    to stop.
    """
    plan = plan_of(checked)
    backend = make_backend(plan)
    processes = backend.processes
    if resume:
        # One process finds the newest folder: another may see a newer one.
        folder = RunFolder.open(processes.told(out if out is not None else newest(name)))
    elif not processes.main:
        folder = RunFolder(processes.told(Path()))
    else:
        folder = RunFolder.create(name, out=out)
        folder.write_spec(resolved_text(checked))
        folder.write_diagnostics(json.loads(render_json(checked.diagnostics)))
        folder.write_json(
            _ABOUT,
            {
                "spec": str(checked.file.source.path or checked.file.source.name),
                "path": str(path.resolve()) if (path := checked.file.source.path) is not None else None,
                "params": dict(params or {}),
                "gkd_dsl": version("gkd-dsl"),
            },
        )
        processes.told(folder.path)
    run = Run(plan, folder=folder, root=checked.root, listeners=listeners if processes.main else (), backend=backend)
    result = run.run(resume=resume)
    if not processes.main:
        return Outcome(folder.path, {}, result.metrics, {}, None, result)
    return finish(checked, plan, folder, run, result, measure=measure)


def finish(
    checked: Checked, plan: SpecPlan, folder: RunFolder, run: Run, result: RunResult, *, measure: bool = True
) -> Outcome:
    """Export the students of a finished run, and compare."""
    before: dict[str, dict[str, float]] = {}
    for record in evaluations(folder):
        if record.step == 0:
            before.setdefault(record.stage, {}).update(record.metrics)
    last = plan.stages[-1]
    loader = run.loader(last)
    exports: dict[str, Path] = {}
    names = students(plan)
    after = result.metrics.get(last.name, {})
    for name in names:
        target = folder.export if len(names) == 1 else folder.export / name
        with run.enough(f"export `{name}`", more="the run is done and saved: `gkd export` writes the model"):
            exports[name] = export_model(
                checked, plan, run, name, target, metrics=_pairs(before.get(last.name, {}), after)
            )
    comparison = None
    # A teacher whose outputs were stored is not here to be timed.
    there = [node.name for node in last.models if node.role == "teacher" and node.name in result.models]
    teacher = there[0] if there else None
    # Of several students it is the one of the last stage that the held-out rows are for.
    names.sort(key=lambda name: all(node.name != name for node in last.models))
    # Where a teacher is what was trained there is nothing beside it.
    held_out = _some(loader) if measure and teacher is not None and names and names[0] != teacher else []
    if teacher is not None and held_out:
        # An adapter is timed as it is exported.
        told = run.enough(f"time `{teacher}` beside `{names[0]}`", more="the run is done, and its student exported")
        plain = (result.models[n] for n in (teacher, names[0]) if not _alone(checked.models[n].info))
        with told, adapters.merged(*plain):
            comparison = compare(
                {teacher: result.models[teacher], names[0]: result.models[names[0]]},
                held_out,
                metrics=_shown(before.get(last.name, {}), after),
                folders=_folders(plan, teacher, names[0], exports),
            )
        folder.write_json("comparison.json", comparison.to_json())
    return Outcome(folder.path, exports, result.metrics, before, comparison, result)


def students(plan: SpecPlan) -> list[str]:
    """What a run exports: the trained students, else what the last stage trains."""
    roles = {node.name: node.role for stage in plan.stages for node in stage.models}
    trained = dict.fromkeys(
        target.name for stage in plan.stages for target in stage.stage.trains if target.kind == "model"
    )
    found = [name for name in trained if roles.get(name) == "student"]
    last = [target.name for target in plan.stages[-1].stage.trains if target.kind == "model"]
    return found or list(dict.fromkeys(last))


def export_model(
    checked: Checked,
    plan: SpecPlan,
    run: Run,
    name: str,
    target: Path,
    *,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write one model of a run with its tokenizer and a model card. Raises ExportError."""
    last = plan.stages[-1]
    info = checked.models[name].info
    loader = run.loader(last)
    roles = {node.name: node for stage in plan.stages for node in stage.models}
    model = run.whole(name)
    kept = info.kept
    return export(
        # The rows of ids that were dropped are repeated, so that the folder goes with its tokenizer.
        expanded(model),
        load_tokenizer(info),
        target,
        spec_text=resolved_text(checked),
        card={
            "name": Path(checked.file.source.name).stem,
            "spec": Path(checked.file.source.name).name,
            "teachers": [node.info.location for node in roles.values() if node.role == "teacher"],
            "student": info.location,
            "data": list(dict.fromkeys(s.stage.source.kind for s in plan.stages if s.stage.source is not None)),
            "metrics": dict(metrics or {}),
            "adapter": adapters.in_words(info),
            "vocabulary": f"{kept.count:,} of {kept.full:,} ids kept; the others repeat their rows" if kept else None,
            "version": version("gkd-dsl"),
            "date": date.today().isoformat(),
        },
        label_names=getattr(loader, "label_names", ()) if info.task == "classification" else (),
        pooling=_pooling(last, name),
        max_length=last.stage.max_length,
        vocabulary=saved_map(model),
        adapter=info if _alone(info) else None,
    )


def newest(name: str, root: Path = Path("runs")) -> Path:
    """The newest run folder of a spec. Raises RunError where there is none."""
    found = [path for path in root.glob("*") if path.is_dir() and is_named(path, name) and not _of_another(path, name)]
    if not found:
        raise RunError(CANNOT_RUN, f"there is no run of {name} below {root}/", "start one without `--resume`")
    return max(found, key=lambda path: path.stat().st_mtime)


def _of_another(folder: Path, name: str) -> bool:
    """Whether a folder is called so for another spec: `a-2` is the second run of `a`, or the first of `a-2`."""
    try:
        own = Path(about(folder)["spec"]).stem
    except RunError:
        return False
    return own != name and is_named(folder, own)


def about(folder: Path) -> dict[str, Any]:
    """What a run folder says of its spec: its path and parameters. Raises RunError."""
    try:
        found: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        spec, params = Path(found["spec"]), dict(found["params"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(CANNOT_RUN, f"{folder} is not a run folder", f"it has no readable {_ABOUT}") from error
    # A run may be looked at from elsewhere than it was started from, where another spec may have this name.
    own = Path(str(found.get("path") or spec))
    here = spec.is_file() and (not own.is_file() or spec.samefile(own))
    written = str(spec if here else own)
    return found | {"spec": written, "params": params}


def _alone(info: ModelInfo) -> bool:
    """Whether a model is exported as an adapter for saved weights."""
    return info.build.lora is not None and info.build.lora.export == "adapter"


def _pooling(stage: StagePlan, name: str) -> Literal["mean", "cls", "last"] | None:
    """How the objective made one vector of a text, where it did so from the student's last hidden state."""
    info = next((node.info for node in stage.models if node.name == name), None)
    if info is None:
        return None
    last = canonical(info, TapPath("final"))
    final = {tap.key for forward in stage.forwards if forward.model == name for tap in forward.taps if tap.path == last}
    for step in stage.program:
        if isinstance(step, Apply) and step.op in ("pool", "cls") and dict(step.inputs).get("x") in final:
            if step.op == "pool":
                return "mean"
            return "last" if dict(step.attrs).get("last") else "cls"
    return None


def _pairs(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    return {name: {"before": before.get(name), "after": value} for name, value in after.items()}


def _shown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, tuple[float | None, float | None]]:
    return {name: (before.get(name), value) for name, value in after.items()}


def _some(loader: Loader) -> list[dict[str, Any]]:
    """A few held-out batches, enough to time a model on."""
    found: list[dict[str, Any]] = []
    for batch in loader.held_out():
        found.append(batch)
        if sum(len(each["input_ids"]) for each in found) >= _SENTENCES:
            break
    return found


def _folders(plan: SpecPlan, teacher: str, student: str, exports: Mapping[str, Path]) -> dict[str, str | Path]:
    """Where the weights of both are on the disk."""
    infos = {node.name: node.info for stage in plan.stages for node in stage.models}
    trained = {target.name for stage in plan.stages for target in stage.stage.trains if target.kind == "model"}
    # An adapter alone is not all that its model takes on the disk.
    found: dict[str, str | Path] = {} if _alone(infos[student]) else {student: exports[student]}
    path = infos[teacher].path
    if path is not None and teacher not in trained and infos[teacher].build.kind == "hf":
        found[teacher] = path
    return found
