"""Losses over a language model's logits run with its head: time and memory beside other ways, and beside the floor.

KL(teacher || student) and generalised JSD (beta 0.5) at temperature 1, averaged over tokens, forward and backward, from
the hidden states of both models to the gradients of the student's hidden states and of its head. The contestants:

  naive        whole logits, torch.nn.functional
  checkpoint   chunks of 128 tokens under torch.utils.checkpoint
  trl          trl.kernels.chunked_divergence (what its trainer calls), where it can be imported
  liger        liger_kernel's LigerFusedLinearJSDLoss with its own chunk size, compiled on a GPU; liger.128: with 128
  ours         gkd_dsl.runtime.ops.fused_head

In the same table: the floor. No way does less than four matrix products (the logits of both, the gradients of hidden
states and weight), which are timed bare beside each run; none can do with less memory than the two gradients and one
tile of 128 tokens. First all are asserted to agree with the naive form in value and gradient. Each run is in a process
of its own, and the contestants take turns; on a GPU all are in one process, with its cache emptied between them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import parser, quartiles, report, spread, table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MIB = 2**20
TILE = 128
LOSSES = ("kl", "jsd")
SHAPES = ((1024, 151936, 1024), (256, 151936, 1024), (1024, 32000, 1024))
GPU_SHAPES = ((512, 151936, 2048), (1024, 151936, 2048), (4096, 151936, 2048), (8192, 128256, 4096))


@dataclass
class World:
    """Hidden states and heads of both; `x` and `w` are the student's and get the gradient."""

    x: Tensor
    w: Tensor
    tx: Tensor
    tw: Tensor


Way = Callable[[World, str], Tensor]


def divergence(s: Tensor, t: Tensor, loss: str) -> Tensor:
    """The sum over rows of whole logits, in fp32."""
    log_q, log_p = F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)
    if loss == "kl":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    log_m = torch.logsumexp(torch.stack([log_q, log_p]) - math.log(2.0), 0)
    one, other = (F.kl_div(log_m, x, reduction="sum", log_target=True) for x in (log_p, log_q))
    return 0.5 * (one + other)


def naive(world: World, loss: str) -> Tensor:
    return divergence(world.x @ world.w.T, (world.tx @ world.tw.T).detach(), loss) / len(world.x)


def checkpointed(world: World, loss: str) -> Tensor:
    def part(x: Tensor, w: Tensor, tx: Tensor, tw: Tensor) -> Tensor:
        return divergence(x @ w.T, tx @ tw.T, loss)

    chunks = zip(world.x.split(TILE), world.tx.split(TILE), strict=True)
    sums = [checkpoint(part, x, world.w, tx, world.tw, use_reentrant=False) for x, tx in chunks]
    return torch.stack(sums).sum() / len(world.x)


def ours(world: World, loss: str) -> Tensor:
    from gkd_dsl.runtime.ops.fused_head import Head, Teacher, fused_losses
    from gkd_dsl.runtime.ops.fused_rows import RowLoss

    weight = torch.ones(len(world.x), device=world.x.device)
    row = RowLoss(loss, 1.0 / len(world.x), weight, 0, {"temperature": 1.0})
    return fused_losses(world.x, Head(world.w), [Teacher(world.tx, Head(world.tw))], [row])[0]


def trl(world: World, loss: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = 0.0 if loss == "kl" else 0.5
    return ChunkedDivergenceFunction.apply(world.x, world.w, None, world.tx, world.tw, None, beta)[0].mean()


def liger(chunk: int) -> Way:
    def run(world: World, loss: str) -> Tensor:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        labels = torch.zeros(len(world.x), dtype=torch.long, device=world.x.device)
        beta = 0.0 if loss == "kl" else 0.5
        compiled = world.x.device.type == "cuda"
        made = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=compiled, chunk_size=chunk)
        return made(world.x, world.w, world.tx, world.tw, labels)

    return run


WAYS: dict[str, Way] = {
    "naive": naive, "checkpoint": checkpointed, "trl": trl, "liger": liger(1024), "liger.128": liger(128), "ours": ours,
}  # fmt: skip


def present() -> list[str]:
    """The contestants that can be imported here."""
    found = []
    for name in WAYS:
        module = {"trl": "trl.kernels.chunked_divergence", "liger": "liger_kernel.chunked_loss"}.get(name.split(".")[0])
        try:
            if module is None or (find_spec(module.split(".")[0]) and __import__(module)):
                found.append(name)
        except (ImportError, RuntimeError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def world(shape: tuple[int, int, int], device: str, dtype: torch.dtype, seed: int) -> World:
    """Random hidden states and heads; logits have a standard deviation of about 1."""
    tokens, vocabulary, width = shape
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(rows: int, scale: float) -> Tensor:
        return (torch.randn(rows, width, generator=generator, device=device) * scale).to(dtype)

    x, w = drawn(tokens, 1.0).requires_grad_(), drawn(vocabulary, width**-0.5).requires_grad_()
    return World(x, w, drawn(tokens, 1.0), drawn(vocabulary, width**-0.5))


def products(made: World) -> None:
    """The four matrix products that every way does at least."""
    with torch.no_grad():
        s, t = made.x @ made.w.T, made.tx @ made.tw.T
        del t
        held = s @ made.w, s.T @ made.x
        del held


def floor_bytes(shape: tuple[int, int, int], size: int) -> int:
    """The two gradients and a tile."""
    tokens, vocabulary, width = shape
    return size * (vocabulary * width + tokens * width + min(TILE, tokens) * vocabulary)


class Memory:
    """The peak over what was there before: resident memory on the CPU, allocated memory on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")) - self.before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("this measures by /proc/self/status, which this system lacks")


def timed(run: Callable[[], object], device: str, clock: str) -> float:
    """Seconds of one run, everything done: of the wall clock, or of the processor (right for one thread)."""
    now = time.perf_counter if clock == "wall" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    start = now()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - start


def measure(name: str, loss: str, made: World, device: str, rounds: int, clock: str) -> dict[str, object]:
    """Peak of the first run, then seconds of runs, each beside the bare products."""

    def run() -> None:
        made.x.grad = made.w.grad = None
        WAYS[name](made, loss).backward()

    small = World(*(x.detach()[:8].clone() for x in (made.x, made.w, made.tx, made.tw)))
    small.x.requires_grad_()
    small.w.requires_grad_()
    WAYS[name](small, loss).backward()  # libraries and threads are there before the count
    if device == "cuda":
        run()  # what is compiled is compiled for a shape
        made.x.grad = made.w.grad = None
        torch.cuda.empty_cache()
    memory = Memory(device)
    run()
    peak = memory.peak()
    made.x.grad = made.w.grad = None
    times, bare = [], []
    products(made)
    for _ in range(rounds):
        bare.append(timed(lambda: products(made), device, clock))
        times.append(timed(run, device, clock))
    return {"peak": peak, "times": times, "products": bare, "load": os.getloadavg()[0]}


def together(
    shape: tuple[int, int, int], names: Sequence[str], device: str, dtype: torch.dtype, seed: int, rounds: int,
    *, losses: Sequence[str] = LOSSES,
) -> tuple[dict[tuple[str, str], list[dict]], dict[str, str]]:  # fmt: skip
    """All contestants in this process, for a GPU, where a process takes longer to start than to measure.

    Gives the runs, and the errors of those that failed by `name/loss`.
    """
    found: dict[tuple[str, str], list[dict]] = {}
    failed: dict[str, str] = {}
    for loss in losses:
        for name in names:
            made = world(shape, device, dtype, seed)
            try:
                found[name, loss] = [measure(name, loss, made, device, rounds, "wall")]
            except Exception as error:  # out of memory, or whatever a contestant's compiler raises
                failed[f"{name}/{loss}"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            del made
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return found, failed


def agree(device: str, seed: int) -> dict[str, float]:
    """The largest relative gap of each contestant to the naive form. Raises SystemExit over 1e-4 (2e-2 on a GPU)."""
    gaps: dict[str, float] = {}
    for loss in LOSSES:
        found: dict[str, tuple[Tensor, ...]] = {}
        for name in ("naive", *present()):
            made = world((300, 2003, 48), device, torch.float32, seed)
            value = WAYS[name](made, loss)
            found[name] = (value.detach().reshape(1), *torch.autograd.grad(value, [made.x, made.w]))
        for name, tensors in found.items():
            pairs = zip(tensors, found["naive"], strict=True)
            gap = max(float((one - other).norm() / other.norm()) for one, other in pairs)
            gaps[name] = max(gaps.get(name, 0.0), gap)
    # Kernels of some contestants take their products in TF32 there.
    most = 1e-4 if device == "cpu" else 2e-2
    wrong = {name: gap for name, gap in gaps.items() if not gap < most}
    if wrong:
        raise SystemExit(f"these do not agree with the naive form: {wrong}")
    return gaps


def _shape(text: str) -> tuple[int, int, int]:
    tokens, vocabulary, width = map(int, text.split(","))
    return tokens, vocabulary, width


def in_process(*words: str, script: str = __file__) -> dict[str, Any] | None:
    """What a script prints when it is started for one measurement; None where memory runs out."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options_ = parser(__doc__)
    options_.add_argument("--rounds", type=int, default=2, help="timed runs in each process")
    options_.add_argument("--turns", type=int, default=3, help="processes of each contestant, taking turns")
    options_.add_argument("--threads", type=int, default=2)
    options_.add_argument("--seed", type=int, default=0)
    options_.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options_.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread on a busy machine"
    )
    options_.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on the CPU, bfloat16 on a GPU")
    options_.add_argument("--shape", action="append", help="tokens,vocabulary,width; may be given several times")
    options_.add_argument("--only", help="contestants, with commas")
    options_.add_argument(
        "--together",
        action=argparse.BooleanOptionalAction,
        help="measure all in this process; so it is on a GPU, unless --no-together",
    )
    options_.add_argument("--one", nargs=2, help="a contestant and a loss: measure it here and print JSON")
    options = options_.parse_args()
    if options.together is None:
        options.together = options.device == "cuda"
    torch.set_num_threads(options.threads)
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    usual = ((256, 4096, 64),) if options.quick else GPU_SHAPES if options.device == "cuda" else SHAPES
    shapes = [_shape(text) for text in options.shape] if options.shape else list(usual)
    if options.one:
        name, loss = options.one
        if name == "agree":
            print(json.dumps(agree(options.device, options.seed)))
            return
        drawn = world(shapes[0], options.device, getattr(torch, dtype), options.seed)
        print(json.dumps(measure(name, loss, drawn, options.device, options.rounds, options.clock)))
        return
    shared = ["--threads", str(options.threads), "--seed", str(options.seed), "--device", options.device]
    shared += ["--clock", options.clock, "--dtype", dtype, "--rounds", str(1 if options.quick else options.rounds)]
    gaps = in_process("--one", "agree", "kl", *shared)
    if gaps is None:
        raise SystemExit("the contestants were not compared")
    names = [name for name in present() if not options.only or name in options.only.split(",")]
    sections: list[str] = []
    entries: list[dict[str, Any]] = []
    for shape in shapes:
        found: dict[tuple[str, str], list[dict]] = {}
        if options.together:
            rounds = 1 if options.quick else options.rounds
            found, failed = together(shape, names, options.device, getattr(torch, dtype), options.seed, rounds)
            sections.append(section(shape, names, found, getattr(torch, dtype).itemsize))
            entries.append(
                {"shape": shape, "runs": {"/".join(key): runs for key, runs in found.items()}, "failed": failed}
            )
            continue
        for turn in range(1 if options.quick else options.turns):
            order = [(name, loss) for name in names for loss in LOSSES]
            shift = turn % len(order)
            for name, loss in order[shift:] + order[:shift]:
                size = ["--shape", ",".join(map(str, shape))]
                made = in_process("--one", name, loss, *shared, *size)
                found.setdefault((name, loss), []).extend([made] if made is not None else [])
                print(f"{shape} {name} {loss} turn {turn} done", flush=True)
        sections.append(section(shape, names, found, getattr(torch, dtype).itemsize))
        entries.append({"shape": shape, "runs": {"/".join(key): runs for key, runs in found.items()}})
    loads = [run["load"] for entry in entries for runs in entry["runs"].values() for run in runs]
    settings = {
        "setting": f"{dtype} on the {options.device}; "
        + ("all in one process" if options.together else "each run in a process of its own, contestants in turn")
        + (" (miniature sizes: a smoke run, not a measurement)" if options.quick else ""),
        "threads": options.threads,
        "seconds": "of the wall clock" if options.clock == "wall" else "of the processor",
        "seed": options.seed,
        "repeats": f"{1 if options.quick or options.together else options.turns} processes of each, "
        f"{1 if options.quick else options.rounds} timed runs in each, every one beside the bare products",
        "load average during the runs": f"{min(loads):.1f} to {max(loads):.1f}",
        "agreement with the naive form": ", ".join(f"{name} {gap:.0e}" for name, gap in gaps.items()),
    }
    if options.device == "cuda":
        settings["gpu"] = torch.cuda.get_device_name()
    stem = "fused_logits" if options.device == "cpu" else "fused_logits_gpu"
    body = "\n\n".join(sections)
    title = "Losses over a head whose logits are never whole"
    data = {"agreement": gaps, "shapes": entries}
    report(stem, options.out, title, settings, body, data, quick=options.quick)


