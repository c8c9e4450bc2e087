"""Where each model of a stage lives, as the runtime block places it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_dsl.graph.nodes import AttrValue, ModelNode
from gkd_dsl.graph.passes.sparse import TopK, sparse
from gkd_dsl.graph.plan import StagePlan
from gkd_dsl.graph.stored import kept, refusals, sparse_keys, student_task, taps_of, temperatures
from gkd_dsl.models.stored import MANIFEST, stage_name
from gkd_dsl.runtime.errors import CACHE, CANNOT_RUN, RunError
from gkd_dsl.runtime.models.halved import rounded
from gkd_dsl.runtime.teachers.base import TeacherSource
from gkd_dsl.runtime.teachers.cached import CachedTeachers, FillingTeachers
from gkd_dsl.runtime.teachers.disk import on_disk
from gkd_dsl.runtime.teachers.identity import about, identity, missing, runs, stored_identity
from gkd_dsl.runtime.teachers.live import LiveTeachers
from gkd_dsl.runtime.teachers.parts import Layout
from gkd_dsl.runtime.teachers.placed import PlacedTeachers
from gkd_dsl.runtime.teachers.store import Store
from gkd_dsl.runtime.teachers.streamed import StreamedTeachers, in_host_memory

log = logging.getLogger("gkd_dsl")
_NOT_STORED = ("off", "auto")


@dataclass(frozen=True)
class Placement:
    """The settings of a model in the runtime block. `cache` is `off`, `auto` or a folder.

    Of a model in Gemini's chunks `shard_param_frac` is each process's part alone; `offload_param_frac` (all, unless
    chunks are kept whole) is in host memory.
    """

    place: str = "resident"
    cache: str = "off"
    top_k: int | None = None
    tail: str = "bucket"
    shard_param_frac: float = 1.0
    offload_param_frac: float | None = None


def placements(runtime: tuple[tuple[str, AttrValue], ...]) -> dict[str, Placement]:
    """The placements of a plan by model."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in runtime:
        model, dot, setting = name.rpartition(".")
        if dot:
            found.setdefault(model, {})["place" if setting == "placement" else setting] = value
    return {model: Placement(**settings) for model, settings in found.items()}


