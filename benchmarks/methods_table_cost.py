"""What a step of each method costs over plain fine-tuning: seconds side by side, and peak memory.

Every stage of every method is run for a few steps on the same batches. In each round all methods take their turn in
one process, and each is divided by the two references of its round: plain fine-tuning and KD. The plain
fine-tuning that follows a method on language models is not counted, nor stages that train others than the student.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import methods_table_specs as specs
import torch
from methods_table_specs import BASELINE, Made, Settings

import gkd_dsl
from gkd_dsl.graph.plan import StagePlan
from gkd_dsl.runtime.backends.base import Settings as BackendSettings
from gkd_dsl.runtime.backends.base import StepResult
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.data.loader import Loader, make_loader
from gkd_dsl.runtime.errors import Stopped
from gkd_dsl.runtime.models.load import load_tokenizer
from gkd_dsl.runtime.stages import Run, student_of
from gkd_dsl.runtime.step import Batch
from gkd_dsl.schedules import Clock

REFERENCES = (BASELINE, "kd")
WARMUP = 1
"""Steps of a stage that are not timed."""


class Meter(LocalBackend):
    """The local backend with a clock around each step, or, with `memory`, a count of the bytes it holds."""

    def __init__(self, device: str, *, memory: bool = False) -> None:
        super().__init__(BackendSettings(device=device))
        self.memory = memory
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.bytes: dict[str, int] = defaultdict(int)

    def step(self, batches: Sequence[Batch], clock: Clock, rate: float) -> StepResult:
        """As the local backend's."""
        stage = self._held()[0].plan.name
        if self.memory:
            return self._counted(stage, batches, clock, rate)
        self._wait()
        started = time.perf_counter()
        result = super().step(batches, clock, rate)
        self._wait()
        self.seconds[stage].append(time.perf_counter() - started)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _counted(self, stage: str, batches: Sequence[Batch], clock: Clock, rate: float) -> StepResult:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            result = super().step(batches, clock, rate)
            found = torch.cuda.max_memory_allocated()
        else:
            held = living()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
                result = super().step(batches, clock, rate)
            found = held + most(seen)
        self.bytes[stage] = max(self.bytes[stage], found)
        return result


def living() -> int:
    """The bytes of all tensors, storages that they share counted once."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        # Not isinstance: some modules answer it with a warning.
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def most(seen: Any) -> int:
    """The most bytes that were allocated at once, over those at the start."""
    now = top = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


def measure(
    settings: Settings, work: Path, names: Sequence[str], seed: int, *, rounds: int, steps: int
) -> dict[str, dict[str, Any]]:
    """By method: `seconds` of a step, the ratios to the references round by round, and peak `bytes`.

    What goes wrong with a method is its `error`.
    """
    wanted = list(dict.fromkeys([*REFERENCES, *names]))
    loaders: dict[tuple[object, ...], Loader] = {}
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in wanted}
    made: dict[str, tuple[Made, Made]] = {}
    for name in wanted:
        try:
            made[name] = _specs(settings, work, name, seed, WARMUP + steps)
        except Exception as error:  # reported beside the others
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    for number in range(rounds):
        order = list(made)
        order = order[number % len(order) :] + order[: number % len(order)]
        for name in order:
            if "error" in found[name]:
                continue
            try:
                meter = run(made[name][1], Meter(settings.device), loaders)
                found[name]["seconds"].append(_mean(made[name][0], meter.seconds))
            except Stopped as stopped:
                raise KeyboardInterrupt from stopped
            except Exception as error:  # reported beside the others
                found[name] = {"error": f"{type(error).__name__}: {error}"}
    for name in made:
        if "error" not in found[name]:
            short = _specs(settings, work, name, seed, 2)[1]
            found[name]["bytes"] = max(run(short, Meter(settings.device, memory=True), loaders).bytes.values())
    return {name: _ratios(found, name) for name in found}


def _specs(settings: Settings, work: Path, name: str, seed: int, steps: int) -> tuple[Made, Made]:
    """The spec as the table runs it, which says how its stages share the steps, and one of a few steps a stage."""
    whole, short = (work / "cost" / f"{name.replace(' ', '_')}-{what}" for what in ("whole", "short"))
    if name == BASELINE:
        brief = Settings(**{**vars(settings), "steps": steps})
        return specs.baseline(settings, seed, whole), specs.baseline(brief, seed, short)
    return specs.method(settings, name, seed, whole), specs.method(settings, name, seed, short, each=steps)


def run(made: Made, meter: Meter, loaders: dict[tuple[object, ...], Loader]) -> Meter:
    """All stages of a spec, without a folder, with the batches of the loaders made so far."""
    spec = gkd_dsl.load(made.path)

    def loader(plan: StagePlan) -> Loader:
        node = student_of(plan)
        assert plan.stage.source is not None
        key = (node.info.task, plan.columns)
        if key not in loaders:
            loaders[key] = make_loader(
                plan.stage,
                plan.stage.source,
                load_tokenizer(node.info),
                task=node.info.task,
                columns=plan.columns,
                seed=plan.stage.seed,
                root=spec.root,
                classes=node.info.size("C"),
            )
        return loaders[key]

    Run(spec.plan(), root=spec.root, backend=meter, loaders=loader).run()
    gc.collect()
    return meter


def _mean(made: Made, seconds: Mapping[str, Sequence[float]]) -> float:
    """Seconds of a step: the mean over a method's own stages that train the student, each by its share of the steps."""
    counted = [stage for stage in made.stages if stage.student and not stage.plain] or list(made.stages)
    times = [statistics.mean(seconds[stage.name][WARMUP:]) for stage in counted]
    return statistics.fmean(times, weights=[stage.steps for stage in counted])


def _ratios(found: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    row = found[name]
    if "error" in row:
        return row
    plain, kd = (found[reference] for reference in REFERENCES)
    made: dict[str, Any] = {"seconds": statistics.median(row["seconds"]), "bytes": row["bytes"]}
    for key, reference in (("over_plain", plain), ("over_kd", kd)):
        if "error" not in reference:
            made[key] = [a / b for a, b in zip(row["seconds"], reference["seconds"], strict=True)]
    if "error" not in plain:
        made["memory_over_plain"] = row["bytes"] / plain["bytes"]
    return made


def clear(work: Path) -> None:
    """Drop the specs that were made for timing."""
    shutil.rmtree(work / "cost", ignore_errors=True)
