"""Part 2 of `gpu.py`: what `gkd plan` says of memory beside the peak of torch's allocator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import plan_accuracy as accuracy
from common import table
from gpu_rows import Options, Row
from gpu_world import GIB, NO_COMPILER, use_host_accelerator

NAMES = (
    "BERT, logits",
    "BERT, hidden taps",
    "BERT, attention taps",
    "BERT, hidden taps, checkpointing",
    "BERT, hidden taps, offload",
    "Llama, next token",
    "Llama, next token, bf16",
    "Llama, fused",
    "Llama, fused, bf16",
    "Llama, fused, hidden taps, checkpointing",
    "Llama, next token, cached",
    "Llama, next token, offload, fused",
    "MiniLMv2",
)
GEMINI = {
    "nothing offloaded": "",
    "optimiser half offloaded": "offload_optim_frac = 0.5",
    "optimiser offloaded": "offload_optim_frac = 1.0",
    "all offloaded": "offload_optim_frac = 1.0\n  offload_param_frac = 1.0",
}


def rows(options: Options) -> list[Row]:
    """Cases of `plan_accuracy.py` at larger sizes, then Gemini's."""
    cases = {case.name: case for case in accuracy.CASES}
    found = [Row(name, partial(local, cases[name]), "local", 60.0) for name in NAMES]
    for name, settings in GEMINI.items():
        case = replace(
            cases["Llama, fused"], name=f"Llama, gemini static, {name}", runtime=f"backend = gemini\n  {settings}"
        )
        found.append(Row(case.name, partial(gemini, case), "", 60.0, NO_COMPILER))
    case = replace(cases["Llama, fused"], name="Llama, gemini static, teacher in chunks", placement="gemini",
                   runtime="backend = gemini")  # fmt: skip
    return [*found, Row(case.name, partial(gemini, case), "", 60.0, NO_COMPILER)]


def local(case: accuracy.Case, options: Options) -> dict[str, Any]:
    """A case of the local backend."""
    with TemporaryDirectory() as place:
        return _said(accuracy.measure(case, Path(place), options.device, _size(options)))


def gemini(case: accuracy.Case, options: Options) -> dict[str, Any]:
    """A case under Gemini in one process."""
    use_host_accelerator(options)
    if options.quick:
        case = replace(case, runtime=f"{case.runtime}\n  min_chunk_size_m = 0.001\n  search_range_m = 1")
    with TemporaryDirectory() as place:
        return _said(accuracy.measure(case, Path(place), options.device, _size(options)))


def _size(options: Options) -> accuracy.Size:
    return accuracy.MINIATURE if options.quick else accuracy.GPU


def _said(found: dict[str, Any]) -> dict[str, Any]:
    found["planned_gib"], found["measured_gib"] = found["planned"] / GIB, found["measured"] / GIB
    return found


def body(found: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    lines = []
    for row in found:
        if "error" in row:
            lines.append([row["row"], row["error"], "", "", ""])
            continue
        lines.append([row["row"], f"{row['planned_gib']:.3f}", f"{row['measured_gib']:.3f}", f"{row['ratio']:.3f}",
                      row["moment"]])  # fmt: skip
    good = [row for row in found if "ratio" in row]
    near = [row for row in good if abs(row["ratio"] - 1) <= accuracy.GOAL]
    text = "## 2. Memory beside the plan\n\n"
    text += table(["spec", "planned, GiB", "measured, GiB", "planned over measured", "where the plan has it"], lines)
    return text + f"\n\nWithin 10 %: {len(near)} of {len(good)}."