def section(shape: tuple[int, ...], names: list[str], found: dict[tuple[str, str], list[dict]], size: int) -> str:
    """The table of a shape."""
    tokens, vocabulary, width = shape
    floor = floor_bytes((tokens, vocabulary, width), size)
    rows = []
    bare = [value for runs in found.values() for run in runs for value in run["products"]]
    for loss in LOSSES:
        for name in names:
            runs = found.get((name, loss), [])
            if not runs:
                rows.append([loss, name, "out of memory, or failed", "", "", ""])
                continue
            peak = max(run["peak"] for run in runs)
            pairs = [(a, b) for run in runs for a, b in zip(run["times"], run["products"], strict=True)]
            rows.append(
                [
                    loss, name, f"{peak / MIB:,.0f}", f"{peak / floor:.2f}",
                    spread(quartiles([a for a, _ in pairs])), spread(quartiles([a / b for a, b in pairs]), 2),
                ]
            )  # fmt: skip
    head = ["loss", "", "peak, MiB", "over the floor", "seconds", "over four products"]
    return (
        f"## {tokens:,} tokens, vocabulary {vocabulary:,}, width {width:,}\n\n"
        f"Floor: {floor / MIB:,.0f} MiB (gradients of the head and of the hidden states, and one tile of "
        f"{min(TILE, tokens)} tokens); four bare products: {spread(quartiles(bare))} s.\n\n" + table(head, rows)
    )


if __name__ == "__main__":
    main()
