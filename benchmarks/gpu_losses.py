"""Part 1 of `gpu.py`: the same spec by every backend and placement gives the same losses, step by step."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import table
from gpu_rows import Options, Row
from gpu_world import HIDDEN, NO_COMPILER, SOFT, Data, Shape, made, planned, use_host_accelerator

from gkd_dsl.graph.plan import SpecPlan
from gkd_dsl.runtime.stages import Run

TOLERANCE = 0.03
"""Of each loss, relative: bf16 rounds to 2^-8, and steps differ by a few of that."""
BF16 = {"precision": "bf16"}
STATIC = {"backend": "gemini", "placement_policy": "static"}
WAYS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "local, bf16, again": (BF16, {}),
    "local, fp32": ({}, {}),
    "local, bf16, whole logits": ({**BF16, "fuse_logits": "off"}, {}),
    "local, bf16, checkpointing": ({**BF16, "checkpoint": True}, {}),
    "local, bf16, teacher offloaded": (BF16, {"placement": "offload"}),
    "ddp, bf16": ({**BF16, "backend": "ddp"}, {}),
    "gemini, static": (STATIC, {}),
    "gemini, static, half of the optimiser offloaded": ({**STATIC, "offload_optim_frac": 0.5}, {}),
    "gemini, static, optimiser offloaded": ({**STATIC, "offload_optim_frac": 1.0}, {}),
    "gemini, static, all offloaded": ({**STATIC, "offload_optim_frac": 1.0, "offload_param_frac": 1.0}, {}),
    "gemini, auto": ({"backend": "gemini", "placement_policy": "auto"}, {}),
    "gemini, teacher offloaded": (STATIC, {"placement": "offload"}),
    "gemini, teacher in its chunks": (STATIC, {"placement": "gemini"}),
}
REFERENCE = "local, bf16"
OWN_KERNELS = "gemini, static, ColossalAI's own kernels"


def rows(options: Options) -> list[Row]:
    """The reference first; those of Gemini in a process of their own."""
    found = [Row(REFERENCE, partial(run, REFERENCE, BF16, {}), "plain", base=True)]
    for name, (runtime, placement) in WAYS.items():
        gemini = runtime.get("backend") == "gemini"
        if runtime.get("placement_policy") == "auto" and not options.cuda:
            continue  # It asks CUDA for memory that is free.
        group = "gemini" if gemini else "plain"
        found.append(Row(name, partial(run, name, runtime, placement), group, 90.0, NO_COMPILER if gemini else {}))
    if options.cuda:
        found.insert(8, Row("NCCL, one process", nccl, "nccl"))
        found.append(Row(OWN_KERNELS, partial(run, OWN_KERNELS, STATIC, {}), "kernels", 240.0))
    return found


def sizes(options: Options) -> tuple[Shape, Shape, int, int, int]:
    """Teacher, student, rows, length, steps."""
    if options.quick:
        return Shape(3, 64, 4, 2, 128, 300), Shape(2, 32, 4, 2, 64, 300), 4, 16, 4
    return Shape(12, 1024, 8, 4, 2816, 32000), Shape(6, 512, 8, 4, 1408, 32000), 8, 256, 12


class Heard:
    """The losses of each step."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []
        self.norms: list[float] = []

    def on_stage(self, record: Any) -> None:
        """Nothing to keep."""

    def on_step(self, record: Any) -> None:
        """Keep the numbers of a step."""
        self.losses.append([record.loss, *record.terms.values()])
        self.norms.append(record.gradient_norm)

    def on_evaluate(self, record: Any) -> None:
        """Nothing to keep."""

    def close(self) -> None:
        """Nothing to close."""


def run(name: str, runtime: Mapping[str, Any], placement: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """The losses of a run, and how far they are from those of the reference."""
    gemini = runtime.get("backend") == "gemini"
    if gemini:
        use_host_accelerator(options)
        runtime = {**runtime, "min_chunk_size_m": 0.001, "search_range_m": 1} if options.quick else runtime
    heard = losses(runtime, placement, options)
    kept = Path(tempfile.gettempdir()) / f"gkd-gpu-reference-{os.environ.get('GKD_GPU_RUN', os.getppid())}.json"
    if name == REFERENCE:
        kept.write_text(json.dumps([heard.losses, heard.norms]))
    found: dict[str, Any] = {"first": heard.losses[0][0], "last": heard.losses[-1][0], "losses": heard.losses}
    if kept.is_file():
        wanted, norms = json.loads(kept.read_text())
        found |= {"gap": gap(heard.losses, wanted), "norm_gap": gap([heard.norms], [norms])}
        found["same"] = found["gap"] <= TOLERANCE
    if gemini:
        from gkd_dsl.runtime.backends.gemini import kernels

        found["adam"] = kernels()
    return found


def losses(runtime: Mapping[str, Any], placement: Mapping[str, Any], options: Options) -> Heard:
    """Run the spec with these settings."""
    teacher, student, size, length, steps = sizes(options)
    where = {} if runtime.get("backend") == "gemini" else {"device": options.device}
    plan: SpecPlan = planned(
        teacher, student, losses={**SOFT, **HIDDEN}, rows=size, length=length, steps=steps, rate=1e-3, accumulate=2,
        runtime={**where, **runtime}, placement=placement,
    )  # fmt: skip
    heard = Heard()
    data = Data(size, length, teacher.words, 4, options.seed)
    run = Run(plan, loaders=lambda stage: data, listeners=[heard])
    for number, node in enumerate(plan.stages[0].models):
        # On the host first, so that all start from the same numbers.
        model = made(node.info, "cpu", torch.float32, seed=options.seed + number)
        away = node.name == "t" and placement
        run.models[node.name] = model if away else run.backend.place(model)
    run.run()
    return heard


def gap(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """The largest relative difference."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs)


def nccl(options: Options) -> dict[str, Any]:
    """A process that is alone meets itself: sums over NCCL on the GPU and over gloo on the host."""
    import torch.distributed as dist

    from gkd_dsl.runtime.processes import Processes

    processes = Processes()
    processes.join(torch.device("cuda"))
    value, host = torch.full((1000,), 2.0, device="cuda"), torch.ones(4)
    dist.all_reduce(value)
    dist.all_reduce(host)
    dist.broadcast(value, src=0)
    assert float(value.sum()) == 2000.0
    assert float(host.sum()) == 4.0
    return {"backend": dist.get_backend(), "same": True}


def body(found: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    lines = []
    for row in found:
        if "error" in row:
            lines.append([row["row"], row["error"], "", "", ""])
            continue
        numbers = [f"{row[key]:.4f}" if key in row else "" for key in ("first", "last")]
        lines.append([row["row"], "yes" if row.get("same") else "NO",
                      f"{row['gap']:.1e}" if "gap" in row else "", *numbers])  # fmt: skip
    head = ["", f"within {TOLERANCE:.0%} of the reference", "largest gap of any loss in any step", "first", "last"]
    return "## 1. The same losses\n\nReference: " + REFERENCE + ".\n\n" + table(head, lines)
