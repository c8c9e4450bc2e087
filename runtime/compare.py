"""Teacher and student side by side: size, speed, and how good the student is."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from gkd_dsl.runtime.export import weight_bytes
from gkd_dsl.runtime.models import quantised
from gkd_dsl.runtime.models.halved import halved

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Measure:
    """One model. `size` in bytes, of its weight files where they are known, else of its tensors.

    `speed` is sentences a second, the median over rounds (quartiles in `spread`).
    """

    name: str
    parameters: int
    size: int
    speed: float
    spread: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """`models` in the order given, the teacher first; `faster` is the median over rounds of the student's speed
    over the teacher's in the same round. `metrics`: name -> (before, after); None where it was not measured.
    """

    models: tuple[Measure, ...]
    faster: float
    sentences: int
    rounds: int
    device: str
    threads: int
    metrics: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain values."""
        return {
            "models": [
                {
                    "name": each.name,
                    "parameters": each.parameters,
                    "size_bytes": each.size,
                    "sentences_per_second": each.speed,
                    "sentences_per_second_quartiles": list(each.spread),
                }
                for each in self.models
            ],
            "speed_ratio": self.faster,
            "sentences": self.sentences,
            "rounds": self.rounds,
            "device": self.device,
            "threads": self.threads,
            "metrics": {name: {"before": before, "after": after} for name, (before, after) in self.metrics.items()},
        }

    def table(self) -> Table:
        """The comparison for a person."""
        table = Table(title=None, caption=self._caption(), caption_justify="left", show_edge=False, min_width=80)
        table.add_column("")
        for each in self.models:
            table.add_column(each.name, justify="right")
        table.add_column("ratio", justify="right")
        first, last = self.models[0], self.models[-1]
        ratio = first.parameters / max(1, last.parameters)
        table.add_row("parameters", *(_count(each.parameters) for each in self.models), f"{ratio:.2f} x fewer")
        ratio = first.size / max(1, last.size)
        table.add_row("size on disk", *(_bytes(each.size) for each in self.models), f"{ratio:.2f} x smaller")
        told = f"{self.faster:.2f} x faster" if self.faster >= 1 else f"{1 / self.faster:.2f} x slower"
        table.add_row("sentences per second", *(f"{each.speed:,.0f}" for each in self.models), told)
        for name, (before, after) in self.metrics.items():
            told = f"{_figure(before)} before training" if before is not None else ""
            empty = [""] * (len(self.models) - 1)
            table.add_row(name, *empty, _figure(after), told)
        return table

    def _caption(self) -> str:
        threads = f", {self.threads} thread{'s' if self.threads != 1 else ''}" if self.device == "cpu" else ""
        return (
            f"speed: {self.sentences} held-out sentences, {self.rounds} rounds in turn, median; {self.device}{threads}"
        )


def compare(
    models: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    metrics: Mapping[str, tuple[float | None, float | None]] | None = None,
    folders: Mapping[str, str | Path] | None = None,
    rounds: int = 5,
    seconds: float = 20.0,
) -> Comparison:
    """Measure models, the teacher first and the student last, on the same batches.

    In each round every model reads all batches, the first of a round in turn, so that what slows the machine
    slows both. Where one of them has weights in half precision, all run under autocast to it. A round more is begun
    only while `seconds` have not passed. `folders` are the models' own, for the size on disk. Raises ValueError for
    less than two models or no batches.
    """
    held = [dict(batch) for batch in batches]
    if len(models) < 2 or not held:
        raise ValueError("a comparison needs two models and at least one batch")
    names = list(models)
    modes = {name: model.training for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    try:
        for model in models.values():
            model.eval()
        inputs = {name: [_inputs(models[name], batch) for batch in held] for name in names}
        with _precision(models.values()):
            for name in names:
                _read(models[name], inputs[name][:1])
            begun = time.perf_counter()
            for number in range(rounds):
                if number and time.perf_counter() - begun > seconds:
                    break
                for name in names if number % 2 == 0 else reversed(names):
                    start = time.perf_counter()
                    _read(models[name], inputs[name])
                    times[name].append(time.perf_counter() - start)
    finally:
        for name, model in models.items():
            model.train(modes[name])
    sentences = sum(int(batch["input_ids"].shape[0]) for batch in held)
    measures = []
    for name in names:
        speeds = [sentences / passed for passed in times[name]]
        size = weight_bytes(folders[name]) if folders and name in folders else 0
        measures.append(Measure(name, parameters(models[name]), size or tensor_bytes(models[name]), *_middle(speeds)))
    ratios = [slow / fast for slow, fast in zip(times[names[0]], times[names[-1]], strict=True)]
    device = _device(models[names[-1]])
    return Comparison(
        tuple(measures),
        statistics.median(ratios),
        sentences,
        len(ratios),
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch.get_num_threads(),
        dict(metrics or {}),
    )


def parameters(model: nn.Module) -> int:
    """How many parameters a model has; shared ones count once."""
    return sum(quantised.numbers(parameter) for parameter in model.parameters())


def tensor_bytes(model: nn.Module) -> int:
    """The bytes that a model's saved tensors take; shared ones count once."""
    found = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(found.values())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    accepted = inspect.signature(model.forward).parameters
    device = _device(model)
    return {name: batch[name].to(device) for name in _INPUTS if name in batch and name in accepted}


def _precision(models: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """That of the forwards, where a model has weights in half precision."""
    held = list(models)
    half = next((found for model in held if (found := halved(model)) is not None), None)
    return nullcontext() if half is None else torch.autocast(_device(held[0]).type, dtype=half)


@torch.inference_mode()
def _read(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
    for batch in batches:
        model(**batch)
    if _device(model).type == "cuda":
        torch.cuda.synchronize(_device(model))


def _middle(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    if len(values) < 2:
        return values[0], (values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (low, high)


def _count(number: int) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 100_000 else f"{number:,}"


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
