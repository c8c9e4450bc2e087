"""Methods of the library side by side in one spec: they share forwards and taps, and train."""

from itertools import combinations

import pytest
import torch
from method_world import Pair, Step, batch_of, close, made, plans

PAIR = Pair((4, 16, 4), (2, 16, 4), "masked_lm")
ARGS = {"kd": "", "pkd": "last_beta = 2.0", "distilbert": "", "tinybert": "", "minilm": "", "minilmv2": "heads = 8"}
WEIGHT = {"kd": 1.0, "pkd": 0.5, "distilbert": 0.25, "tinybert": 2.0, "minilm": 1.5, "minilmv2": 3.0}


def plan_of(*methods: str, optimise: bool = True):
    uses = [f'import "gkd:{name}" use {name}' for name in methods]
    uses += [f"use {name}(t -> s{ARGS[name] and ', ' + ARGS[name]}) as m_{name}" for name in methods]
    total = " + ".join(f"{WEIGHT[name]} * m_{name}" for name in methods)
    return plans(PAIR.spec(*uses, f"stage main for 5 steps {{\n  minimize {total}\n}}"), optimise=optimise)["main"]


def taps_of(plan) -> list[tuple[str, str]]:
    return [(forward.model, str(tap.path)) for forward in plan.forwards for tap in forward.taps]


def trains(step: Step, batch, steps: int = 3) -> list[float]:
    """The objective over some steps of Adam on one batch."""
    optimizer = torch.optim.Adam(step.parameters, lr=1e-3)
    losses = []
    for _ in range(steps):
        total, values = step(batch)
        assert torch.isfinite(total)
        assert all(torch.isfinite(value) for value in values.values())
        losses.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("pair", list(combinations(ARGS, 2)), ids="+".join)
def test_two_methods_share_forwards_and_taps_and_train(pair) -> None:
    plan = plan_of(*pair)
    taps = taps_of(plan)
    assert [forward.model for forward in plan.forwards].count("s") == 1
    assert [forward.model for forward in plan.forwards].count("t") == 1
    assert len(plan.forwards) == 2
    alone = [set(taps_of(plan_of(name))) for name in pair]
    assert len(taps) == len(set(taps)) == len(alone[0] | alone[1])
    assert set(taps) == alone[0] | alone[1]
    losses = trains(Step(plan, made(plan)), batch_of(task="masked_lm"))
    assert losses[-1] < losses[0]


def test_all_six_together() -> None:
    plan, batch = plan_of(*ARGS), batch_of(task="masked_lm")
    taps = taps_of(plan)
    assert len(plan.forwards) == 2
    assert set(taps) == set().union(*(taps_of(plan_of(name)) for name in ARGS))
    assert len(taps) == len(set(taps))
    models = made(plan)
    step = Step(plan, models)
    total, values = step(batch)
    parts = 0.0
    for name in ARGS:
        alone = plan_of(name)
        sub = Step(alone, models, {block.name: step.projections[block.name] for block in alone.projections})
        part, own = sub(batch)
        parts = parts + part
        for key, value in own.items():
            close(values[key], value, key)
    close(total, parts, "the sum of six")
    losses = trains(Step(plan, models), batch, steps=6)
    assert losses[-1] < losses[0]


def test_all_six_unoptimised_are_the_same() -> None:
    batch = batch_of(task="masked_lm")
    models = made(plan_of(*ARGS))
    found = []
    for optimise in (True, False):
        step = Step(plan_of(*ARGS, optimise=optimise), models)
        total, values = step(batch)
        gradients = dict(zip(step.names, step.gradients(total), strict=True))
        found.append((total, values, gradients))
    (total, values, gradients), (plain, plain_values, plain_gradients) = found
    close(plain, total, "total")
    for name, value in values.items():
        close(plain_values[name], value, name)
    for name, gradient in gradients.items():
        if gradient is not None:
            close(plain_gradients[name], gradient, name)


@pytest.mark.parametrize("name", ["kd", "tinybert", "minilmv2"])
def test_the_same_method_twice_with_other_parameters(name: str) -> None:
    first = {"kd": "T = 2.0", "tinybert": "attention_weight = 2.0", "minilmv2": "heads = 8"}[name]
    second = {"kd": "T = 6.0", "tinybert": "attention_weight = 0.5", "minilmv2": "heads = 4"}[name]
    uses = [f'import "gkd:{name}" use {name}']
    uses += [f"use {name}(t -> s, {args}) as {alias}" for alias, args in (("a", first), ("b", second))]
    specs = {
        alias: plans(
            PAIR.spec(*(u for u in uses if not u.endswith(drop)), f"stage main for 5 steps {{\n  minimize {total}\n}}")
        )["main"]
        for alias, drop, total in (("both", "none", "a + 0.5 * b"), ("a", "as b", "a"), ("b", "as a", "b"))
    }
    taps = taps_of(specs["both"])
    assert len(specs["both"].forwards) == 2
    assert len(taps) == len(set(taps))
    assert set(taps) == set(taps_of(specs["a"])) | set(taps_of(specs["b"]))
    models, batch = made(specs["both"]), batch_of(task="masked_lm")
    step = Step(specs["both"], models)
    total, values = step(batch)
    parts = []
    for alias in ("a", "b"):
        blocks = {block.name: step.projections[block.name] for block in specs[alias].projections}
        part, own = Step(specs[alias], models, blocks)(batch)
        parts.append(part)
        for key, value in own.items():
            close(values[key], value, key)
    close(total, parts[0] + 0.5 * parts[1], "total")
    if name == "tinybert":
        assert sorted(block.name for block in specs["both"].projections) == ["a/W", "b/W"]
    elif name == "kd":
        assert abs(values["a/soft"].item() - values["b/soft"].item()) > 1e-3
        close(values["a/hard"], values["b/hard"], "hard")
