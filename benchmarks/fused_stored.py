"""Losses over a teacher's k largest stored logits, run with the student's head: time and memory beside whole logits.

KL(teacher || student) and generalised JSD (beta 0.5) over k + 1 classes at temperature 1, averaged over tokens, forward
and backward, from the student's hidden states to their gradients and those of its head. The contestants:

  plain        whole logits and the operator, as with `fuse_logits = off`
  ours         gkd_dsl.runtime.ops.fused_head

The floor is that of `fused_logits.py` without a teacher's head: three matrix products, timed bare beside each run; the
two gradients and one tile of 128 tokens. First the two are asserted to agree in value and gradient. Each run is in a
process of its own, and the contestants take turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from common import parser, quartiles, report, spread, table
from fused_logits import MIB, TILE, Memory, floor_bytes, in_process, timed
from torch import Tensor

from gkd_dsl.runtime.ops.fused_head import Head, fused_losses
from gkd_dsl.runtime.ops.fused_rows import RowLoss
from gkd_dsl.runtime.ops.fused_sparse import Stored
from gkd_dsl.runtime.ops.sparse import over_top_k, tail_mass

LOSSES = ("kl", "jsd")
SHAPE, QUICK = (1024, 151936, 1024), (256, 4096, 64)
TOP_K = 64


class World:
    """The student's hidden states and head, and what is stored of a teacher."""

    def __init__(self, shape: tuple[int, int, int], k: int, seed: int) -> None:
        tokens, vocabulary, width = shape
        torch.manual_seed(seed)
        self.x = torch.randn(tokens, width).requires_grad_()
        self.w = (torch.randn(vocabulary, width) * width**-0.5).requires_grad_()
        teacher = torch.randn(tokens, vocabulary) * 2.0
        values, ids = teacher.topk(k, dim=-1)
        self.stored = Stored(values, ids.int(), tail_mass(teacher, ids, (1.0,)))


def plain(world: World, loss: str) -> Tensor:
    held = world.stored
    return over_top_k(loss)(world.x @ world.w.T, held.values, held.ids, held.tail, temperature=1.0).mean()


def ours(world: World, loss: str) -> Tensor:
    count = len(world.x)
    row = RowLoss(loss, 1.0 / count, torch.ones(count), attrs={"temperature": 1.0}, stored=world.stored)
    return fused_losses(world.x, Head(world.w), [], [row])[0]


WAYS: dict[str, Callable[[World, str], Tensor]] = {"plain": plain, "ours": ours}


def products(world: World) -> None:
    """The three matrix products that every way does at least."""
    with torch.no_grad():
        s = world.x @ world.w.T
        held = s @ world.w, s.T @ world.x
        del held


def agree(k: int, seed: int) -> float:
    """The largest relative gap in value and gradient. Raises SystemExit over 1e-4."""
    gap = 0.0
    for loss in LOSSES:
        found = []
        for way in WAYS.values():
            world = World((300, 2003, 48), k, seed)
            value = way(world, loss)
            found.append((value.detach().reshape(1), *torch.autograd.grad(value, [world.x, world.w])))
        gap = max(gap, *(float((b - a).norm() / a.norm()) for a, b in zip(*found, strict=True)))
    if not gap < 1e-4:
        raise SystemExit(f"the contestants do not agree: {gap}")
    return gap


def measure(name: str, loss: str, world: World, rounds: int) -> dict[str, Any]:
    """Peak of the first run, then seconds of runs, each beside the bare products."""

    def run() -> None:
        world.x.grad = world.w.grad = None
        WAYS[name](world, loss).backward()

    WAYS[name](World((8, 300, 16), 5, 0), loss).backward()  # libraries and threads are there before the count
    memory = Memory("cpu")
    run()
    peak = memory.peak()
    times, bare = [], []
    for _ in range(rounds):
        bare.append(timed(lambda: products(world), "cpu", "wall"))
        times.append(timed(run, "cpu", "wall"))
    return {"peak": peak, "times": times, "products": bare}


def main() -> None:
    options_ = parser(__doc__)
    options_.add_argument("--rounds", type=int, default=3, help="timed runs in each process")
    options_.add_argument("--turns", type=int, default=3, help="processes of each contestant, taking turns")
    options_.add_argument("--threads", type=int, default=2)
    options_.add_argument("--seed", type=int, default=0)
    options_.add_argument("--top-k", type=int, default=TOP_K)
    options_.add_argument("--one", nargs=2, help="a contestant and a loss: measure it here and print JSON")
    options = options_.parse_args()
    torch.set_num_threads(options.threads)
    shape = QUICK if options.quick else SHAPE
    rounds, turns = (1, 1) if options.quick else (options.rounds, options.turns)
    if options.one:
        print(json.dumps(measure(*options.one, World(shape, options.top_k, options.seed), rounds)))
        return
    gap = agree(options.top_k, options.seed)
    shared = ["--rounds", str(rounds), "--threads", str(options.threads), "--seed", str(options.seed)]
    shared += ["--top-k", str(options.top_k), *(["--quick"] if options.quick else [])]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(turns):
        for loss in LOSSES:
            for name in WAYS:
                made = in_process("--one", name, loss, *shared, script=__file__)
                found.setdefault((name, loss), []).extend([made] if made is not None else [])
                print(f"{name} {loss} turn {turn} done", flush=True)
    floor = floor_bytes(shape, 4)
    rows = []
    for (name, loss), runs in sorted(found.items(), key=lambda item: (LOSSES.index(item[0][1]), item[0][0] == "ours")):
        pairs = [(a, b) for run in runs for a, b in zip(run["times"], run["products"], strict=True)]
        peak = max((run["peak"] for run in runs), default=0)
        rows.append(
            [
                loss, name, f"{peak / MIB:,.0f}", f"{peak / floor:.2f}", spread(quartiles([a for a, _ in pairs])),
                spread(quartiles([a / b for a, b in pairs]), 2),
            ] if pairs else [loss, name, "out of memory, or failed", "", "", ""]
        )  # fmt: skip
    tokens, vocabulary, width = shape
    bare = [value for runs in found.values() for run in runs for value in run["products"]]
    body = (
        f"## {tokens:,} tokens, vocabulary {vocabulary:,}, width {width:,}, the {options.top_k} largest stored\n\n"
        f"Floor: {floor / MIB:,.0f} MiB (gradients of the head and of the hidden states, and one tile of "
        f"{min(TILE, tokens)} tokens); three bare products: {spread(quartiles(bare))} s.\n\n"
        + table(["loss", "", "peak, MiB", "over the floor", "seconds", "over three products"], rows)
    )
    settings = {
        "setting": "fp32 on the CPU; each run in a process of its own, contestants in turn",
        "threads": options.threads,
        "seed": options.seed,
        "repeats": f"{turns} processes of each, {rounds} timed runs in each, every one beside the bare products",
        "agreement": f"{gap:.0e}",
    }
    data = {
        "agreement": gap,
        "shape": shape,
        "top_k": options.top_k,
        "runs": {"/".join(key): runs for key, runs in found.items()},
    }
    title = "Losses over stored logits, the student's never whole"
    report("fused_stored", options.out, title, settings, body, data, quick=options.quick)


if __name__ == "__main__":
    main()
