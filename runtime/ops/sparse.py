"""Divergences from a teacher whose logits are stored as their k largest and the mass of the others.

Both distributions are put in k + 1 classes: the stored ones, and one for all others. Every divergence here is an
f-divergence or a cross entropy, so that it is then never above that of all classes, and equal to it where k is all of
them. The student's probabilities come from its whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd_dsl.graph.passes.sparse import TOP_K
from gkd_dsl.runtime.ops.common import full, on_rows
from gkd_dsl.runtime.ops.registry import functions


def tail_mass(logits: Tensor, ids: Tensor, temperatures: Sequence[float]) -> Tensor:
    """log sum exp(x / T) over the classes not in `ids`, one for each T: [..., V], [..., k] -> [..., len(T)]."""
    rest = full(logits).scatter(-1, ids.long(), float("-inf"))
    return torch.stack([torch.logsumexp(rest / temperature, -1) for temperature in temperatures], -1)


def tail_at(tail: Tensor, temperatures: Sequence[float], temperature: float, others: int) -> Tensor:
    """The log mass of the other classes at a temperature: [..., len(T)] -> [...].

    At a temperature that is among the stored ones it is exact. Elsewhere the `others` classes are taken to be alike,
    each with the mean of its mass at the nearest stored temperature T': log n + (tail - log n) T' / T.
    """
    nearest = min(range(len(temperatures)), key=lambda place: abs(math.log(temperatures[place] / temperature)))
    held, at = tail[..., nearest], temperatures[nearest]
    if math.isclose(at, temperature, rel_tol=1e-6):
        return held
    return math.log(max(1, others)) * (1.0 - at / temperature) + held * (at / temperature)


def buckets(
    student: Tensor,
    values: Tensor,
    ids: Tensor,
    tail: Tensor,
    temperature: float,
    temperatures: Sequence[float],
    treatment: str,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher over the stored classes and one of the others: twice [n, k + 1].

    With treatment `bucket` the teacher's last class has the mass of the others, with `renormalise` none: its stored
    classes are scaled to sum to 1. The student's last class has the mass of its others in both. [n, k] where k is all.
    """
    ids = ids.long()
    log_q = F.log_softmax(full(student) / temperature, dim=-1)
    others = student.shape[-1] - ids.shape[-1]
    log_p = teacher_classes(values, tail, temperature, temperatures, others, treatment)
    if others <= 0:
        return log_q.gather(-1, ids), log_p
    # The sum of the others, not 1 - the sum of the stored ones, which rounds to 0 where the student is sure.
    rest = torch.logsumexp(log_q.scatter(-1, ids, float("-inf")), -1, keepdim=True)
    return torch.cat((log_q.gather(-1, ids), rest), -1), log_p


def teacher_classes(
    values: Tensor, tail: Tensor, temperature: float, temperatures: Sequence[float], others: int, treatment: str
) -> Tensor:
    """The teacher's log-probabilities over its stored classes and one of the `others`: [n, k + 1], [n, k] of none."""
    held = full(values) / temperature
    if others <= 0:
        return F.log_softmax(held, dim=-1)
    if treatment == "renormalise":
        last = torch.full_like(held[..., :1], float("-inf"))
    else:
        last = tail_at(full(tail), temperatures, temperature, others).unsqueeze(-1)
    return F.log_softmax(torch.cat((held, last), -1), dim=-1)


def over_top_k(op: str) -> Callable[..., Tensor]:
    """The operator `op` for a stored teacher: student [..., V], values and ids [..., k], tail [..., T] -> [...]."""
    whole = functions()[op]

    def loss(
        student: Tensor,
        teacher: Tensor,
        ids: Tensor,
        tail: Tensor,
        *,
        valid: Tensor | None = None,
        temperature: float = 1.0,
        t2: bool | None = None,
        dims: Sequence[str] | None = None,
        temperatures: Sequence[float] = (1.0,),
        treatment: str = "bucket",
        **options: Any,
    ) -> Tensor:
        for name in ("causal", "align"):
            options.pop(name, None)

        def rows(s: Tensor, values: Tensor, places: Tensor, mass: Tensor) -> Tensor:
            q, p = buckets(s, values, places, mass, temperature, temperatures, treatment)
            return whole(q, p, temperature=1.0, t2=False, **options)

        found = on_rows(rows, (student, teacher, ids, tail), dims, valid)
        squared = _squared(op) if t2 is None else t2
        return found * temperature**2 if squared else found

    return loss


def _squared(op: str) -> bool:
    """Whether the operator multiplies by T^2 unless told otherwise."""
    return op not in ("jsd", "tvd")


def sparse_functions(names: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """The functions of those names that begin as the plan writes them."""
    return {name: over_top_k(name.removeprefix(TOP_K)) for name in names if name.startswith(TOP_K)}
