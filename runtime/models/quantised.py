"""Weights quantised as they are read, by bitsandbytes or torchao through transformers."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.info import ModelInfo, Quantised
from gkd_dsl.models.resolve import part_modules
from gkd_dsl.runtime.errors import out_of_memory

_HEADS = {"bitsandbytes": "llm_int8_skip_modules", "torchao": "modules_to_not_convert"}
"""What each library calls the modules whose weights stay as they are."""
_PACKED = 32


def reading(info: ModelInfo, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is given so that it quantises; nothing for plain weights.

    Weights are quantised on the GPU where there is one. Those of the head stay as they are unless the spec names the
    modules that do. Raises ModelError: a library that is missing, or cannot do this here.
    """
    how = info.build.quantised
    if how is None:
        return {}
    device: int | str = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    with quiet(), _in_words(info, how):
        try:
            importlib.import_module(how.library)
            importlib.import_module("accelerate")
        except ImportError as error:
            raise ModelError(
                f'"{info.location}" is quantised by {how.library}, which cannot be imported: {_line(error)}',
                f'pip install "gkd-dsl[{how.library}]"',
            ) from None
        config = _config(info, how)
        if how.library == "torchao":
            _try(config, dtype, device)
    return {"quantization_config": config, "device_map": {"": device}}


def is_quantised(model: nn.Module) -> bool:
    """Whether weights of a model are quantised: these keep their dtype."""
    return bool(getattr(model, "is_quantized", False))


def numbers(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds: of 4 bits, bitsandbytes packs two in a byte."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


def refuse_unfit(model: PreTrainedModel, info: ModelInfo) -> None:
    """Raise ModelError where nothing was quantised, or layers cannot run here."""
    layers = {name: module for name, module in model.named_modules() if _quantised(module)}
    if not layers:
        raise ModelError(
            f'no layer of "{info.location}" could be quantised', "leave `quantize` away, or take the other library"
        )
    for name, module in layers.items():
        # On such a CPU bitsandbytes packs rows in groups before the first forward.
        if (
            getattr(module, "support_avx512bf16_for_cpu", False)
            and module.weight.device.type == "cpu"
            and module.out_features % _PACKED
        ):
            raise ModelError(
                f'{name} of "{info.location}" has {module.out_features} outputs, and on this CPU bitsandbytes runs '
                f"4-bit layers of multiples of {_PACKED} alone",
                f'name it in `llm_int8_skip_modules = ["{name}"]`, or take 8 bits',
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the libraries log on import and on reading; errors are raised all the same."""
    # Says at every product of an 8-bit layer that its input is rounded to fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _in_words(info: ModelInfo, how: Quantised) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the libraries raise what torch and their kernels raise
        if out_of_memory(error):
            raise
        raise ModelError(
            f'{how.library} cannot quantise "{info.location}" so here: {_line(error)}',
            "another scheme may; int8 runs on every device",
        ) from None


def _config(info: ModelInfo, how: Quantised) -> Any:
    args: dict[str, Any] = {name: list(value) if isinstance(value, tuple) else value for name, value in how.args}
    if _HEADS[how.library] not in args and info.task != "encoder" and info.family is not None:
        args[_HEADS[how.library]] = list(part_modules(info, "head"))
    if how.library == "bitsandbytes":
        return transformers.BitsAndBytesConfig(**args)
    from torchao import quantization as ao

    modules = args.pop("modules_to_not_convert", None)
    # Their settings for compiled models change how torch multiplies everywhere.
    given: dict[str, Any] = {"set_inductor_config": False}
    for name, value in args.items():
        if name == "granularity":
            given[name] = ao.PerRow() if value == "per_row" else ao.PerTensor()
        elif name == "group_size" and how.bits == 8:
            given["granularity"] = ao.PerGroup(value)
        else:
            given[name] = value
    return transformers.TorchAoConfig(getattr(ao, str(how.scheme))(**given), modules_to_not_convert=modules)


def _try(config: Any, dtype: torch.dtype, device: int | str) -> None:
    """Quantise and run one small layer: what a scheme cannot do here is said before the weights are read."""
    from torchao.quantization import quantize_

    layer = nn.Linear(256, 256, dtype=dtype, device=device).requires_grad_(False)
    quantize_(layer, config.quant_type)
    layer(torch.zeros(2, 256, dtype=dtype, device=device))


def _quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is packed, or a tensor of a class that stands for a packed one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") or type(weight) not in (nn.Parameter, Tensor)


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
