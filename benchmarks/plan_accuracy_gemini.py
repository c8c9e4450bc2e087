"""What `gkd plan` says of memory under Gemini, beside what each process takes, at several of its fractions.

Every case runs in processes of its own, on the CPU and the host accelerator of the tests: the chunks, their placement
and the optimiser are Gemini's own. What Gemini would keep in host memory is told by the decisions that it takes (which
masters are offloaded, which chunks are moved out after use), and counted apart: `host` is all that at the end of a
step, `device` the most bytes that were alive in a step, less that. Needs ColossalAI (`make gemini`).
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import plan_accuracy
import torch
from common import ROOT, parser, report, table
from plan_accuracy import HIDDEN, SOFT, Case

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_path
from gkd_dsl.planning.estimate import estimate_stage
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.units import in_bytes
from gkd_dsl.runtime.backends.make import make_backend
from gkd_dsl.runtime.models.halved import untrained
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.step import StepModule, make_projections
from gkd_dsl.runtime.teachers.live import LiveTeachers
from gkd_dsl.schedules import Clock

GOAL = plan_accuracy.GOAL
CHUNKS = "min_chunk_size_m = 0.25\n  search_range_m = 1"
"""Chunks so small that these models have many of them."""

MANY = plan_accuracy.Size(layers=8, words=2000)
"""Deep, with small embeddings: many chunks of about one size, as large models have."""


@dataclass(frozen=True)
class Row:
    """A spec, so many processes, and how many of the bytes of the teacher's chunks are offloaded; None: it has none."""

    case: Case
    processes: int = 2
    teacher: float | None = None


def _case(name: str, fractions: str = "", **more: Any) -> Case:
    lines = ["backend = gemini", *CHUNKS.split("\n"), *filter(None, fractions.split(", "))]
    return Case(name, "bert", {**SOFT, "hid": HIDDEN}, projects=True, runtime="\n  ".join(lines), **more)


ROWS = (
    Row(_case("all sharded, one process"), 1),
    Row(_case("all sharded")),
    Row(_case("half sharded", "shard_param_frac = 0.5")),
    Row(_case("nothing sharded", "shard_param_frac = 0.0")),
    Row(_case("half of the optimiser offloaded", "offload_optim_frac = 0.5")),
    Row(_case("all of the optimiser offloaded", "offload_optim_frac = 1.0")),
    Row(_case("that, and half of the parameters", "offload_optim_frac = 1.0, offload_param_frac = 0.5")),
    Row(_case("that, and all of the parameters", "offload_optim_frac = 1.0, offload_param_frac = 1.0")),
    Row(_case("all sharded, two micro-batches", accumulate=2)),
    Row(_case("all sharded, checkpointing", "checkpoint = true")),
    Row(_case("teacher in chunks on the device"), teacher=0.0),
    Row(_case("teacher in chunks, half offloaded"), teacher=0.5),
    Row(_case("teacher in chunks, all offloaded"), teacher=1.0),
)


