"""What an operator holds beside its inputs and its result, in copies of its largest input in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gkd_dsl.graph.passes.sparse import TOP_K


@dataclass(frozen=True)
class Held:
    """Copies of the largest input.

    while_it_runs  the most at once in the forward, its result not counted
    for_backward   what autograd saves, its inputs and its result not counted
    in_backward    the most that its backward makes beside what was saved, the gradients of its inputs included
    """

    while_it_runs: float
    for_backward: float
    in_backward: float


ROWS = Held(8.25, 2.25, 2.25)
"""A divergence over rows of logits: both rows, both log-softmaxes, p, the difference, its choice, their product."""

HELD: Mapping[str, Held] = {
    "kl": ROWS,
    "reverse_kl": Held(8.25, 3.5, 3.0),
    "jsd": Held(12.5, 7.0, 4.0),
    "tvd": Held(7.0, 2.25, 3.0),
    "soft_cross_entropy": Held(6.25, 2.25, 2.25),
    "cross_entropy": Held(2.0, 1.0, 2.0),
    "attention_kl": Held(6.25, 2.25, 2.0),
    "mse": Held(1.0, 1.0, 1.0),
    "smooth_l1": Held(4.0, 2.0, 3.0),
    "huber": Held(4.0, 2.0, 3.0),
    "normalized_mse": Held(5.0, 3.0, 3.0),
    "cosine_distance": Held(5.0, 2.0, 3.0),
    "project": Held(0.0, 0.0, 1.0),
    "detach": Held(0.0, 0.0, 0.0),
}

OTHER = Held(4.0, 2.0, 2.0)
"""What is taken for an operator that was not counted."""

WORK = 6
"""Copies of the rows that fused losses take at a time that are alive at once, in fp32."""
OVER_STORED = 3
"""Those of losses over a teacher's stored logits; two more beside labels."""


def copies(ops: Sequence[str]) -> int:
    """How many copies of the rows that they take at a time fused losses hold."""
    if not all(op.startswith(TOP_K) or op == "cross_entropy" for op in ops):
        return WORK
    return OVER_STORED + 2 * ("cross_entropy" in ops)


IN_KERNEL = ("kl", "reverse_kl", "jsd", "soft_cross_entropy", "cross_entropy")
"""Losses that one kernel takes on a GPU, without such rows: one of each kind at most, from one teacher."""


def in_kernel(ops: Sequence[str]) -> bool:
    """Whether fused losses are taken by the kernel."""
    hard = ops.count("cross_entropy")
    return all(op in IN_KERNEL for op in ops) and hard <= 1 and len(ops) - hard <= 1


LIBRARIES = {"cpu": 0, "cuda": 64 * 2**20}
"""Bytes that libraries take for themselves: on a GPU the workspaces of cuBLAS, as counted on an H100."""

OVER_TOP_K = Held(7.0, 2.0, 3.0)
"""A divergence from a teacher's k largest logits: the student's rows, their log-softmax, and that of the others."""


def held(op: str) -> Held:
    """What an operator holds."""
    if op.startswith(TOP_K):
        return OVER_TOP_K
    return HELD.get(op, OTHER)
