"""The parameters that adapters of low rank (LoRA) add to a model, and which of its parameters are trained then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gkd_dsl.models import lora
from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.info import Lora, ModelInfo

Named = tuple[str, tuple[int, ...]]
_NAME = "default"


def with_adapters(info: ModelInfo, shapes: Iterable[Named]) -> Iterator[Named]:
    """The parameters of a model with its adapters, by the names that they then have."""
    held = info.build.lora
    family = FAMILIES.get(info.family or "")
    if held is None:
        yield from shapes
        return
    if family is None:
        yield from _usual(info, held, shapes)
        return
    prefix = "" if info.task == "encoder" else f"{family.prefix}."
    known = dict(shapes)
    for name, shape in known.items():
        module, _, last = name.rpartition(".")
        weight = known.get(f"{module}.weight", ())
        if len(weight) != 2 or not module.startswith(f"{prefix}{family.blocks}.") or not _is_target(module, held):
            yield name, shape
            continue
        yield f"{module}.base_layer.{last}", shape
        if last == "weight":
            # GPT-2 keeps its weights the other way round.
            out, into = reversed(shape) if family.name == "gpt2" else shape
            yield f"{module}.lora_A.{_NAME}.weight", (held.r, into)
            yield f"{module}.lora_B.{_NAME}.weight", (out, held.r)
            if held.dora:
                yield f"{module}.lora_magnitude_vector.{_NAME}.weight", (out,)


def is_trained(info: ModelInfo, name: str) -> bool:
    """Whether a parameter of a model with adapters is trained: one of an adapter, or of a module that trains whole."""
    return ".lora_" in name or any(name.startswith(f"{module}.") for module in lora.full_modules(info))


def _is_target(module: str, held: Lora) -> bool:
    return lora.is_target(module, held.targets)


def _usual(info: ModelInfo, held: Lora, shapes: Iterable[Named]) -> Iterator[Named]:
    """A model without a table: every target as a map of the model's width."""
    width = info.size("H") or 0
    for name, shape in shapes:
        yield name, shape
        if name.startswith("block."):
            each = held.r * 2 * width + (width if held.dora else 0)
            yield f"{name}.lora_A.{_NAME}.weight", (len(held.targets) * each,)