def watched() -> None:
    """Let each chunk know where Gemini would have it: `chunk.home`."""
    sys.path.append(str(ROOT / "tests" / "runtime" / "backends"))
    import host_accelerator

    host_accelerator.install()
    from colossalai.zero.gemini.chunk.chunk import Chunk
    from colossalai.zero.gemini.placement_policy import StaticPlacementPolicy, get_accelerator

    from gkd_dsl.runtime.backends.gemini_frozen import FrozenInChunks

    close, access, move = Chunk.close_chunk, Chunk.access_chunk, Chunk.shard_move
    set_up, evict = StaticPlacementPolicy.setup_grads_device, StaticPlacementPolicy.evict_tensors
    evicting: list[bool] = []

    def closed(self: Any) -> None:
        close(self)
        self.home = "host" if self.shard_device.type == "cpu" and self.cpu_shard is not None else "device"
        if self.dtype != torch.float32:
            # Its alias stands for both.
            self.cpu_shard = None

    def accessed(self: Any, *args: Any, **more: Any) -> Any:
        self.home = "device"
        return access(self, *args, **more)

    def moved(self: Any, device: torch.device, *args: Any, **more: Any) -> None:
        if evicting:
            self.home = "host"
        move(self, device, *args, **more)

    def evicted(self: Any, *args: Any, **more: Any) -> Any:
        evicting.append(True)
        try:
            return evict(self, *args, **more)
        finally:
            evicting.pop()

    def decided(self: Any, params: list[Any], devices: dict[Any, torch.device]) -> None:
        accelerator = get_accelerator()
        accelerator.get_current_device = lambda: torch.device("cuda", 0)
        try:
            set_up(self, params, devices)
        finally:
            del accelerator.get_current_device
        for parameter, device in devices.items():
            chunk = self.chunk_manager.get_chunk(parameter)
            chunk.master_home = "host" if device.type == "cpu" else "device"
            devices[parameter] = torch.device("cpu")

    def arranged(self: Any, shard: float, offload: float) -> None:
        manager, stay = self.chunk_manager, []
        move_, access_ = manager.move_chunk, manager.access_chunk
        manager.move_chunk = lambda chunk, *args: stay.append(chunk) or move_(chunk, *args)
        manager.access_chunk = lambda chunk: stay.append(chunk) or access_(chunk)
        try:
            arrange(self, shard, offload)
        finally:
            del manager.move_chunk, manager.access_chunk
        for chunk in manager.get_chunks(self.fp16_params):
            chunk.stays = chunk in stay

    arrange, FrozenInChunks._arrange = FrozenInChunks._arrange, arranged
    Chunk.close_chunk, Chunk.access_chunk, Chunk.shard_move = closed, accessed, moved
    StaticPlacementPolicy.setup_grads_device, StaticPlacementPolicy.evict_tensors = decided, evicted


def in_host(wrapped: Any, moments: int) -> int:
    """Bytes of a wrapped module's chunks, masters and moments that Gemini would have in host memory now."""
    chunks = wrapped.chunk_manager.get_chunks(wrapped.fp16_params)
    if not moments:
        return sum(c.shard_mem for c in chunks if not c.stays)
    total = sum(c.shard_mem for c in chunks if c.home == "host" and not c.is_gathered)
    # A master has twice the bytes of its chunk, and so has each moment.
    return total + sum(2 * c.shard_mem * (1 + moments) for c in chunks if c.master_home == "host")


def measure(row: Row, folder: Path, size: Any) -> dict[str, Any]:
    """One process of a case: what is planned for it, and what it takes."""
    watched()
    from gkd_dsl.runtime.teachers.gemini import GeminiTeachers

    checked = check_path(folder / "spec.gkd")
    if not checked.ok:
        raise SystemExit(f"{row.case.name}: {[d.message for d in checked.diagnostics]}")
    plan = compile_plan(checked.graph, runtime=checked.runtime)
    stage, setup = plan.stages[0], Setup.of(plan)
    if row.teacher is not None:
        setup = setup.placing(["t"], "gemini").offloading(["t"], row.teacher)
    planned = estimate_stage(stage, Machine(row.processes, 2**40, 2**40, kind="cpu"), setup)
    backend = make_backend(plan)
    half = untrained(plan, "bf16") if row.teacher is None else {}
    models = {node.name: backend.place(load(node.info, seed=1, half=half.get(node.name))) for node in stage.models}
    node = next(node for node in stage.models if node.name == "t")
    if row.teacher is None:
        teachers: Any = LiveTeachers([node], models)
    else:
        chunks = {name: value for name, value in plan.runtime if "." not in name}
        teachers = GeminiTeachers(node, lambda: models.pop("t"), shard=1.0, offload=row.teacher, chunks=chunks)
    models = {name: model for name, model in models.items() if name == "s" or row.teacher is None}
    step = StepModule(stage, models, make_projections(stage.projections), teachers)
    backend.begin(step, stage.stage.optim)
    made = plan_accuracy.batches(stage, node.info.size("V") or 8)
    backend.step(made, Clock(0, 4, 4.0), 1e-4)
    most = peak(lambda number: backend.step(made, Clock(number, 4, 4.0), 1e-4))
    host = in_host(backend._wrapped, 2)  # type: ignore[attr-defined]
    if row.teacher is not None:
        host += in_host(teachers._wrapped, 0)
    held = sum(model.host for model in planned.models) + dict(planned.host).get("optimizer", 0)
    return {
        "case": row.case.name, "processes": row.processes, "planned": planned.device_bytes + held / row.processes,
        "measured": most, "planned_host": held / row.processes, "measured_host": int(host),
        "parts": dict(planned.device), "moment": planned.moment,
    }  # fmt: skip