@dataclass(frozen=True)
class Place:
    """What a run knows that a source of taps is made from.

    model   makes a model of the spec
    reader  the model whose tokenizer reads the stage's source
    folder  the run folder, if any
    alone   whether one process makes the run
    streamed  the models of earlier stages that are streamed or in chunks, by name; added to
    half      the models that are held in half precision, with their dtype
    chunks    the settings of the runtime block
    """

    model: Callable[[str], PreTrainedModel]
    reader: ModelNode
    seeds: Mapping[str, int]
    device: torch.device
    root: Path
    folder: Path | None = None
    alone: bool = True
    streamed: dict[str, TeacherSource] = field(default_factory=dict)
    half: Mapping[str, torch.dtype] = field(default_factory=dict)
    chunks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A stage whose models have their places.

    plan      the stage's plan, with sparse logits where they are stored so
    loader    the batches, with row numbers where these are needed
    models    the models in memory, by name
    teachers  gives the taps of the models that the stage does not train
    sources   gives those of one model, where an evaluation too has them from there
    """

    plan: StagePlan
    loader: Any
    models: dict[str, PreTrainedModel]
    teachers: TeacherSource
    sources: dict[str, TeacherSource]


def make_teachers(plan: StagePlan, placed: Mapping[str, Placement], loader: Any, at: Place) -> Made:
    """The models of a stage in their places. Raises RunError: a cache that is missing or of something else."""
    trained = {target.name for target in plan.stage.trains if target.kind == "model"}
    models: dict[str, PreTrainedModel] = {}
    sources: dict[str, TeacherSource] = {}
    layouts: dict[str, Layout] = {}
    # Chunks take the weights of a model, which another that starts from them has to have by then.
    for node in sorted(plan.models, key=lambda node: placed.get(node.name, Placement()).place == "gemini"):
        how = placed.get(node.name, Placement())
        if node.name in trained or (how.place == "resident" and how.cache == "off"):
            models[node.name] = at.model(node.name)
            if how.cache == "auto":
                log.warning(
                    "`cache = auto` of `%s` in stage `%s`: it is trained; it is run each time", node.name, plan.name
                )
            if node.name not in trained:
                sources[node.name] = LiveTeachers([node], models)
        elif how.place == "cached":
            if not runs(plan, node.name):
                layout_of(plan, node.name, how)
                continue
            sources[node.name], layouts[node.name] = _cached(plan, node, how, loader, at)
        else:
            source = source_of(node, how, at, models)
            filling = _filling(plan, node, how, loader, at, source) if how.cache == "auto" else None
            if filling is not None:
                source, layouts[node.name] = filling
            sources[node.name] = source
    keys: dict[str, TopK] = {}
    for name, layout in layouts.items():
        if layout.top_k is not None:
            keys |= dict.fromkeys(sparse_keys(plan, name, layout.top_k.count), layout.top_k)
    if layouts:
        loader = replace(loader, numbered=True)
    elsewhere = {
        name: source for name, source in sources.items() if name in layouts or not isinstance(source, LiveTeachers)
    }
    return Made(sparse(plan, keys), loader, models, PlacedTeachers(sources), elsewhere)


def layout_of(plan: StagePlan, model: str, how: Placement) -> Layout:
    """What of a model a stage needs, and how its logits are stored. Raises RunError where they cannot be."""
    why = next(refusals([plan], model, tasks=[rows_of(plan)], top_k=how.top_k, tail=how.tail), None)
    if why is not None:
        raise RunError(CANNOT_RUN, f"the outputs of `{model}` cannot be stored: {why}")
    taps = taps_of(plan, model)
    logits = next((type for path, type in taps.items() if path.kind == "logits"), None)
    count = kept(logits.dims[-1].size, how.top_k) if logits is not None else None
    top_k = TopK(count, temperatures(plan, model), how.tail) if count is not None else None
    return Layout(taps, top_k)


def rows_of(plan: StagePlan) -> str:
    """What the rows of a stage are made into."""
    from gkd_dsl.sources import task_of

    head = student_task(plan)
    return task_of(dict(plan.stage.source.args), head) if plan.stage.source is not None else head


def stage_folder(folder: Path, plan: StagePlan) -> Path:
    """Where the outputs for one stage are, below the folder of a model."""
    return folder / stage_name(plan.name)


def _cached(plan: StagePlan, node: ModelNode, how: Placement, loader: Any, at: Place) -> tuple[TeacherSource, Layout]:
    if how.cache in _NOT_STORED:
        raise RunError(
            CANNOT_RUN, f"`{node.name}` is placed as cached, and no folder is given", 'write `cache = "dir"`'
        )
    folder = stage_folder(at.root / how.cache, plan)
    if not folder.is_dir() and (at.root / how.cache / MANIFEST).is_file():
        # The folder of one stage serves all.
        folder = at.root / how.cache
    stored = stored_identity(folder) or {}
    if how.top_k is None and "top_k" in stored:
        how = replace(how, top_k=0 if stored["top_k"] == "all" else int(stored["top_k"]))
    layout = layout_of(plan, node.name, how)
    if layout.top_k is not None and stored.get("temperatures"):
        known = tuple(stored["temperatures"])
        if layout.top_k.treatment == "bucket" and (other := set(layout.top_k.temperatures) - set(known)):
            log.warning(
                "the stored teacher %s has the mass of the logits that are not stored at temperature %s; stage `%s` "
                "reads them at %s, where it is estimated: `gkd cache` into a new folder stores it",
                folder, _listed(known), plan.name, _listed(other),
            )  # fmt: skip
        layout = replace(layout, top_k=replace(layout.top_k, temperatures=known))
    fields = identity(plan, node, at.reader, loader, layout, at.seeds.get(node.name, 0))
    if not fields["held_out rows"]:
        # No metric reads the model: rows held out may be there all the same.
        fields["held_out rows"] = stored.get("held_out rows") or 0
    store = Store(folder, fields, fields["rows"] + fields["held_out rows"], read=True)
    if absent := missing(plan, node.name, {*store.parts, *store.shared}):
        raise RunError(CACHE, f"the stored teacher {folder} has no `{absent[0]}`", "make it again with `gkd cache`")
    if not store.complete:
        raise RunError(
            CACHE,
            f"the stored teacher {folder} has {store.count} of {store.total} rows",
            "go on with `gkd cache --resume`",
        )
    return CachedTeachers(store, layout), layout


def _listed(temperatures: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(temperatures))


def _filling(
    plan: StagePlan, node: ModelNode, how: Placement, loader: Any, at: Place, inner: TeacherSource
) -> tuple[TeacherSource, Layout] | None:
    """A source that stores what it runs; None, with the reason in the log, where that cannot be."""
    if not runs(plan, node.name):
        return None
    try:
        if at.folder is None:
            raise RunError(CANNOT_RUN, "the run has no folder")
        if not at.alone:
            raise RunError(CANNOT_RUN, "more than one process makes the run")
        layout = layout_of(plan, node.name, how)
        fields = identity(plan, node, at.reader, loader, layout, at.seeds.get(node.name, 0))
    except RunError as error:
        log.warning(
            "`cache = auto` of `%s` in stage `%s`: %s; it is run each time", node.name, plan.name, error.message
        )
        return None
    folder = stage_folder(at.folder / "teachers" / node.name, plan)
    store = Store(folder, fields, fields["rows"] + fields["held_out rows"], about=about(node, layout))
    return FillingTeachers(inner, store, layout), layout


def source_of(node: ModelNode, how: Placement, at: Place, models: dict[str, PreTrainedModel]) -> TeacherSource:
    """The source of one model in its place; one that is in memory is added to `models`."""
    if how.place in ("offload", "disk", "gemini"):
        if node.name not in at.streamed:
            at.streamed[node.name] = _in_chunks(node, how, at) if how.place == "gemini" else _streamed(node, how, at)
        found = at.streamed[node.name]
        if isinstance(found, StreamedTeachers):
            models[node.name] = found.model
        return found
    models[node.name] = at.model(node.name)
    return LiveTeachers([node], models)


def _in_chunks(node: ModelNode, how: Placement, at: Place) -> TeacherSource:
    from gkd_dsl.runtime.teachers.gemini import GeminiTeachers

    offload = how.offload_param_frac
    if offload is None:
        offload = 1.0 if how.shard_param_frac == 1.0 else 0.0
    return GeminiTeachers(
        node, lambda: at.model(node.name), shard=how.shard_param_frac, offload=offload, chunks=at.chunks
    )


def _streamed(node: ModelNode, how: Placement, at: Place) -> StreamedTeachers:
    if how.place == "offload":
        return StreamedTeachers(node, at.model(node.name), at.device, in_host_memory)
    half = at.half.get(node.name)
    model, saved, files = on_disk(node.info, node.name, half)

    def find(name: str, parameter: Tensor) -> Tensor:
        if half is None or parameter.ndim > 1:
            return files.tensor(saved[name], parameter.dtype)
        return rounded(files.tensor(saved[name], torch.float32), half)

    return StreamedTeachers(node, model, at.device, find)
