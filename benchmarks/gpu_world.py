"""Models of real shapes with random weights, specs, batches, and clocks for the parts of `gpu.py`."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_rows import Options
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.graph.plan import SpecPlan, StagePlan
from gkd_dsl.meaning.check import check_path
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.runtime.models.load import build
from gkd_dsl.runtime.session import plan_of
from gkd_dsl.runtime.teachers.cached import ROW

GIB = 2**30
WORDS = 151936
_POOL = 4_194_301


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of the Qwen3 kind."""

    layers: int
    width: int
    heads: int
    groups: int
    inner: int
    words: int = WORDS
    tied: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The fields of its config.json."""
        head = 128 if self.width >= 1024 else self.width // self.heads
        return {
            "model_type": "qwen3", "hidden_size": self.width, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.groups, "head_dim": head,
            "intermediate_size": self.inner, "vocab_size": self.words, "tie_word_embeddings": self.tied,
            "pad_token_id": 0, "max_position_embeddings": 8192,
        }  # fmt: skip


SHAPES = {
    "1.7B": Shape(28, 2048, 16, 8, 6144, tied=True),
    "8B": Shape(36, 4096, 32, 8, 12288),
    "14B": Shape(40, 5120, 40, 8, 17408),
    "32B": Shape(64, 5120, 64, 8, 25600),
    "70B": Shape(80, 8192, 64, 8, 28672),
}
MINIATURE = {
    "1.7B": Shape(2, 64, 4, 2, 128, 512, tied=True),
    "8B": Shape(3, 96, 4, 2, 192, 512),
    "14B": Shape(4, 96, 4, 2, 192, 512),
    "32B": Shape(5, 128, 4, 2, 256, 512),
    "70B": Shape(6, 128, 4, 2, 256, 512),
}


def shape_of(name: str, options: Options) -> Shape:
    """The sizes of a model, in miniature for a smoke run."""
    return (MINIATURE if options.quick else SHAPES)[name]


SPEC = """gkd 1
teacher t = random_init("./t", task = causal_lm)
student s = random_init("./s", task = causal_lm)
param rows: text "never read: batches are drawn"
data d = text(rows)
{losses}
stage main for {steps} steps {{
  minimize {objective}
  batch_size = {rows}
  accumulate = {accumulate}
  max_length = {length}
  optim = adamw(lr = {rate})
}}
runtime {{
  {runtime}
}}
"""
SOFT = {"hard": "cross_entropy(s.logits, batch.labels)", "soft": "kl(s.logits <- t.logits)"}
HIDDEN = {"hid": "mean(mse(s.layer[i].out |> W <- t.layer[j].out) for (i, j) in uniform(s.layer, t.layer))"}


def planned(
    teacher: Shape, student: Shape, *, losses: Mapping[str, str] = SOFT, rows: int, length: int, steps: int = 8,
    rate: float = 1e-4, accumulate: int = 1, runtime: Mapping[str, Any] | None = None,
    placement: Mapping[str, Any] | None = None,
) -> SpecPlan:  # fmt: skip
    """A spec of two models, checked and compiled. Raises ValueError with what the check says."""
    settings = [f"{name} = {_word(value)}" for name, value in (runtime or {}).items()]
    if placement:
        inside = "\n    ".join(f"{name} = {_word(value)}" for name, value in placement.items())
        settings.append(f"teacher t {{\n    {inside}\n  }}")
    lines = ["project W = linear(s.H -> t.H)"] if any("|> W" in text for text in losses.values()) else []
    lines += [f"loss {name} = {text}" for name, text in losses.items()]
    text = SPEC.format(
        losses="\n".join(lines), steps=steps, rate=rate, objective=" + ".join(losses), rows=rows, accumulate=accumulate,
        length=length, runtime="\n  ".join(settings),
    )  # fmt: skip
    with TemporaryDirectory() as place:
        folder = Path(place)
        for name, shape in (("t", teacher), ("s", student)):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(shape.config))
        (folder / "spec.gkd").write_text(text)
        checked = check_path(folder / "spec.gkd")
        if not checked.ok:
            raise ValueError("; ".join(d.message for d in checked.diagnostics))
        checked.unset.clear()
        return plan_of(checked)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def info_of(plan: StagePlan, name: str) -> ModelInfo:
    """What is known of a model of a plan."""
    return next(node.info for node in plan.models if node.name == name)


def made(
    info: ModelInfo, device: str, dtype: torch.dtype, *, seed: int = 0, pinned: bool = False, alike: bool = False
) -> PreTrainedModel:
    """A model with random weights, made where it will be, without its class's own initialisation.

    With `pinned` host memory is page-locked at once. With `alike` all blocks share the memory of the first one's
    weights: the arithmetic and the traffic are those of the whole model, its memory is not.
    """
    with torch.device("meta"):
        model = build(info)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            parent, _, last = name.rpartition(".")
            with torch.device("cpu"):
                setattr(model.get_submodule(parent), last, type(module)(config=model.config).to(device))
    fill = Filler(device, dtype, seed, pinned)
    shared: dict[str, Tensor] = {}
    tied: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in tied:
                # The name of the same weight in whatever block.
                place = ".".join(part for part in name.split(".") if not part.isdigit()) + f".{key}"
                if not (alike and ".layers." in f".{name}."):
                    value = fill(parameter.shape)
                else:
                    value = shared[place] if place in shared else shared.setdefault(place, fill(parameter.shape))
                tied[id(parameter)] = nn.Parameter(value, requires_grad=False)
            module._parameters[key] = tied[id(parameter)]
    model.tie_weights()
    left = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if left:
        raise RuntimeError(f"without values: {left[:4]}")
    return model.requires_grad_(True).eval()


class Filler:
    """Tensors of normal numbers of a standard deviation of 0.02 (vectors are ones), made quickly.

    On a GPU they are drawn; in host memory they repeat a few million numbers, which is a matter of copying.
    """

    def __init__(self, device: str, dtype: torch.dtype, seed: int, pinned: bool) -> None:
        self.device, self.dtype, self.pinned = device, dtype, pinned and torch.cuda.is_available()
        self.generator = torch.Generator(device).manual_seed(seed)
        self.pool: Tensor | None = None

    def __call__(self, shape: torch.Size) -> Tensor:
        """A new tensor."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        if self.device == "cuda":
            return torch.empty(shape, dtype=self.dtype, device="cuda").normal_(0.0, 0.02, generator=self.generator)
        made = torch.empty(shape, dtype=self.dtype, pin_memory=self.pinned)
        if self.pool is None:
            self.pool = torch.empty(_POOL).normal_(0.0, 0.02, generator=self.generator).to(self.dtype)
        for part in made.view(-1).split(_POOL):
            part.copy_(self.pool[: part.numel()])
        return made


