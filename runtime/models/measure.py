"""Shapes of raw module taps, from a model on the meta device: no weights, no arithmetic."""

from __future__ import annotations

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models.load import _quiet, build
from gkd_dsl.runtime.models.tapper import Tapper, configs_of
from gkd_dsl.types import BATCH, LENGTH, Dim

_SIZES = ((2, 7), (3, 11))
# a mask is made by looking at values, which meta tensors do not have; a name without a mask function gets none
_UNMASKED = "gkd_unmasked"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)


def module_dims(info: ModelInfo, path: TapPath) -> tuple[Dim, ...]:
    """The axes of a `module(...)` or `weight(...)` tap: `B` and `L` where they follow the batch, else their size.

    Raises TapError for a module that the model lacks, ModelError for a config that cannot be built.
    """
    with _quiet(), torch.device("meta"):
        model = build(info).eval()
        if model.config.pad_token_id is None:
            model.config.pad_token_id = 0
        for config in configs_of(model):
            config._attn_implementation = _UNMASKED
        tapper = Tapper(model, info)
        shapes = []
        for batch, length in _SIZES:
            ids = torch.zeros((batch, length), dtype=torch.long)
            inputs = {"input_ids": ids, "attention_mask": ids}
            with torch.no_grad():
                shapes.append(tuple(tapper.run(inputs, [path])[path].shape))
    label = f'module("{path.name}").{path.part}' if path.kind == "module" else f'weight("{path.name}")'
    return tuple(_dim(first, second, f'{label} of "{info.location}"') for first, second in zip(*shapes, strict=True))


def _dim(first: int, second: int, origin: str) -> Dim:
    (batch, length), (other_batch, other_length) = _SIZES
    if (first, second) == (batch, other_batch):
        return BATCH
    if (first, second) == (length, other_length):
        return LENGTH
    return Dim("", first, origin) if first == second else Dim("?")
