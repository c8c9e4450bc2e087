"""Adapters of the library peft: saved ones merged into the weights of a model, and ones that are trained (LoRA)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gkd_dsl.models import lora
from gkd_dsl.models.errors import ModelError, near_misses
from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.runtime.checkpoint import module_tensors
from gkd_dsl.runtime.errors import out_of_memory
from gkd_dsl.runtime.models.quantised import quiet

_NAME = "default"
_TRAINED = "_gkd_trained"
_TASKS = {"classification": "SEQ_CLS", "causal_lm": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}


def with_adapter(model: PreTrainedModel, folder: str, name: str) -> PreTrainedModel:
    """The model with the adapter of a folder in its weights.

    Raises ModelError where peft is not installed, or refuses the adapter.
    """
    peft = _library(name)
    try:
        with warnings.catch_warnings():
            # Names of transformers that will change: nothing that a user could do.
            warnings.simplefilter("ignore", FutureWarning)
            return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    except Exception as error:  # peft raises what its readers and torch raise
        if out_of_memory(error):
            raise
        raise ModelError(
            f'the adapter {folder} does not fit "{name}": {_first_line(error)}', "is it one of another model?"
        ) from None


def with_lora(model: PreTrainedModel, info: ModelInfo, seed: int = 0) -> PreTrainedModel:
    """The model with the adapters of its spec put in, in place and in eval mode; it computes what it did.

    All but the adapters and the modules that train whole (`lora.full_modules`) is frozen. Module paths are as
    before: an adapted linear map holds its adapter. `seed` gives A its first values.

    Raises ModelError where peft is not installed or refuses, or the model has no such modules.
    """
    held = info.build.lora
    assert held is not None
    peft = _library(info.location)
    targets = _targets(model, info)
    config = peft.LoraConfig(
        r=held.r,
        lora_alpha=held.alpha,
        lora_dropout=held.dropout,
        target_modules=targets,
        use_rslora=held.rslora,
        use_dora=held.dora,
        bias="none",
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Not the numbers that a new head starts from.
            torch.default_generator.manual_seed(seed + 1)
            peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
    except Exception as error:  # peft raises what it and torch raise
        if out_of_memory(error):
            raise
        raise ModelError(f'"{info.location}" takes no adapter: {_first_line(error)}') from None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained |= _whole(model, info)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    setattr(model, _TRAINED, frozenset(trained))
    return model.eval()


def adapted(model: nn.Module) -> bool:
    """Whether a model has adapters that are trained."""
    return hasattr(model, _TRAINED)


def trainable(model: nn.Module, named: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Of parameters of a model those that may train: all, or with adapters these and the modules that train whole."""
    trained = getattr(model, _TRAINED, None)
    return named if trained is None else [(name, parameter) for name, parameter in named if name in trained]


