"""The bytes of quantised weights, from the config alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.info import ModelInfo, Quantised
from gkd_dsl.models.resolve import part_modules
from gkd_dsl.planning.parameters import Shape, parameters

_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings", "embed_tokens", "wte", "wpe")
_BLOCK = 64
"""The weights of 4 bits in bitsandbytes that share a scale."""
_NESTED = 256
"""The scales that share one where they are quantised too."""


def weight_bytes(info: ModelInfo, plain: int = 4) -> int:
    """The bytes of a model's weights: linear ones as they are quantised, all others `plain` bytes each.

    Where the family has no table all of them are taken for linear ones.
    """
    how = info.quantised
    found = parameters(info)
    if how is None or how.bits == 0:
        return plain * found.count
    given = dict(how.args)
    skipped = given.get("llm_int8_skip_modules", given.get("modules_to_not_convert"))
    stays = tuple(skipped) if skipped is not None else _head(info)
    total = 0
    for name, shape in found.shapes:
        linear = not found.exact or (len(shape) == 2 and name.split(".")[-2] not in _EMBEDDINGS)
        if linear and not _stays(name, stays):
            # Conv1D, as GPT-2 has it, keeps its weight the other way round.
            total += _quantised(how, shape[::-1] if info.family == "gpt2" else shape)
        else:
            total += plain * math.prod(shape)
    return total


def _head(info: ModelInfo) -> tuple[str, ...]:
    try:
        return tuple(part_modules(info, "head")) if info.task != "encoder" else ()
    except ModelError:
        return ()


def _stays(name: str, modules: Iterable[str]) -> bool:
    layer = name.rpartition(".")[0]
    return any(layer == m or layer.startswith(f"{m}.") or layer.endswith(m) for m in modules)


def _quantised(how: Quantised, shape: Shape) -> int:
    """The packed numbers of one weight `[out, in]`, and its scales: fp32, for torchao's 4 bits two in bf16."""
    count, rows = math.prod(shape), shape[0]
    packed = math.ceil(count * how.bits / 8)
    given = dict(how.args)
    if how.library == "bitsandbytes":
        if how.bits == 8:
            return packed + 4 * rows
        blocks = math.ceil(count / _BLOCK)
        return packed + (blocks + 4 * math.ceil(blocks / _NESTED) if _nested(how) else 4 * blocks)
    group = given.get("group_size", 128 if how.bits == 4 else None)
    scales = count // group if group else 1 if given.get("granularity") == "per_tensor" else rows
    # Of 8 bits each scale has a zero point of one byte.
    return packed + (5 if how.bits == 8 and how.scheme != "Float8WeightOnlyConfig" else 4) * scales


def _nested(how: Quantised) -> bool:
    return bool(dict(how.args).get("bnb_4bit_use_double_quant", False))
