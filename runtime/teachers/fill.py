"""`gkd cache`: run each stored teacher once over the rows of its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.graph.plan import SpecPlan, StagePlan
from gkd_dsl.graph.stored import forwards_of, refusals
from gkd_dsl.runtime.backends.base import Settings
from gkd_dsl.runtime.backends.local import device_of
from gkd_dsl.runtime.data.loader import Loader
from gkd_dsl.runtime.errors import CACHE, CANNOT_RUN, RunError, Stopped
from gkd_dsl.runtime.interrupt import StopRequest
from gkd_dsl.runtime.models.halved import untrained
from gkd_dsl.runtime.stages import Run, student_of
from gkd_dsl.runtime.teachers.cached import FillingTeachers
from gkd_dsl.runtime.teachers.identity import about, identity, runs, stored_identity
from gkd_dsl.runtime.teachers.make import Placement, layout_of, placements, rows_of, stage_folder
from gkd_dsl.runtime.teachers.room import place_for
from gkd_dsl.runtime.teachers.store import SHARD_BYTES, Store

Told = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Filled:
    """What one folder holds now."""

    model: str
    stage: str
    folder: Path
    rows: int
    bytes: int
    new: int


def fill(
    plan: SpecPlan,
    *,
    root: Path,
    out: Path | None = None,
    top_k: int | None = None,
    resume: bool = False,
    shard_bytes: int = SHARD_BYTES,
    tell: Told | None = None,
) -> list[Filled]:
    """Store the outputs of the teachers that are placed as cached or, where none is, of all that no stage trains.

    The first kind go to the folders that the runtime block names, the others to `out`/NAME. `top_k` stands in for the
    setting. `tell` hears of model, stage, rows done and rows in all.

    Raises RunError: outputs that cannot be stored, a folder that is taken (unless `resume`) or of something else, a
    disk that is full; and Stopped on a request to stop, when what was run is stored.
    """
    gone = [node.name for stage in plan.stages for node in stage.models if node.info.build.stored is not None]
    placed = {name: how for name, how in placements(plan.runtime).items() if name not in gone}
    chosen = {name: how for name, how in placed.items() if how.place == "cached"}
    folders = {name: root / how.cache for name, how in chosen.items()}
    if not chosen:
        chosen = {name: placed.get(name, Placement()) for name in _frozen(plan)}
        folders = {name: (out or Path("cache")) / name for name in chosen}
    elif out is not None:
        raise RunError(CANNOT_RUN, "the runtime block says where stored outputs go", "leave `--out` away")
    if not chosen and gone:
        message = f"of `{gone[0]}` only stored outputs are known: there is no model to run"
        raise RunError(CANNOT_RUN, message, "store those of a spec that names the model itself")
    if not chosen:
        raise RunError(CANNOT_RUN, "this spec has no teacher whose outputs can be stored", _reasons(plan))
    if top_k is not None:
        chosen = {name: replace(how, top_k=top_k) for name, how in chosen.items()}
    run = Run(replace(plan, backend="local", runtime=_alone(plan, chosen)), root=root)
    found: list[Filled] = []
    with StopRequest() as stop:
        for name, how in chosen.items():
            for stage in plan.stages:
                if runs(stage, name):
                    folder = stage_folder(folders[name], stage)
                    found.append(_one(run, stage, name, how, folder, resume, shard_bytes, tell, stop))
            # Each alone has to fit.
            run.forget(name)
    return found


def _one(
    run: Run,
    plan: StagePlan,
    name: str,
    how: Placement,
    folder: Path,
    resume: bool,
    shard_bytes: int,
    tell: Told | None,
    stop: StopRequest,
) -> Filled:
    layout = layout_of(plan, name, how)
    if stored_identity(folder) is not None and not resume:
        raise RunError(CACHE, f"{folder} holds a stored teacher already", "go on with `--resume`, or delete the folder")
    loader = run.loader(plan)
    assert isinstance(loader, Loader)
    node = next(node for node in plan.models if node.name == name)
    fields = identity(plan, node, student_of(plan), loader, layout, run.seed(name))
    rows = fields["rows"] + fields["held_out rows"]
    store = Store(folder, fields, rows, shard_bytes=shard_bytes, about=about(node, layout), mend=resume)
    missing = np.flatnonzero(~store.has(range(store.total)))
    filling = FillingTeachers(run.alone(plan, name), store, layout)
    # Whatever a stage and its metrics read of it is of one plain forward.
    forward = forwards_of(plan, name)[0]
    done = store.total - len(missing)
    with run.enough(f"run `{name}`", plan, "lower `batch_size`, then go on with `--resume`"):
        for batch in replace(loader, numbered=True).rows(missing.tolist()):
            with torch.no_grad(), run.backend.taps_context():
                filling.fill(forward, run.backend.move(batch))
            done += len(batch["_row"])
            if tell is not None:
                tell(name, plan.name, done, store.total)
            if stop.asked and done < store.total:
                store.flush()
                raise Stopped(plan.name, done, store.total, folder)
    store.flush()
    return Filled(name, plan.name, folder, store.count, store.bytes, len(missing))


def _frozen(plan: SpecPlan) -> list[str]:
    """The models whose outputs can be stored, in the order of the spec."""
    names = dict.fromkeys(node.name for stage in plan.stages for node in stage.models)
    trained = {target.name for stage in plan.stages for target in stage.stage.trains if target.kind == "model"}
    there = {node.name for stage in plan.stages for node in stage.models if node.info.build.stored is None}
    names = {name: None for name in names if name in there}
    read = [name for name in names if name not in trained and any(runs(stage, name) for stage in plan.stages)]
    return [name for name in read if not _why(plan, name)]


def _why(plan: SpecPlan, name: str) -> str | None:
    return next(refusals(plan.stages, name, tasks=[rows_of(stage) for stage in plan.stages], top_k=0), None)


def _reasons(plan: SpecPlan) -> str:
    names = dict.fromkeys(node.name for stage in plan.stages for node in stage.models)
    return "; ".join(reason for name in names if (reason := _why(plan, name)))


def _alone(plan: SpecPlan, names: Iterable[str]) -> tuple[tuple[str, AttrValue], ...]:
    """What the forwards hang on: one process runs the models, streamed where they are too large for its device."""
    kept = tuple((name, value) for name, value in plan.runtime if name in ("precision", "device"))
    settings = Settings.of(kept)
    infos = {node.name: node.info for stage in plan.stages for node in stage.models}
    device, half = device_of(settings.device), untrained(plan, settings.precision)
    places = {name: place_for(infos[name], name in half, device) for name in names}
    return (*kept, *((f"{name}.placement", place) for name, place in places.items() if place != "resident"))
