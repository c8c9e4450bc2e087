"""Folders of stored outputs: what they say of their model, and which of its tensors they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gkd_dsl.models.errors import ModelError, near_misses
from gkd_dsl.models.info import Build, ModelInfo, Vocabulary
from gkd_dsl.models.tokenizer import by_meaning
from gkd_dsl.places import entries, is_dir, is_file

MANIFEST = "manifest.json"
_MADE = "make it with `gkd cache` of a spec that has the model itself"


@dataclass(frozen=True)
class StoredStage:
    """The outputs for one stage.

    keys     the stored tensors, by the keys of their taps
    taps     the same as a user writes them
    rows     how many there are when all are stored, those held out included; `stored` of them are
    held_out how many of them are held out
    top_k    how many logits of a row are stored; 0 for all
    """

    folder: Path
    keys: frozenset[str]
    taps: tuple[str, ...]
    rows: int
    stored: int
    held_out: int
    top_k: int


@dataclass(frozen=True)
class Stored:
    """A model of which only outputs are known. `stages` is by the stage's name, "" for a folder of one stage alone."""

    info: ModelInfo
    stages: Mapping[str, StoredStage] = field(default_factory=dict)

    def stage(self, name: str) -> StoredStage | None:
        """The outputs that a stage reads; None where there are none for it."""
        return self.stages.get(stage_name(name), self.stages.get(""))


def stage_name(stage: str) -> str:
    """The folder of a stage below that of its model."""
    return stage.replace("/", ".")


def describe(info: ModelInfo) -> dict[str, Any] | None:
    """What a manifest says of a model, so that it can be checked without its folder; None where that is not enough."""
    if info.kept is not None:
        return None
    found = by_meaning(info.vocabulary) if info.vocabulary is not None else None
    return {
        "location": info.location,
        "family": info.family,
        "architecture": info.architecture,
        "task": info.task,
        "sizes": dict(info.sizes),
        "size_fields": dict(info.size_fields),
        "has_pooler": info.has_pooler,
        "vocabulary": {"fingerprint": found.fingerprint, "size": found.size} if found is not None else None,
        "config": dict(info.config),
    }


def read(folder: Path, written: str) -> Stored:
    """The model of a folder, `written` as in the spec: the folder of a model, or that of one of its stages.

    Raises ModelError: no stored outputs there, a manifest that cannot be read or says too little, stages of two models.
    """
    if not is_dir(folder):
        near = _beside(folder, written)
        hint = f"did you mean {near[0]}?" if near else "paths start at the folder of the spec"
        raise ModelError(f"there is no folder {written}", hint, near)
    if is_file(folder / MANIFEST):
        found = {"": folder}
    else:
        found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))}
    if not found:
        raise ModelError(f"the folder {written} has no stored outputs", f"no {MANIFEST} there; {_MADE}")
    infos: dict[str, ModelInfo] = {}
    stages: dict[str, StoredStage] = {}
    for name, place in found.items():
        shown = f"{written.rstrip('/')}/{name}".rstrip("/")
        infos[name], stages[name] = _stage(place, shown, written)
    first = next(iter(infos))
    for name, info in infos.items():
        if (info, info.config) != (infos[first], infos[first].config):
            raise ModelError(
                f"the folder {written} has stored outputs of more than one model",
                f"those of {first} and of {name} differ; write the folder of a stage, such as {written}/{first}",
            )
    return Stored(infos[first], stages)


def _stage(folder: Path, shown: str, written: str) -> tuple[ModelInfo, StoredStage]:
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        model, identity = data.get("model"), data["identity"]
        parts = [*data["parts"], *data["shared"]]
        taps = data.get("taps") or {}
        keys = frozenset(name.partition(":")[0] for name in parts)
        stage = StoredStage(
            folder,
            keys,
            tuple(taps.get(key, key) for key in sorted(keys)),
            int(data["rows"]),
            int(data["stored"]),
            int(identity.get("held_out rows") or 0),
            0 if identity["top_k"] == "all" else int(identity["top_k"]),
        )
        info = _info(model, written) if model is not None else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{shown}/{MANIFEST} cannot be read: {reason}", _MADE) from None
    if info is None:
        raise ModelError(
            f"{shown}/{MANIFEST} does not describe its model",
            "an earlier version wrote it, or the model keeps a part of its vocabulary: name the model by `hf(...)`, "
            "and place it with `placement = cached`",
        )
    return info, stage


def _info(model: Mapping[str, Any], written: str) -> ModelInfo:
    known = model["vocabulary"]
    return ModelInfo(
        written,
        None,
        model["family"],
        str(model["architecture"]),
        model["task"],
        tuple((str(name), int(size)) for name, size in model["sizes"].items()),
        tuple((str(name), str(source)) for name, source in model["size_fields"].items()),
        Build("stored", None, stored=written),
        Vocabulary(str(known["fingerprint"]), int(known["size"]), "") if known is not None else None,
        bool(model["has_pooler"]),
        config=dict(model["config"]),
    )


def _beside(folder: Path, written: str) -> list[str]:
    if not is_dir(folder.parent):
        return []
    names = [entry.name for entry in entries(folder.parent) if is_dir(entry)]
    head = written.rstrip("/").rpartition("/")[0]
    return [f"{head}/{near}" if head else near for near in near_misses(folder.name, names)]
