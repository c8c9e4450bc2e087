"""Where a model goes that is run alone: on the device, or streamed to it where it is too large for that."""

from __future__ import annotations

import torch

from gkd_dsl.models.info import ModelInfo
from gkd_dsl.planning.layout import weights
from gkd_dsl.planning.machine import this_machine
from gkd_dsl.planning.parameters import parameters

_SHARE = 0.8
"""The share of a memory that weights may take: the rest is for what a forward needs."""


def place_for(info: ModelInfo, half: bool, device: torch.device) -> str:
    """`resident`, `offload` or `disk`, by the bytes of the weights and the memory of the device and the host."""
    if device.type == "cpu" or info.family is None or info.quantised is not None:
        return "resident"
    needed = weights(parameters(info), half)
    if needed <= _SHARE * device_memory(device):
        return "resident"
    read = info.build.kind == "hf" and info.kept is None and info.build.adapter is None
    return "disk" if read and needed > _SHARE * this_machine().host_memory else "offload"


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory
