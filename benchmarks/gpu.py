"""What only a machine with a GPU can show, on one that has no network: models of real shapes, random weights in place.

  1  the same spec by the local backend, ddp and Gemini, and by every placement: the same losses, step by step
  2  memory that `gkd plan` says beside the peak of torch's allocator
  3  an 8B teacher and a 1.7B student: tokens a second over the bare sum
  4  teachers of 14B, 32B and 70B: whether they run, at what peak, at what share of the link's bandwidth
  5  losses over a head whose logits are never whole, beside the others

Every row is measured in a process that a failure of another does not reach; each part has a result file, written after
each row, and rows that fail stay in it. With `--device cpu --quick` all parts run on miniature models, which measures
nothing.

  python benchmarks/gpu.py --parts 1,2,3,4,5 --minutes 9
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import parser, report
from gpu_rows import PARTS, Options, run_part, work

TITLE = "Measured where there is a GPU"


def main() -> None:
    options_ = parser(__doc__ or "")
    options_.add_argument("--parts", default="1,2,3,4,5", help="which, with commas")
    options_.add_argument("--minutes", type=float, default=9.0, help="the most that a part takes")
    options_.add_argument("--total", type=float, help="the most that all take; time that is left goes to the next part")
    options_.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options_.add_argument("--seed", type=int, default=0)
    options_.add_argument("--worker", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    options_.add_argument("--names", help=argparse.SUPPRESS)
    given = options_.parse_args()
    options = Options(given.device, given.quick, given.seed)
    if given.worker:
        work(int(given.worker[0]), json.loads(given.names), options, Path(given.worker[1]))
        return
    parts = [int(word) for word in given.parts.split(",")]
    os.environ["GKD_GPU_RUN"] = str(os.getpid())
    began = time.monotonic()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gkd-gpu-") as place:
        for number, part in enumerate(parts):
            allowed = 60 * given.minutes
            if given.total is not None:
                left = 60 * given.total - (time.monotonic() - began)
                allowed = min(allowed, left / (len(parts) - number))

            def done(rows: list[dict[str, Any]], part: int = part) -> None:
                found[:] = rows
                write(part, found, options, given.out, quiet=True)

            start = time.monotonic()
            try:
                run_part(part, options, start + allowed, Path(place), done)
            except Exception as error:
                done([{"row": "all", "error": f"{type(error).__name__}: {error}"}])
            write(part, found, options, given.out)
            print(f"part {part} took {time.monotonic() - start:.0f} s", flush=True)


def write(part: int, rows: Sequence[Mapping[str, Any]], options: Options, out: Path, *, quiet: bool = False) -> None:
    """The result of a part as it stands: `gpu_losses.md` and `.json`, and so on; `gpu_losses-cpu` without a GPU."""
    stem = PARTS[part] if options.device == "cuda" else f"{PARTS[part]}-cpu"
    body = importlib.import_module(PARTS[part]).body(rows)
    failed = [row for row in rows if "error" in row]
    if failed:
        body += f"\n\n{len(failed)} of {len(rows)} rows failed."
    settings = {
        "device": hardware(options),
        "models": "random weights"
        + (", miniature: a smoke run, not a measurement" if options.quick else "; batches of random tokens"),
        "seed": options.seed,
    }
    report(stem, out, TITLE, settings, body, list(rows), quick=options.quick, quiet=quiet)


def hardware(options: Options) -> str:
    """The GPU, its memory, its driver's and torch's CUDA; without one, that there is none."""
    if options.device != "cuda":
        return "the CPU"
    # Not by torch, which would open a context here, and take memory from the rows.
    words = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi gives none"
    return "; ".join(said.split("\n")).strip("; ")


if __name__ == "__main__":
    main()
