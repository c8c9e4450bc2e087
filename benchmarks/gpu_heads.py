"""Part 5 of `gpu.py`: losses over a head whose logits are never whole, by length and vocabulary, in bf16."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import fused_logits as bench
import torch
from common import quartiles, table
from gpu_rows import Options, Row

from gkd_dsl.runtime.ops import fused_head

LENGTHS = (1024, 4096, 512, 8192, 1000, 1048, 2048)
OTHERS = ((8192, 128256, 4096),)
COMPILED = ("liger",)
SLOW = ("liger.128",)
"""Not measured here: a chunk that Liger does not choose, and that takes it five times as long."""


def rows(options: Options) -> list[Row]:
    """A row a shape. Those of one width and vocabulary are in one process, which compiles for them once."""
    if options.quick:
        shapes = [(32, 512, 64), (48, 512, 64)]
    else:
        shapes = [*((length, 151936, 2048) for length in LENGTHS), *OTHERS]
    return [
        Row("agreement", agreement, "agreement", 90.0, base=True),
        *(Row(_name(shape), partial(heads, shape), f"{shape[1]}x{shape[2]}", 120.0) for shape in shapes),
    ]


def _name(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]:,} tokens, vocabulary {shape[1]:,}, width {shape[2]:,}"


def _names(options: Options) -> list[str]:
    there = [name for name in bench.present() if name not in SLOW]
    return [name for name in there if options.cuda or name not in ("trl", *COMPILED)]


def agreement(options: Options) -> dict[str, Any]:
    """All contestants agree with the naive form; each alone, so that one that fails does not lose the others."""
    everyone, gaps, failed = dict(bench.WAYS), {}, {}
    for name in _names(options):
        if name == "naive":
            continue
        bench.WAYS.clear()
        bench.WAYS.update({"naive": everyone["naive"], name: everyone[name]})
        try:
            gaps[name] = bench.agree(options.device, options.seed)[name]
        except (Exception, SystemExit) as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
    bench.WAYS.clear()
    bench.WAYS.update(everyone)
    return {"gaps": gaps, "failed": failed}


def heads(shape: tuple[int, int, int], options: Options) -> dict[str, Any]:
    """All contestants at a shape."""
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    dtype = torch.bfloat16 if options.cuda else torch.float32
    rounds = 1 if options.quick else 8
    found, failed = bench.together(shape, _names(options), options.device, dtype, options.seed, rounds)
    runs = {
        f"{name}/{loss}": {
            "peak_mib": one["peak"] / bench.MIB,
            "seconds": quartiles(one["times"])["median"],
            "products": quartiles(one["products"])["median"],
            "times": one["times"],
        }
        for (name, loss), (one,) in found.items()
    }
    floor = bench.floor_bytes(shape, dtype.itemsize) / bench.MIB
    lost = str(fused_head._failed)  # Why our kernel is not used in this process, where it is not.
    return {"shape": shape, "runs": runs, "failed": failed, "floor_mib": floor, "no_kernel": lost, **verdict(runs)}


def verdict(runs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Our memory over Liger's less greedy form, our time over the best one's, the greatest of both losses."""
    found: dict[str, Any] = {}
    for loss in bench.LOSSES:
        mine = runs.get(f"ours/{loss}")
        if mine is None:
            continue
        others = {name.split("/")[0]: run for name, run in runs.items() if name.endswith(f"/{loss}")}
        liger = [run["peak_mib"] for name, run in others.items() if name.startswith("liger")]
        if liger:
            found[f"memory_over_liger_{loss}"] = mine["peak_mib"] / min(liger)
        best = min((run["seconds"] for name, run in others.items() if name != "ours"), default=None)
        if best is not None:
            found[f"time_over_best_{loss}"] = mine["seconds"] / best
    return found


def body(found: Sequence[Mapping[str, Any]]) -> str:
    """The tables: seconds and memory of everyone by shape, then ours over the others."""
    text = ["## 5. Losses over a head whose logits are never whole"]
    for row in found:
        if row["row"] == "agreement" and "error" not in row:
            said = [f"{name} {gap:.0e}" for name, gap in row["gaps"].items()]
            said += [f"{name} did not: {error}" for name, error in row["failed"].items()]
            text.append("Agreement with the naive form: " + ", ".join(said) + ".")
    good = [row for row in found if "runs" in row]
    names = list(dict.fromkeys(key.split("/")[0] for row in good for key in (*row["runs"], *row["failed"])))
    for loss in bench.LOSSES:
        lines = []
        for row in found:
            if "runs" not in row:
                if "error" in row:
                    lines.append([row["row"], row["error"], *[""] * (len(names) + 1)])
                continue
            cells = [_cell(row["runs"].get(f"{name}/{loss}")) for name in names]
            lines.append(
                [row["row"], *cells, _ratio(row, f"memory_over_liger_{loss}"), _ratio(row, f"time_over_best_{loss}")]
            )
        head = [f"{loss}: ms, MiB", *names, "memory over Liger's", "time over the best other's"]
        text.append(table(head, lines))
    errors = dict.fromkeys(f"{name}: {said}" for row in good for name, said in row["failed"].items())
    if errors:
        text.append("Failed: " + "; ".join(errors) + ".")
    return "\n\n".join(text)


def _cell(run: Mapping[str, float] | None) -> str:
    return "failed" if run is None else f"{1000 * run['seconds']:.1f}, {run['peak_mib']:,.0f}"


def _ratio(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.2f}" if key in row else ""
