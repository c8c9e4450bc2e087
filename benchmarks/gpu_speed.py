"""Part 3 of `gpu.py`: tokens a second of an 8B teacher and a 1.7B student, over the bare sum of both.

The bare sum is the teacher's forward without gradient, the student's forward, its loss, its backward and AdamW, by
torch and transformers alone. Teachers have bf16 weights; the student has fp32 weights under autocast, or, with Gemini,
bf16 weights and fp32 masters.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import table
from gpu_rows import Options, Row
from gpu_world import (
    GIB,
    NO_COMPILER,
    SOFT,
    batch,
    host_gib,
    info_of,
    made,
    peak,
    planned,
    seconds,
    shape_of,
    use_host_accelerator,
)  # fmt: skip

from gkd_dsl.graph.passes.sparse import sparse
from gkd_dsl.graph.plan import SpecPlan, StagePlan
from gkd_dsl.graph.stored import sparse_keys
from gkd_dsl.planning.estimate import estimate_stage
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import Machine
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.backends.make import make_backend
from gkd_dsl.runtime.step import StepModule, make_projections
from gkd_dsl.runtime.teachers.base import TeacherSource
from gkd_dsl.runtime.teachers.cached import CachedTeachers, FillingTeachers
from gkd_dsl.runtime.teachers.live import LiveTeachers
from gkd_dsl.runtime.teachers.make import Placement, layout_of
from gkd_dsl.runtime.teachers.store import Store
from gkd_dsl.runtime.teachers.streamed import StreamedTeachers, in_host_memory
from gkd_dsl.schedules import Clock

LINK = Machine(1, 2**37, 2**37)
GEMINI = {"backend": "gemini"}
WAYS: dict[str, tuple[Mapping[str, Any], str]] = {
    "resident": ({}, "resident"),
    "offload": ({}, "offload"),
    "cached": ({}, "cached"),
    "gemini, teacher in chunks": (GEMINI, "gemini"),
    "gemini, teacher resident": (GEMINI, "resident"),
    "resident, whole logits": ({"fuse_logits": "off"}, "resident"),
    "gemini, optimiser offloaded": ({**GEMINI, "offload_optim_frac": 1.0}, "resident"),
    "resident, checkpointing": ({"checkpoint": True}, "resident"),
    "gemini, teacher offloaded": (GEMINI, "offload"),
}


def rows(options: Options) -> list[Row]:
    """The bare sum, then ours, each in a process of its own."""
    found = [Row("bare sum", bare, "", 150.0, base=True)]
    for name, (runtime, place) in WAYS.items():
        env = NO_COMPILER if runtime.get("backend") == "gemini" else {}
        found.append(Row(name, partial(ours, "8B", runtime, place, torch.bfloat16), "", 150.0, env))
    return found


def size(options: Options) -> tuple[int, int]:
    """Rows and tokens of a micro-batch."""
    return (2, 32) if options.quick else (4, 512)


def bare(options: Options) -> dict[str, Any]:
    """Both models by transformers."""
    teacher_shape, student_shape = shape_of("8B", options), shape_of("1.7B", options)
    count, length = size(options)
    stage = planned(teacher_shape, student_shape, rows=count, length=length).stages[0]
    teacher = made(info_of(stage, "t"), options.device, torch.bfloat16, seed=1).requires_grad_(False)
    student = made(info_of(stage, "s"), options.device, torch.float32, seed=2).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    inputs = batch(count, length, teacher_shape.words, options.seed, options.device)
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def forward() -> None:
        with torch.no_grad(), torch.autocast(options.device, torch.bfloat16):
            teacher(**asked, use_cache=False)

    def train() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            loss = student(**asked, labels=inputs["labels"], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        forward()
        train()

    with peak(options) as memory:
        step()
    step()
    rounds = 3 if options.quick else 5
    both = seconds(step, options, rounds, 1)
    parts = {"teacher_seconds": forward, "student_seconds": train}
    return {
        **_speed(both, count * length), **memory,
        **{name: statistics.median(seconds(run, options, rounds, 1)) for name, run in parts.items()},
    }  # fmt: skip


def _speed(times: Sequence[float], tokens: int) -> dict[str, Any]:
    middle = statistics.median(times)
    return {"seconds": middle, "tokens_per_second": tokens / middle, "times": list(times)}


def ours(
    teacher: str, runtime: Mapping[str, Any], place: str, dtype: torch.dtype, options: Options,
    *, alike: bool = False, rounds: int = 5, losses: Mapping[str, str] = SOFT,
) -> dict[str, Any]:  # fmt: skip
    """Steps of a spec: seconds, tokens a second, peak of memory; the teacher's forward alone where it is run."""
    gemini = runtime.get("backend") == "gemini"
    if gemini:
        use_host_accelerator(options)
        runtime = {**runtime, "min_chunk_size_m": 0.001, "search_range_m": 1} if options.quick else runtime
    shape, student_shape = shape_of(teacher, options), shape_of("1.7B", options)
    count, length = size(options)
    plan = planned(
        shape, student_shape, losses=losses, rows=count, length=length,
        runtime={**({} if gemini else {"device": options.device}), "precision": "bf16", **runtime},
    )  # fmt: skip
    stage = plan.stages[0]
    backend = make_backend(plan)
    assert isinstance(backend, LocalBackend)
    device = str(backend.device.type)
    # A loader's batches are in host memory.
    fed = batch(count, length, shape.words, options.seed, "cpu")
    inputs = {name: value.to(device) for name, value in fed.items()}
    rounds = 3 if options.quick else rounds
    found: dict[str, Any] = {}
    run, source = sourced(stage, plan, place, dtype, backend, alike, inputs, options, found)
    student = made(info_of(stage, "s"), "cpu" if gemini else device, torch.float32, seed=2)
    step = StepModule(run, {"s": student}, make_projections(stage.projections), source)
    backend.begin(step, stage.stage.optim)
    clock = Clock(0, 1000, 1000.0)

    def once() -> None:
        backend.step([fed], clock, 1e-5)

    once()
    with peak(options) as memory:
        once()
    found |= {**_speed(seconds(once, options, rounds, 1), count * length), **memory}
    if place != "cached":
        forward = next(f for f in step._fused_forwards.values() if f.model == "t")

        def alone() -> None:
            with torch.no_grad(), backend.taps_context():
                source.taps(forward, inputs, {}, NO_CHANGES)

        found["teacher_seconds"] = statistics.median(seconds(alone, options, max(2, rounds // 2), 1))
    kind = "cuda" if options.cuda else "cpu"
    setup = Setup.of(plan)
    setup = setup if place == "resident" else setup.placing(["t"], place)
    said = estimate_stage(stage, replace(LINK, kind=kind), setup)  # type: ignore[arg-type]
    found |= {"planned_gib": said.device_bytes / GIB, "host_gib": host_gib(), "teacher_dtype": str(dtype)}
    return found


def sourced(
    stage: StagePlan, plan: SpecPlan, place: str, dtype: torch.dtype, backend: LocalBackend, alike: bool,
    inputs: Mapping[str, torch.Tensor], options: Options, found: dict[str, Any],
) -> tuple[StagePlan, TeacherSource]:  # fmt: skip
    """The plan that is run, and the source of the teacher's taps."""
    node = next(node for node in stage.models if node.name == "t")
    device = str(backend.device.type)
    if place == "resident":
        return stage, LiveTeachers([node], {"t": made(node.info, device, dtype, seed=1).requires_grad_(False)})
    if place == "cached":
        live = LiveTeachers([node], {"t": made(node.info, device, dtype, seed=1).requires_grad_(False)})
        layout = layout_of(stage, "t", Placement("cached"))
        folder = Path(tempfile.mkdtemp(prefix="gkd-gpu-store-"))
        count = inputs["input_ids"].shape[0]
        filling = FillingTeachers(live, Store(folder, {}, count), layout)
        plain = next(forward for forward in stage.forwards if forward.model == "t")
        with torch.no_grad(), backend.taps_context():
            filling.fill(plain, inputs)
        filling.store.flush()
        found["stored_bytes_per_token"] = filling.store.bytes / inputs["input_ids"].numel()
        del live, filling
        gc.collect()
        if options.cuda:
            torch.cuda.empty_cache()
        keys = sparse_keys(stage, "t", None)
        run = sparse(stage, dict.fromkeys(keys, layout.top_k)) if layout.top_k is not None else stage
        return run, CachedTeachers(Store(folder, {}, count, read=True), layout)
    model = made(node.info, "cpu", dtype, seed=1, pinned=place == "offload", alike=alike).requires_grad_(False)
    if place == "offload":
        source = StreamedTeachers(node, model, backend.device, in_host_memory)
        found["block_bytes"] = sum(parameter.nbytes for homes in source._homes.values() for _, _, parameter in homes)
        return stage, source
    from gkd_dsl.runtime.teachers.gemini import GeminiTeachers

    held = [model]
    del model
    chunks = {name: value for name, value in plan.runtime if "." not in name}
    return stage, GeminiTeachers(node, held.pop, chunks=chunks)


def body(found: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    base = next((row for row in found if row["row"] == "bare sum" and "error" not in row), None)
    lines = []
    for row in found:
        if "error" in row:
            lines.append([row["row"], row["error"], "", "", "", ""])
            continue
        over = row.get("base") or base
        share = f"{row['tokens_per_second'] / over['tokens_per_second']:.2f}" if over else ""
        forward = f"{row['teacher_seconds']:.3f}" if "teacher_seconds" in row else ""
        memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
        lines.append([row["row"], f"{row['tokens_per_second']:,.0f}", share, f"{row['seconds']:.3f}", forward, memory])
    head = ["", "tokens a second", "over the bare sum", "seconds a step", "the teacher's forward, s", "peak, GiB"]
    return "## 3. An 8B teacher, a 1.7B student\n\n" + table(head, lines)


def _no_changes() -> Any:
    from gkd_dsl.runtime.models.interventions import Edits

    return Edits({}, {})


NO_CHANGES = _no_changes()