def batch(rows: int, length: int, words: int, seed: int, device: str, first_row: int = 0) -> dict[str, Tensor]:
    """Random tokens without padding; its row numbers from `first_row` on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, words, (rows, length), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    found[ROW] = torch.arange(first_row, first_row + rows)
    return {name: value.to(device) for name, value in found.items()}


class Data:
    """The same few micro-batches in each epoch; the last row of each is shorter than the others."""

    def __init__(self, rows: int, length: int, words: int, count: int, seed: int = 0) -> None:
        self.count = count
        self._batches = []
        for number in range(count):
            made = batch(rows, length, words, seed + number, "cpu", first_row=number * rows)
            del made[ROW]
            made["attention_mask"][-1, length - length // 4 :] = 0
            made["labels"].masked_fill_(made["attention_mask"] == 0, -100)
            made["input_ids"] *= made["attention_mask"]
            self._batches.append(made)

    def steps_per_epoch(self, accumulate: int = 1) -> int:
        """Optimiser steps in an epoch."""
        return max(1, self.count // accumulate)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The micro-batches."""
        yield from self._batches[start:]

    def held_out(self) -> Iterator[dict[str, Tensor]]:
        """Nothing."""
        return iter(())

    def tokens(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens without padding."""
        return int(batch["attention_mask"].sum())


def wait(options: Options) -> None:
    """Until the device has done all that it was given."""
    if options.cuda:
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], options: Options, rounds: int, warmup: int) -> list[float]:
    """Seconds of each round, everything done."""
    found = []
    for number in range(warmup + rounds):
        wait(options)
        start = time.perf_counter()
        run()
        wait(options)
        if number >= warmup:
            found.append(time.perf_counter() - start)
    return found


@contextmanager
def peak(options: Options) -> Iterator[dict[str, float]]:
    """The peak of memory on the device, GiB, while the body runs: allocated, and reserved by the allocator."""
    found: dict[str, float] = {}
    if options.cuda:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if options.cuda:
        torch.cuda.synchronize()
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB


def host_gib() -> float:
    """The most memory that this process has had, GiB; page-locked memory is part of it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    return 0.0


def use_host_accelerator(options: Options) -> None:
    """Gemini without a GPU, as the tests have it; with one, nothing."""
    if not options.cuda:
        import sys

        sys.path.append(str(Path(__file__).parents[1] / "tests" / "runtime" / "backends"))
        from host_accelerator import install

        install()


# ColossalAI's own kernels would be compiled at first use, which takes minutes: so Gemini has torch's fused Adam.
NO_COMPILER = {"CUDA_HOME": "/nonexistent"}