def saved(model: nn.Module, info: ModelInfo, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a model's tensors those that a checkpoint holds.

    With adapters on saved weights it is what is trained. Weights that were made here are held too: a model cut from
    another one starts from what that one was then.
    """
    trained = getattr(model, _TRAINED, None)
    if trained is None or info.build.kind != "hf" or info.kept is not None:
        return dict(tensors)
    return {name: value for name, value in tensors.items() if name in trained}


def completed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with those of the frozen weights that it has no need to hold."""
    trained = getattr(model, _TRAINED, None)
    if trained is None:
        return dict(tensors)
    return {name: value for name, value in module_tensors(model).items() if name not in trained} | dict(tensors)


@contextmanager
def merged(*models: nn.Module) -> Iterator[None]:
    """Within, models are plain ones of their class: W + scale B A is one weight; afterwards they are as before."""
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for model in models:
            for name, layer in _layers(model).items():
                parent, _, child = name.rpartition(".")
                owner = model.get_submodule(parent)
                owner._modules[child] = _plain(layer)
                undo.append((owner, child, layer))
        yield
    finally:
        for owner, child, layer in reversed(undo):
            owner._modules[child] = layer


def effective(root: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A weight by its name as the forward uses it: of an adapted map W + scale B A, with its gradient."""
    parent, _, last = name.rpartition(".")
    layer: Any = root.get_submodule(parent)
    if last != "weight" or not hasattr(layer, "get_delta_weight"):
        return weight
    found = weight + layer.get_delta_weight(_NAME)
    if not layer.use_dora[_NAME]:
        return found
    turned = isinstance(layer.get_base_layer(), Conv1D)
    rows = found.T if turned else found
    # The length is a constant of the gradient (arXiv 2402.09353, section 4.3).
    rows = rows * (layer.lora_magnitude_vector[_NAME].weight / rows.norm(dim=1).detach())[:, None]
    return rows.T if turned else rows


def write(model: PreTrainedModel, info: ModelInfo, folder: Path) -> tuple[str, dict[str, Any]]:
    """Write what is trained as `peft.PeftModel.from_pretrained(base, folder)` reads it.

    The modules that train whole are peft's `modules_to_save`. Gives the place of the base, and what its
    `from_pretrained` has to be told.
    """
    from safetensors.torch import save_file

    peft = _library(info.location)
    whole = _whole(model, info)
    found = peft.get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    found |= {name: value for name, value in model.state_dict().items() if name in whole}
    tensors = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in found.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    held: Any = model.peft_config
    config = copy.deepcopy(held[_NAME])
    place, revision = base_of(info)
    config.base_model_name_or_path, config.revision = place, revision
    config.task_type = _TASKS.get(info.task)
    config.modules_to_save = sorted({_module_to_save(name, info) for name in whole}) or None
    config.inference_mode = True
    config.save_pretrained(str(folder))
    return place, _arguments(info)


def in_words(info: ModelInfo) -> str | None:
    """What is trained beside the frozen weights, for a model card; None where nothing is."""
    held = info.build.lora
    if held is None:
        return None
    kind = "".join((f"LoRA of rank {held.r}", " (rank-stabilised)" * held.rslora, " with DoRA" * held.dora))
    where = "apart from the weights" if held.export == "adapter" else "merged into the weights"
    return f"{kind}, alpha {held.alpha:g}, on {', '.join(held.targets)}; {where}"


def base_of(info: ModelInfo) -> tuple[str, str | None]:
    """Where the weights under an adapter are: a hub id with its revision, or a folder."""
    if Path(info.path or "").parent.name == "snapshots":
        repo, _, revision = info.location.partition("@")
        return repo, revision or None
    return str(Path(info.path or info.location).resolve()), None


def _arguments(info: ModelInfo) -> dict[str, Any]:
    """What `from_pretrained` of the base has to be told."""
    found: dict[str, Any] = {}
    if info.task == "classification":
        found["num_labels"] = info.size("C")
    family = FAMILIES.get(info.family or "")
    if info.task == "causal_lm" and family is not None:
        found |= family.causal
    return found


def _module_to_save(name: str, info: ModelInfo) -> str:
    """The module that trains whole to which a parameter belongs."""
    for module in lora.full_modules(info):
        if name == module or name.startswith(f"{module}."):
            return module
    return name.partition(".")[0]


def _whole(model: PreTrainedModel, info: ModelInfo) -> set[str]:
    """The parameters of modules that train whole, less what the body shares with them."""
    pooler = {
        id(parameter)
        for module in lora.full_modules(info)
        if module.rpartition(".")[2] == "pooler"
        for parameter in model.get_submodule(module).parameters()
    }
    body = {id(parameter) for parameter in model.base_model.parameters()} - pooler
    modules = lora.full_modules(info)
    if info.family is None and info.task == "classification":
        modules = ("",)
    parameters = [(m, n, p) for m in modules for n, p in model.get_submodule(m).named_parameters()]
    return {f"{module}.{name}" if module else name for module, name, p in parameters if id(p) not in body}


def _targets(model: PreTrainedModel, info: ModelInfo) -> list[str]:
    """The paths of the linear maps that get an adapter. Raises ModelError where a target names none."""
    held = info.build.lora
    assert held is not None
    family = FAMILIES.get(info.family or "")
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inside = prefix if family is None else f"{prefix}{family.blocks}."
    linear = [
        name
        for name, module in model.named_modules()
        if name.startswith(inside) and isinstance(module, nn.Linear | Conv1D)
    ]
    for target in held.targets:
        if not any(lora.is_target(name, (target,)) for name in linear):
            near = near_misses(target, {name.rpartition(".")[2] for name in linear})
            hint = f"did you mean {near[0]}?" if near else ""
            raise ModelError(f'"{info.location}" has no linear map {target} for an adapter', hint, near)
    return [name for name in linear if lora.is_target(name, held.targets)]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted maps by their paths."""
    if not adapted(model):
        return {}
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def _plain(layer: Any) -> nn.Module:
    """The map of an adapted one with the adapter in its weight. The adapted one is as before."""
    base = layer.get_base_layer()
    before = base.weight.data
    # With `safe_merge` the library makes a new weight, and leaves the old one alone.
    layer.merge(safe_merge=True, adapter_names=[_NAME])
    weight, base.weight.data = base.weight.data, before
    layer.merged_adapters.clear()
    found = copy.copy(base)
    found._parameters = dict(base._parameters)
    found._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return found


def _library(name: str) -> ModuleType:
    try:
        # It brings bitsandbytes where that is installed, which tells of kernels that nothing here calls.
        with quiet():
            import peft
    except ImportError:
        raise ModelError(
            f'"{name}" has an adapter, and the library peft is not installed', 'pip install "gkd-dsl[peft]"'
        ) from None
    return peft


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
