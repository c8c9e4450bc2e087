"""Angles between triples at length 512: the cubic arithmetic at once, and by chunks.

A loss over the angles that two points make at a third, forward and backward, fp32: all tokens of a text of 512 (CKD
without a window, 64 and 96 features), a window of 21 tokens (CKD, 768 features), the texts of a batch in 64 heads
(MGSKD, 768 features). "at once" is the formula in plain tensors, every edge and every angle in memory; "by chunks" is
the operator, which keeps the points alone and makes each chunk again in the backward.

First both are asserted to give the same loss and gradient; then each runs in processes of its own, and the peak is
that of the resident memory over what was there before the loss. Times are of the processor, one thread unless said.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import parser, quartiles, report, spread, table
from torch import Tensor

from gkd_dsl.runtime.ops.angles import sample_angle, token_angle

TOLERANCE = 1e-4
MIB = 2**20
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """Shapes of both sides, the formula in plain tensors, and the operator."""

    title: str
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    naive: Loss
    ours: Loss


def _cosines(edges: Tensor) -> Tensor:
    unit = F.normalize(edges, dim=-1)
    return unit @ unit.transpose(-1, -2)


def _pairs(there: Tensor) -> Tensor:
    """Ordered pairs of different ends that count, of Bool[..., m]."""
    return there.unsqueeze(-1) & there.unsqueeze(-2) & ~torch.eye(there.shape[-1], dtype=torch.bool)


def _mean(values: Tensor, pairs: Tensor) -> Tensor:
    errors = torch.where(pairs, values, values.new_zeros(()))
    return (errors.sum((-1, -2)) / pairs.sum((-1, -2)).clamp_min(1)).mean()


def all_tokens(student: Tensor, teacher: Tensor) -> Tensor:
    """[B, L, H]: edges [B, L, L, H] and angles [B, L, L, L]."""
    s, t = (_cosines(x.unsqueeze(2) - x.unsqueeze(1)) for x in (student, teacher))
    return _mean((s - t).square(), _pairs(~torch.eye(student.shape[1], dtype=torch.bool)))


def window_of(size: int) -> Loss:
    """[B, L, H]: edges [B, L, size, H] and angles [B, L, size, size]."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        length = student.shape[1]
        places = torch.arange(length).unsqueeze(-1) + torch.arange(-(size // 2), size // 2 + 1)
        there = (places >= 0) & (places < length) & (places != torch.arange(length).unsqueeze(-1))
        places = places.clamp(0, length - 1)
        s, t = (_cosines(x.unsqueeze(2) - x[:, places]) for x in (student, teacher))
        return _mean((s - t).square(), _pairs(there))

    return loss


def samples_in(heads: int) -> Loss:
    """[B, H]: edges [heads, B, B, H / heads] and angles [heads, B, B, B]."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        cut = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (student, teacher))
        s, t = (_cosines(x.unsqueeze(2) - x.unsqueeze(1)) for x in cut)
        return _mean(F.smooth_l1_loss(s, t, reduction="none"), _pairs(~torch.eye(len(student), dtype=torch.bool)))

    return loss


def settings_of(quick: bool) -> dict[str, Setting]:
    """What is measured, by name."""
    length, texts = (64, 16) if quick else (512, 128)
    return {
        "tokens": Setting(
            f"all tokens, [1, {length}, 64] and [1, {length}, 96]",
            (1, length, 64), (1, length, 96), all_tokens, lambda s, t: token_angle(s, t).mean(),
        ),
        "window": Setting(
            f"window of 21, [4, {length}, 768]",
            (4, length, 768), (4, length, 768), window_of(21), lambda s, t: token_angle(s, t, window=21).mean(),
        ),
        "samples": Setting(
            f"texts, 64 heads, [{texts}, 768]",
            (texts, 768), (texts, 768), samples_in(64), lambda s, t: sample_angle(s, t, heads=64).mean(),
        ),
    }  # fmt: skip


def points(setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """Both sides, drawn."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(setting.student, generator=generator).requires_grad_()
    return student, torch.randn(setting.teacher, generator=generator)


def resident(field: str) -> int:
    """Bytes by /proc/self/status: `VmRSS` now, `VmHWM` at most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("this measures by /proc/self/status, which this system lacks")


def measure(setting: Setting, kind: str, rounds: int, seed: int) -> dict[str, object]:
    """Peak of the first run over what was resident before it, and seconds of the rounds after it."""
    student, teacher = points(setting, seed)
    loss = setting.naive if kind == "at once" else setting.ours

    def run() -> None:
        student.grad = None
        loss(student, teacher).backward()

    small = [x[tuple(slice(0, 4) for _ in x.shape[:-1])] for x in (student.detach(), teacher)]
    loss(*(x.clone().requires_grad_() for x in small)).backward()  # libraries and threads are there before the count
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    peak = resident("VmHWM") - before
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return {"peak": peak, "times": times}


def agree(setting: Setting, seed: int) -> dict[str, float]:
    """Relative differences of loss and gradient. Raises SystemExit where they are larger than the tolerance."""
    found = []
    for loss in (setting.naive, setting.ours):
        student, teacher = points(setting, seed)
        value = loss(student, teacher)
        value.backward()
        found.append((value.detach(), student.grad))
    (one, first), (two, second) = found
    gaps = {"loss": float((one - two).abs() / one.abs()), "gradient": float((first - second).norm() / first.norm())}
    if max(gaps.values()) > TOLERANCE:
        raise SystemExit(f"{setting.title}: the two differ by {gaps}")
    return gaps


def in_process(*words: str) -> dict[str, object]:
    """What this script prints when it is started for one measurement."""
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options_ = parser(__doc__)
    options_.add_argument("--rounds", type=int, default=5, help="timed runs of each in its process")
    options_.add_argument("--threads", type=int, default=1)
    options_.add_argument("--seed", type=int, default=0)
    options_.add_argument("--one", nargs=2, help="a setting and a contestant: measure it here and print JSON")
    options = options_.parse_args()
    torch.set_num_threads(options.threads)
    found = settings_of(options.quick)
    if options.one:
        name, kind = options.one
        setting = found[name]
        equal = kind == "equal"
        print(
            json.dumps(agree(setting, options.seed) if equal else measure(setting, kind, options.rounds, options.seed))
        )
        return
    rounds = 2 if options.quick else options.rounds
    shared = ["--rounds", str(rounds), "--threads", str(options.threads), "--seed", str(options.seed)]
    shared += ["--quick"] if options.quick else []
    rows, data = [], {}
    for name, setting in found.items():
        gaps = in_process("--one", name, "equal", *shared)
        both = {kind: in_process("--one", name, kind, *shared) for kind in ("at once", "by chunks")}
        for kind, measured in both.items():
            share = both["by chunks"]["peak"] / measured["peak"]
            seconds = spread(quartiles(measured["times"]))
            rows.append([setting.title, kind, f"{measured['peak'] / MIB:,.0f}", f"{share:.3f}", seconds])
        data[name] = {"title": setting.title, "agreement": gaps, **both}
        print(f"{name} done", flush=True)
    body = table(["", "", "peak, MiB", "by chunks over it", "CPU seconds, forward and backward"], rows)
    loss, gradient = (max(float(entry["agreement"][part]) for entry in data.values()) for part in ("loss", "gradient"))
    body += f"\n\nMedian, quartiles. Losses agree to {loss:.0e}, gradients to {gradient:.0e} (relative)."
    settings = {
        "setting": "fp32; each in a process of its own; peak of the resident memory over that before the loss"
        + (" (miniature sizes: a smoke run, not a measurement)" if options.quick else ""),
        "threads": options.threads,
        "seed": options.seed,
        "repeats": f"the peak of one run, then the times of {rounds}",
    }
    report("angle_memory", options.out, "Angles at once and by chunks", settings, body, data, quick=options.quick)


if __name__ == "__main__":
    main()
