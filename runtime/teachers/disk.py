"""A model whose blocks stay in its safetensors files, mapped into memory."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.models.info import ModelInfo
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.models.halved import halve
from gkd_dsl.runtime.models.load import build, damage, padding_token
from gkd_dsl.runtime.teachers.streamed import blocks_of

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HINT = "write `placement = offload`"


class Mapped:
    """The tensors of a model folder. A file is mapped, not read: of it only the pages in use are in memory."""

    def __init__(self, folder: Path, what: str) -> None:
        self.what = what
        self._at: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...], int, int]] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            hint = _HINT if any(folder.glob("pytorch_model*.bin")) else "no weights at all are there: fetch them again"
            raise RunError(CANNOT_RUN, f"{what} has no safetensors files in {folder}", hint)
        if (damaged := damage(folder)) is not None:
            raise RunError(CANNOT_RUN, f"the weights of {what} cannot be loaded: {damaged[0]}", damaged[1])
        for path in files:
            raw = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            head = int.from_bytes(bytes(raw[:8].tolist()), "little")
            table: dict[str, Any] = json.loads(bytes(raw[8 : 8 + head].tolist()))
            table.pop("__metadata__", None)
            for name, entry in table.items():
                if entry["dtype"] in _DTYPES:
                    start, stop = (8 + head + offset for offset in entry["data_offsets"])
                    self._at[name] = raw, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start, stop

    def names(self, name: str, prefix: str) -> str | None:
        """The saved name of a parameter, with or without the prefix of the base model."""
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((candidate for candidate in candidates if candidate in self._at), None)

    def shape(self, saved: str) -> tuple[int, ...]:
        """The shape of a saved tensor."""
        return self._at[saved][2]

    def tensor(self, saved: str, dtype: torch.dtype) -> Tensor:
        """A saved tensor, mapped where it has this dtype, else a copy."""
        raw, kind, shape, start, stop = self._at[saved]
        data = raw[start:stop]
        if start % kind.itemsize:
            data = data.clone()
        return data.view(kind).view(shape).to(dtype)


def on_disk(
    info: ModelInfo, name: str, half: torch.dtype | None = None
) -> tuple[PreTrainedModel, dict[str, str], Mapped]:
    """A model whose blocks are empty (meta tensors), the saved names of its parameters, and its files.

    With `half` its matrices are in that dtype, as `halve` makes them.

    Raises RunError for one that is not loaded from saved weights as they are: made from another model, with weights
    that start from random values, or saved under other names.
    """
    what = f"`{name}`"
    if info.build.kind != "hf" or info.kept is not None or info.build.adapter is not None or info.path is None:
        raise RunError(CANNOT_RUN, f"{what} is made here, and has no files to be read from", _HINT)
    files = Mapped(Path(info.path), what)
    places = blocks_of(info, name)
    with torch.device("meta"):
        whole = build(info)
    model = build(_with_one_block(info))
    stem = places[0].rpartition(".")[0]
    first = model.get_submodule(places[0])
    blocks = whole.get_submodule(stem)
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        for at, module in block.named_modules():
            for key in module._buffers:
                module._buffers[key] = first.get_submodule(at)._buffers[key]
    parent, _, last = stem.rpartition(".")
    setattr(model.get_submodule(parent), last, blocks)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        for key in ("num_hidden_layers", "layer_types", "n_layer", "n_layers"):
            if hasattr(whole.config, key):
                setattr(config, key, deepcopy(getattr(whole.config, key)))
    if info.task == "classification" and model.config.pad_token_id is None:
        model.config.pad_token_id = padding_token(info, model)
    model.tie_weights()
    inside = {id(p) for block in blocks for p in block.parameters()}
    saved: dict[str, str] = {}
    for key, parameter in model.named_parameters():
        found = files.names(key, model.base_model_prefix)
        if found is None or files.shape(found) != tuple(parameter.shape):
            raise RunError(CANNOT_RUN, f"{what} has no weight `{key}` of its shape among its saved ones", _HINT)
        saved[key] = found
        if id(parameter) not in inside:
            with torch.no_grad():
                parameter.copy_(files.tensor(found, torch.float32))
    if half is not None:
        halve(model, half)
    return model.eval(), saved, files


def _with_one_block(info: ModelInfo) -> ModelInfo:
    """The same model with one block: what is outside of the blocks, and the buffers inside them."""
    fields = {**info.config}
    for key in ("num_hidden_layers", "n_layer", "n_layers"):
        if key in fields:
            fields[key] = 1
    if isinstance(fields.get("layer_types"), list | tuple):
        fields["layer_types"] = list(fields["layer_types"])[:1]
    return replace(info, config=fields)
