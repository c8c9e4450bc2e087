"""Weights that nothing trains, in half precision: two bytes a number, the values that autocast would take anyway."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkd_dsl.graph.plan import SpecPlan
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.planning.layout import halved_models

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of a precision."""

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16"}


def halve(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's weights to `dtype`, one after the other; matrices stay in it, vectors go back to fp32.

    Under autocast every matrix product takes its weight in `dtype` anyway. What embeddings give is turned into fp32,
    so the residual stream and the norms stay in it, as in a model whose weights are fp32. Buffers stay.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = rounded(parameter.data, dtype)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and _in_fp32 not in module._forward_hooks.values():
            module.register_forward_hook(_in_fp32)


def untrained(plan: SpecPlan, precision: str) -> dict[str, torch.dtype]:
    """The models of a plan that are held in half precision, with their dtype."""
    return dict.fromkeys(halved_models(plan), HALF[precision]) if precision in HALF else {}


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as a halved model holds it."""
    found = weight.to(dtype)
    return found if weight.ndim > 1 else found.float()


def halved(model: nn.Module) -> torch.dtype | None:
    """The half precision of a model's weights; None where they are whole. Such a model runs under autocast alone."""
    return next((p.dtype for p in model.parameters() if p.dtype in _NAMES), None)


def saved_in(info: ModelInfo, dtype: torch.dtype) -> bool:
    """Whether all of a model's saved weights are in `dtype`: then a model copied from the halved one is exact."""
    if info.build.kind != "hf" or info.build.adapter is not None or info.path is None:
        return False
    kinds = {kind for path in Path(info.path).glob("*.safetensors") for kind in _kinds(path)}
    return kinds == {_NAMES[dtype]}


def _kinds(path: Path) -> set[str]:
    """The dtypes in a safetensors file, from its header."""
    with path.open("rb") as file:
        table = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {entry["dtype"] for name, entry in table.items() if name != "__metadata__"}


def _in_fp32(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()
