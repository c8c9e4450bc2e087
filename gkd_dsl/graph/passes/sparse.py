"""Sparse: a plan whose teacher's logits are their k largest values, the ids of these, and the mass of the others.

`kl(s.logits <- t.logits)` becomes an operator over k + 1 classes, which `runtime/ops/sparse.py` holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gkd_dsl.graph.plan import Apply, ForwardPlan, Free, Instruction, StagePlan, TapPlan
from gkd_dsl.graph.stored import OVER_TOP_K
from gkd_dsl.types import Dim, TensorType

TOP_K = "topk."
"""What stands before the name of an operator whose teacher is stored so."""

IDS, TAIL = ":ids", ":tail"
"""What the keys of the ids and of the mass end with; the values keep the key of the logits."""


@dataclass(frozen=True)
class TopK:
    """How logits are stored: how many, at which temperatures the mass of the others is known, how it is used."""

    count: int
    temperatures: tuple[float, ...] = (1.0,)
    treatment: str = "bucket"


def sparse(plan: StagePlan, stored: Mapping[str, TopK]) -> StagePlan:
    """The plan in which the logits of these keys are sparse. Their readers are those that `stored.refusals` admits."""
    if not stored:
        return plan
    known = dict(stored)
    program: list[Instruction] = []
    for step in plan.program:
        if isinstance(step, Free):
            extra = [key + end for key in step.keys if key in known for end in (IDS, TAIL)]
            program.append(Free((*step.keys, *extra)))
        elif isinstance(step, Apply) and (how := _read(step, known)) is not None:
            program += _over(step, how, known)
        else:
            program.append(step)
    return replace(
        plan,
        forwards=tuple(_forward(forward, stored) for forward in plan.forwards),
        metrics=tuple(
            replace(item, forwards=tuple(_forward(forward, stored) for forward in item.forwards))
            for item in plan.metrics
        ),
        program=tuple(program),
    )


def _read(step: Apply, known: Mapping[str, TopK]) -> TopK | None:
    return next((known[key] for _, key in step.inputs if key in known), None)


def _over(step: Apply, how: TopK, known: dict[str, TopK]) -> list[Instruction]:
    if step.op == "detach":
        key = dict(step.inputs)["x"]
        known[step.key] = how
        ends = zip(("", IDS, TAIL), _types(step.type, how), strict=True)
        return [Apply(step.key + end, "detach", (("x", key + end),), (), type) for end, type in ends]
    assert step.op in OVER_TOP_K, step.op
    key = dict(step.inputs)["teacher"]
    attrs = dict(step.attrs) | {"temperatures": how.temperatures, "treatment": how.treatment}
    inputs = (*step.inputs, ("ids", key + IDS), ("tail", key + TAIL))
    return [replace(step, op=TOP_K + step.op, inputs=inputs, attrs=tuple(sorted(attrs.items())))]


def _types(type: object, how: TopK) -> tuple[TensorType, TensorType, TensorType]:
    assert isinstance(type, TensorType)
    rows = type.dims[:-1]
    held = (*rows, Dim("k", how.count))
    return (
        TensorType("float", held),
        TensorType("int", held),
        TensorType("float", (*rows, Dim("temperatures", len(how.temperatures)))),
    )


def _forward(forward: ForwardPlan, stored: Mapping[str, TopK]) -> ForwardPlan:
    taps: list[TapPlan] = []
    for tap in forward.taps:
        if tap.key not in stored:
            taps.append(tap)
            continue
        types = zip(("", IDS, TAIL), _types(tap.type, stored[tap.key]), strict=True)
        taps += [TapPlan(tap.key + end, tap.path, type) for end, type in types]
    return replace(forward, taps=tuple(taps))
