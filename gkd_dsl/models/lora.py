"""What a model with adapters of low rank (LoRA) trains: which linear maps have one, and which modules train whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.resolve import part_modules

_ENCODER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_DECODER = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)

LINEAR: Mapping[str, tuple[str, ...]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "distilbert": (*(f"attention.{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin")), "ffn.lin1", "ffn.lin2"),
    "mobilebert": (
        *_ENCODER,
        "output.bottleneck.dense",
        "bottleneck.input.dense",
        "bottleneck.attention.dense",
        "ffn.i.intermediate.dense",
        "ffn.i.output.dense",
    ),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _DECODER),
}
"""The linear maps inside a block, by family; `i` stands for a number."""

TARGETS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert", "roberta", "mobilebert"), ("query", "value")),
    "distilbert": ("q_lin", "v_lin"),
    "gpt2": ("c_attn",),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("q_proj", "v_proj")),
}
"""Where an adapter is put unless a spec says so: the maps to queries and values, as in the paper."""


def is_target(module: str, targets: Iterable[str]) -> bool:
    """Whether a module is one of the targets: of that path, or of one that ends in it."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def target_names(family: str) -> list[str]:
    """The names that a target of a family may have, the last parts of paths first."""
    paths = LINEAR.get(family, ())
    return list(dict.fromkeys([*(path.rpartition(".")[2] for path in paths), *(p for p in paths if ".i." not in p)]))


def full_modules(info: ModelInfo) -> tuple[str, ...]:
    """The modules, relative to the whole model, that train whole beside the adapters.

    They are the head of a classifier, the head of a language model that is new, and a pooler that is new. What a head
    shares with the body stays frozen. Of a model of an unknown family: none is known.
    """
    family = FAMILIES.get(info.family or "")
    if family is None or info.formal:
        return ()
    found: list[str] = []
    if info.task == "classification" or (info.task != "encoder" and new_head(info)):
        found += family.heads[info.task]
    if info.has_pooler and family.pooler is not None and _new_pooler(info):
        found.append(family.pooler if info.task == "encoder" else f"{family.prefix}.{family.pooler}")
    return tuple(found)


def selected_modules(info: ModelInfo, part: str) -> tuple[str, ...]:
    """The modules of a part of a model, as a stage names it: with an adapter a new pooler belongs to the head.

    Raises ModelError for a part that the model lacks.
    """
    found = part_modules(info, part)
    if part != "head" or info.build.lora is None:
        return found
    return (*found, *(module for module in full_modules(info) if module not in found))


def may_train(info: ModelInfo, part: str | None) -> bool:
    """Whether a part of a model with an adapter holds anything that is not frozen."""
    if part is None or part == "body" or info.family not in FAMILIES:
        return True
    if part == "head":
        return bool(full_modules(info))
    return part.startswith("layer.")


def new_head(info: ModelInfo) -> bool:
    """Whether the head of a model starts from random values."""
    build = info.build
    if build.kind == "truncated" and build.origin is not None:
        return build.origin.task != info.task
    return build.kind != "hf" or _saved_class(info) not in _classes(info, info.task)


def _new_pooler(info: ModelInfo) -> bool:
    """Whether the pooler starts from random values: what the weights are from has none."""
    build = info.build
    if build.kind in ("truncated", "headed") and build.origin is not None:
        return not build.origin.has_pooler
    family = FAMILIES[info.family or ""]
    with_pooler = {name for task in family.pooled for name in _classes(info, task)} | set(family.accepts)
    return build.kind != "hf" or _saved_class(info) not in with_pooler


def _classes(info: ModelInfo, task: str) -> set[str]:
    """The classes whose weights hold what a task needs."""
    family = FAMILIES[info.family or ""]
    found = {name for name, of in family.accepts.items() if of == task}
    return found | {cls for key, cls in family.classes.items() if key == task}


def _saved_class(info: ModelInfo) -> str:
    """The class that the weights were saved from; without a word of it, the body alone."""
    saved = info.config.get("architectures")
    if isinstance(saved, list | tuple) and saved and isinstance(saved[0], str):
        return saved[0]
    return FAMILIES[info.family or ""].classes["encoder"]
