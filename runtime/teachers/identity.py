"""What stored outputs were made of, field by field, so that others are refused by name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.graph.plan import StagePlan
from gkd_dsl.graph.stored import forwards_of, taps_of
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.stored import MANIFEST, describe
from gkd_dsl.runtime.data.digest import digest
from gkd_dsl.runtime.data.encode import tokenizer_digest
from gkd_dsl.runtime.data.loader import Loader
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.models.load import load_tokenizer
from gkd_dsl.runtime.teachers.parts import Layout

_SINCE = ("lora", "quantised", "stored")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_RELATIVE = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""The families whose outputs do not hang on how much padding stands before a text; GPT-2 is told the positions."""


def identity(
    plan: StagePlan, node: ModelNode, reader: ModelNode, loader: Loader, layout: Layout, seed: int
) -> dict[str, Any]:
    """The fields; None for what is not known here, which is then not compared. `reader` is whose tokenizer reads.

    Raises RunError for batches that are not the spec's own, or whose padding changes what the model gives.
    """
    if not isinstance(loader, Loader):
        raise RunError(CANNOT_RUN, f"`{node.name}` is stored by the rows of a source, and stage `{plan.name}` has none")
    if loader.collator.left and node.info.family not in _RELATIVE:
        raise RunError(
            CANNOT_RUN,
            f"texts are padded on the left, where the outputs of `{node.name}` hang on the rows beside",
            "take a tokenizer whose padding_side is right",
        )
    own = _of_model(node.info, seed) if node.info.build.stored is None else {}
    return {
        **own,
        "tokenizer": tokenizer_digest(load_tokenizer(reader.info)),
        "vocabulary": reader.info.size("V"),
        "data set": digest(loader),
        "rows": loader.sizes.train,
        "held_out rows": loader.sizes.held_out if held_out_too(plan, node.name) else 0,
        **how(layout),
    }


def _of_model(info: ModelInfo, seed: int) -> dict[str, Any]:
    head = info.architecture
    return {
        "model": info.location,
        "model config": _digest(
            {"config": info.config, "build": _text(replace(info.build, path=None, quantised=None)), "head": head}
        ),
        "weights": _weights(info),
        "quantisation": str(info.quantised) if info.quantised is not None else "none",
        "seed of new weights": seed if _new_weights(info) else "any",
    }


def how(layout: Layout) -> dict[str, Any]:
    """How logits are stored, and features."""
    kept = layout.top_k
    return {
        "top_k": kept.count if kept is not None else "all",
        "temperatures": list(kept.temperatures) if kept is not None else [],
        "dtype": "bfloat16, logits float32",
    }


def about(node: ModelNode, layout: Layout) -> dict[str, Any]:
    """What a manifest says besides: all that a spec is checked with where the model itself is not there."""
    return {"model": describe(node.info), "taps": {path.key: str(path) for path in layout.taps}}


def held_out_too(plan: StagePlan, model: str) -> bool:
    """Whether a metric reads the model."""
    return any(forward.model == model for item in plan.metrics for forward in item.forwards)


def stored_identity(folder: Path) -> dict[str, Any] | None:
    """The fields of a folder; None where there is none that can be read."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def missing(plan: StagePlan, model: str, parts: set[str]) -> list[str]:
    """The taps of a stage that are not among the stored parts."""
    return [str(path) for path in taps_of(plan, model) if path.key not in parts]


def runs(plan: StagePlan, model: str) -> bool:
    """Whether a stage runs a model."""
    return bool(forwards_of(plan, model))


def _weights(info: ModelInfo) -> dict[str, int] | None:
    """The weight files with their sizes; None where they are not there, as on a machine that has the cache alone."""
    if info.build.kind != "hf" or info.path is None:
        return None
    folders = [Path(info.path), *([Path(info.build.adapter)] if info.build.adapter is not None else [])]
    files = [path for folder in folders for pattern in _WEIGHTS for path in sorted(folder.glob(pattern))]
    found = {path.name: path.stat().st_size for path in files}
    return found or None


def _new_weights(info: ModelInfo) -> bool:
    """Whether some of its weights may be drawn from the seed: a head that the saved model lacks, or all of them."""
    saved = info.config.get("architectures") or [info.architecture]
    return info.build.kind != "hf" or info.architecture not in saved or "num_labels" in dict(info.build.overrides)


def _text(value: Any) -> str:
    """As `repr`, without fields that are None and came after manifests had been written: these stay readable."""
    if not is_dataclass(value):
        return repr(value)
    inner = [
        f"{item.name}={_text(getattr(value, item.name))}"
        for item in fields(value)
        if item.repr and (item.name not in _SINCE or getattr(value, item.name) is not None)
    ]
    return f"{type(value).__qualname__}({', '.join(inner)})"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
