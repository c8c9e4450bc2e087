"""Part 4 of `gpu.py`: teachers of 14B, 32B and 70B beside a 1.7B student: whether it runs, memory, the link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from common import table
from gpu_rows import Options, Row
from gpu_speed import ours
from gpu_world import NO_COMPILER, seconds, wait

GEMINI = {"backend": "gemini", "offload_optim_frac": 1.0}
LEAN = {"checkpoint": True}


def rows(options: Options) -> list[Row]:
    """The link first, then what should run, then what should not."""
    bf16 = torch.bfloat16

    def large(name: str, runtime: Mapping[str, Any], place: str, dtype: torch.dtype = bf16, **more: Any) -> Any:
        return partial(ours, name, runtime, place, dtype, rounds=3, **more)

    return [
        Row("the link", link, "", 60.0, base=True),
        Row("70B, offload, the blocks share one block's host memory", large("70B", LEAN, "offload", alike=True), "",
            150.0),
        Row("14B, offload", large("14B", LEAN, "offload"), "", 120.0),
        Row("32B, offload", large("32B", LEAN, "offload"), "", 200.0),
        Row("14B, resident", large("14B", LEAN, "resident"), "", 90.0),
        Row("14B, gemini, in chunks in host memory", large("14B", GEMINI, "gemini"), "", 200.0, NO_COMPILER),
        Row("32B, resident (does not fit in 80 GB)", large("32B", LEAN, "resident"), "", 90.0),
        Row("14B, resident, fp32 weights (do not fit in 80 GB)", large("14B", LEAN, "resident", torch.float32), "",
            90.0),
    ]  # fmt: skip


def link(options: Options) -> dict[str, Any]:
    """Bytes a second of copies of page-locked memory to the device and back."""
    size = 2**20 if options.quick else 2**30
    host = torch.empty(size, dtype=torch.uint8, pin_memory=options.cuda)
    host.zero_()
    there = torch.empty(size, dtype=torch.uint8, device=options.device)
    wait(options)
    found: dict[str, Any] = {"bytes": size}
    ways = {"to_device": lambda: there.copy_(host, non_blocking=True), "to_host": lambda: host.copy_(there)}
    for name, run in ways.items():
        found[name] = size / min(seconds(run, options, 10, 2))
    # What blocks are copied as: matrices of tens of megabytes one after the other.
    parts = list(zip(there.split(size // 16), host.split(size // 16), strict=True))

    def pieces() -> None:
        for one, other in parts:
            one.copy_(other, non_blocking=True)

    found["to_device_in_pieces"] = size / min(seconds(pieces, options, 10, 2))
    return found


def body(found: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    measured = next((row for row in found if row["row"] == "the link" and "error" not in row), None)
    lines = []
    for row in found:
        if row["row"] == "the link" and "error" not in row:
            continue
        if "error" in row:
            lines.append([row["row"], row["error"], "", "", "", "", ""])
            continue
        moved, over = row.get("block_bytes"), row.get("base") or measured
        speed = over["to_device"] if over else None
        share = f"{moved / row['teacher_seconds'] / speed:.0%}" if moved and speed else ""
        over_step = f"{moved / row['seconds'] / speed:.0%}" if moved and speed else ""
        memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
        lines.append([row["row"], "yes", memory, f"{row['host_gib']:.1f}", f"{row['seconds']:.2f}",
                      f"{row['tokens_per_second']:,.0f}", f"{share} ({over_step})" if share else ""])  # fmt: skip
    head = ["teacher", "runs", "peak of the device, GiB", "of the host, GiB", "seconds a step", "tokens a second",
            "share of the link in the teacher's forward (in the step)"]  # fmt: skip
    text = "## 4. Teachers beside a 1.7B student\n\n"
    if measured:
        text += (
            f"The link, measured: {measured['to_device'] / 1e9:.1f} GB/s to the device, "
            f"{measured['to_host'] / 1e9:.1f} GB/s back, "
            f"in sixteen pieces {measured['to_device_in_pieces'] / 1e9:.1f} GB/s.\n\n"
        )
    return text + table(head, lines)
