"""Tensors over a layer map that is drawn anew: those of pairs that are not drawn count as 0."""

from __future__ import annotations

import pytest
import torch
from method_world import Pair, Step, batch_of, made, plans, readings

from gkd_dsl import aligners
from gkd_dsl.schedules import Clock

MAP = "random_sorted(s.layer, t.layer, every = 1 epoch, seed = 5)"
STAGE = "stage main for 3 epochs { minimize inter }"


def value_at(body: str, epoch: int) -> tuple[torch.Tensor, Step, dict]:
    plan = plans(Pair((6, 16, 4), (2, 16, 4)).spec(body, STAGE))["main"]
    step = Step(plan, made(plan))
    batch = batch_of()
    module = step.distiller.module
    clock = Clock(10 * epoch, 30, 10.0)
    return module(batch, clock, step.distiller.denominators([batch])).loss, step, batch


@pytest.mark.parametrize("epoch", [0, 1, 2, 7])
@pytest.mark.parametrize("how", ["sum", "mean"])
def test_a_sum_of_tensors_is_over_the_pairs_in_force(epoch: int, how: str) -> None:
    body = (
        f"loss inter = mse({how}(2 * s.layer[i].out for (i, _) in {MAP}) <- {how}(t.layer[j].out for (_, j) in {MAP}))"
    )
    found, step, batch = value_at(body, epoch)
    pairs = aligners.random_sorted(2, 6, seed=5, epoch=epoch)
    share = 1.0 if how == "sum" else 1.0 / len(pairs)
    total, count = 0.0, 0
    for s, t in zip(readings(step.models["s"], batch), readings(step.models["t"], batch), strict=True):
        left = sum(2 * s.hidden[i + 1] for i, _ in pairs) * share
        right = sum(t.hidden[j + 1] for _, j in pairs) * share
        total += ((left - right) ** 2).sum()
        count += left.numel()
    torch.testing.assert_close(found, (total / count).float(), rtol=1e-6, atol=1e-9, check_dtype=False)


def test_what_is_drawn_changes_with_the_epoch() -> None:
    assert len({tuple(aligners.random_sorted(2, 6, seed=5, epoch=epoch)) for epoch in (0, 1, 2, 7)}) > 1
