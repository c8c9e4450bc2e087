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

Where a machine is lent for less, `--resume` goes on with the result files of an earlier run on one like it: rows that
are there stay, with their date and what they are held against, and the others are measured.
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

from common import parser, report, versions
from gpu_rows import PARTS, Options, kept, run_part, work

TITLE = "Measured where there is a GPU"
LIBRARIES = ("torch", "transformers", "triton", "colossalai", "trl", "liger-kernel")
"""Other versions of these are another measurement."""


def main() -> None:
    options_ = parser(__doc__ or "")
    options_.add_argument("--parts", default="1,2,3,4,5", help="which, with commas")
    options_.add_argument("--minutes", type=float, default=9.0, help="the most that a part takes")
    options_.add_argument("--total", type=float, help="the most that all take; time that is left goes to the next part")
    options_.add_argument("--resume", action="store_true", help="measure what the result files lack")
    options_.add_argument("--again", default="", help="with --resume: parts of names of rows to measure again, with ;")
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
            earlier = before(part, options, given.out, given.again) if given.resume else {}
            try:
                run_part(part, options, start + allowed, Path(place), done, earlier)
            except Exception as error:
                done([{"row": "all", "error": f"{type(error).__name__}: {error}"}])
            write(part, found, options, given.out)
            print(f"part {part} took {time.monotonic() - start:.0f} s", flush=True)


def before(part: int, options: Options, out: Path, again: str) -> dict[str, dict[str, Any]]:
    """The rows of an earlier result file that stay. Raises SystemExit where it is of another machine."""
    path = out / f"{stem(part, options)}{'-quick' if options.quick else ''}.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    there, here = record["versions"], versions()
    # Of the device its name and its memory: a driver may be another.
    pairs = [("device", *(", ".join(x.split(", ")[:2]) for x in (record["settings"]["device"], hardware(options))))]
    pairs += [(name, str(there.get(name)), str(here.get(name))) for name in LIBRARIES]
    differs = [f"{name} was {one}, and is {other}" for name, one, other in pairs if one != other]
    if differs:
        raise SystemExit(f"{path.name} is of another machine: {'; '.join(differs)}. Give --out another folder.")
    return kept(part, options, record, [words for words in again.split(";") if words])


def stem(part: int, options: Options) -> str:
    """The name of a part's result files."""
    return PARTS[part] if options.device == "cuda" else f"{PARTS[part]}-cpu"


def write(part: int, rows: Sequence[Mapping[str, Any]], options: Options, out: Path, *, quiet: bool = False) -> None:
    """The result of a part as it stands: `gpu_losses.md` and `.json`, and so on; `gpu_losses-cpu` without a GPU."""
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
    earlier = [row for row in rows if row.get("kept")]
    if earlier:
        dates = sorted({row["date"] for row in earlier})
        settings["rows of earlier runs"] = f"{', '.join(dates)}: " + "; ".join(row["row"] for row in earlier)
    report(stem(part, options), out, TITLE, settings, body, list(rows), quick=options.quick, quiet=quiet)


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
