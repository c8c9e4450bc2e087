"""Fields of a model's config, by any of their spellings, and what follows from them alone."""

from __future__ import annotations

from typing import Any

from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.info import ModelInfo

_LEARNED = ("bert", "distilbert", "mobilebert", "roberta", "gpt2")
"""Families whose positions are rows of a table; those of the others are computed, and have no end."""


def config_value(info: ModelInfo, name: str) -> Any:
    """A field of the config, by any of its spellings, or the default of the family; None where there is none."""
    family = FAMILIES.get(info.family or "")
    if family is None:
        return info.config.get(name)
    for spelling in (name, *(other for other, target in family.aliases.items() if target == name)):
        if spelling in info.config:
            return info.config[spelling]
    return family.defaults.get(name)


def positions(info: ModelInfo) -> int | None:
    """The most tokens of a text that a model has positions for; None where they have no end, or are not known."""
    if info.family not in _LEARNED:
        return None
    count = config_value(info, "n_positions" if info.family == "gpt2" else "max_position_embeddings")
    if not isinstance(count, int):
        return None
    # Its positions begin behind the number of the padding token.
    first = config_value(info, "pad_token_id") if info.family == "roberta" else None
    return count - first - 1 if isinstance(first, int) else count


def rotary(info: ModelInfo) -> tuple[Any, str, tuple[tuple[str, str], ...]]:
    """By what positions are rotated: the base, the kind, and what else is given, however a config spells it.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters` with both.
    """
    found = info.config.get("rope_parameters") or info.config.get("rope_scaling")
    given = dict(found) if isinstance(found, dict) else {}
    inside, kinds = given.pop("rope_theta", None), [given.pop(name, None) for name in ("rope_type", "type")]
    theta = inside or info.config.get("rope_theta") or 10000.0
    return theta, str(kinds[0] or kinds[1] or "default"), tuple(sorted((k, repr(v)) for k, v in given.items()))