def peak(step: Callable[[int], Any]) -> int:
    """The most bytes while a step runs, the second of two that the profiler sees.

    It hears nothing of the end of what was there before it, and chunks are made anew each time that they are used.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step(1)
        gc.collect()
        between, live = time.time_ns(), plan_accuracy.living()
        step(2)
    now = first = top = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            if event.start_ns() < between:
                first = top = now
            top = max(top, now)
    return live + top - first


def started(number: int, folder: Path, out: Path, quick: bool) -> list[dict[str, Any]]:
    """A case in its processes: what each found."""
    row = ROWS[number]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, __file__, "--rank", str(number), "--folder", str(folder), "--found", str(out)]
    running = [
        subprocess.Popen(
            [*words, *(["--quick"] if quick else [])],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(row.processes),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(row.processes)
    ]  # fmt: skip
    ended = [(process.communicate()[1], process.returncode) for process in running]
    for said, code in ended:
        if code:
            raise SystemExit(f"{row.case.name} failed:\n{said[-3000:]}")
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(row.processes)]


def main() -> None:
    options_ = parser(__doc__)
    options_.add_argument("--only", help="cases whose name has this word")
    for name in ("--rank", "--folder", "--found"):
        options_.add_argument(name, help="of a process that this script starts")
    options = options_.parse_args()
    size = plan_accuracy.MINIATURE if options.quick else MANY
    if options.rank is not None:
        torch.set_num_threads(1)
        found = measure(ROWS[int(options.rank)], Path(options.folder), size)
        Path(f"{options.found}.{os.environ['RANK']}").write_text(json.dumps(found))
        return
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(ROWS):
        if options.only and options.only not in row.case.name:
            continue
        with TemporaryDirectory() as place:
            plan_accuracy.write(row.case, Path(place), size)
            each = started(number, Path(place), Path(place) / "found", options.quick)
        # The process that takes the most.
        worst = max(each, key=lambda one: one["measured"])
        worst["ratio"] = worst["planned"] / worst["measured"]
        worst["device_ratio"] = (worst["planned"] - worst["planned_host"]) / (
            worst["measured"] - worst["measured_host"]
        )
        rows.append(worst)
        print(f"{row.case.name:36} {worst['ratio']:.3f} {worst['device_ratio']:.3f} {worst['parts']}", flush=True)
    body = table(
        ["Gemini, static", "processes", "planned: device", "host", "measured: device", "host",
         "all, planned over measured", "device, planned over measured", "where the plan has its peak"],
        [[row["case"], str(row["processes"]), in_bytes(row["planned"] - row["planned_host"]),
          in_bytes(row["planned_host"]), in_bytes(row["measured"] - row["measured_host"]),
          in_bytes(row["measured_host"]), f"{row['ratio']:.3f}", f"{row['device_ratio']:.3f}", row["moment"]]
         for row in rows],
    )  # fmt: skip
    outside = [row["case"] for row in rows if max(abs(row["ratio"] - 1), abs(row["device_ratio"] - 1)) > GOAL]
    body += f"\n\nWithin 10 %: {len(rows) - len(outside)} of {len(rows)}."
    if outside:
        body += f" Outside: {'; '.join(outside)}."
    settings = {
        "models": f"BERT, teacher {2 * size.layers} x {2 * size.width}, student {size.layers} x {size.width}, random",
        "bytes": "of each process: the one that takes the most",
    }
    title = "Planned memory beside counted memory, under Gemini"
    report("plan_accuracy_gemini", options.out, title, settings, body, rows, quick=options.quick)


if __name__ == "__main__":
    main()
