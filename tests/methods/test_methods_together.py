"""Methods side by side in one spec: they share forwards, train, and their loss is the weighted sum of their losses."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import pytest
import torch
from cases import CASES, NAMES, REFUSED
from harness import Models, Step, batch_of, close, errors, made, methods, plans, spec, use
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

WORLDS = tuple(
    Models(t, (2, 16, 4), task) for t in ((4, 16, 4), (2, 16, 4)) for task in ("classification", "masked_lm")
)
TOGETHER = [name for name in NAMES if not CASES[name].alone]
# Variants in a method's file have its losses, and are not paired.
SINGLE = [name for name in TOGETHER if CASES[name].call == "t -> s" and methods()[name][0] == name]
MANY = [name for name in TOGETHER if CASES[name].call != "t -> s"]


@dataclass(frozen=True)
class Part:
    """A method in a spec, under its own name."""

    method: str
    weight: str = "1.0"

    @property
    def lines(self) -> list[str]:
        case = CASES[self.method]
        return use(self.method, case.call, case.args, f"m_{self.method}")


def text_of(models: Models, *parts: Part) -> str:
    total = " + ".join(f"{part.weight} * m_{part.method}" for part in parts)
    body = [line for part in parts for line in part.lines]
    return spec(models, *body, f"stage main for 10 steps {{\n  minimize {total}\n}}")


def warns(*names: str) -> tuple[str, ...]:
    return tuple(code for name in names for code in CASES[name].warns)


@cache
def worlds(*names: str) -> tuple[Models, ...]:
    """The models that suit each of these methods alone, with the further models that they ask for."""
    more = tuple(dict.fromkeys(model for name in names for model in CASES[name].models.more))
    more = tuple({model[1]: model for model in more}.values())
    found = []
    for world in WORLDS:
        own = replace(world, more=tuple((role, name, world.t) for role, name, _ in more))
        if all(not errors(text_of(_cut(own, name), Part(name))) for name in names):
            found.append(own)
    return tuple(found)


def _cut(models: Models, name: str) -> Models:
    """The models without those that a method does not read."""
    wanted = {model[1] for model in CASES[name].models.more}
    return replace(models, more=tuple(model for model in models.more if model[1] in wanted))


def forwards_once(plan) -> None:
    """No model runs twice on one input with the same changes; a pass for `gradient` alone has a graph of its own."""
    seen = [(f.model, f.inputs, f.shift, f.changes, f.values, f.discard) for f in plan.forwards]
    assert len(seen) == len(set(seen)), seen
    taps = [(f.key, str(tap.path)) for f in plan.forwards for tap in f.taps]
    assert len(taps) == len(set(taps))


def finite_step(step: Step, batch) -> torch.Tensor:
    """The objective before a step of Adam on one batch, after which it is finite too."""
    optimizer = torch.optim.Adam(step.parameters, lr=1e-3)
    total, values = step(batch)
    assert all(torch.isfinite(value) for value in values.values())
    total.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in step.parameters)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in step.parameters)
    before = [p.detach().clone() for p in step.parameters]
    optimizer.step()
    assert torch.isfinite(step(batch)[0])
    with torch.no_grad():
        for parameter, held in zip(step.parameters, before, strict=True):
            parameter.copy_(held)
    return total.detach()


def agrees_with_its_parts(world: Models, parts: tuple[Part, ...]) -> None:
    plan = plans(text_of(world, *parts), warns(*(part.method for part in parts)))["main"]
    forwards_once(plan)
    models, batch = made(plan), batch_of(world.task, seed=2)
    step = Step(plan, models)
    total, values = step(batch)
    summed, seen = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        own = _cut(world, part.method)
        alone = plans(text_of(own, part), warns(part.method))["main"]
        blocks = {block.name: step.projections[block.name] for block in alone.projections}
        partial, found = Step(alone, models, blocks)(batch)
        summed = summed + partial.double()
        seen += len(found)
        for key, value in found.items():
            close(values[key], value, key, rtol=1e-7)
    assert seen == len(values)
    close(total, summed, "total", rtol=1e-7)
    close(finite_step(Step(plan, models, step.projections), batch), total, "total before the step")


@pytest.mark.parametrize("pair", list(combinations(SINGLE, 2)), ids="+".join)
def test_two_methods_of_one_teacher(pair) -> None:
    common = worlds(*pair)
    if pair in REFUSED:
        code, _ = REFUSED[pair]
        for world in common or WORLDS:
            assert code in {found for found, _ in errors(text_of(world, *map(Part, pair)))}
        return
    assert common, f"no models suit both {' and '.join(pair)}: say so in REFUSED of cases.py"
    agrees_with_its_parts(common[0], (Part(pair[0], "0.7"), Part(pair[1], "1.3")))


@pytest.mark.parametrize("scheme", MANY)
def test_a_method_of_several_models_beside_every_method_of_one(scheme) -> None:
    for name in SINGLE:
        pair = (name, scheme)
        common = worlds(*pair)
        if pair in REFUSED:
            code, _ = REFUSED[pair]
            for world in common or WORLDS:
                assert code in {found for found, _ in errors(text_of(world, *map(Part, pair)))}
            continue
        assert common, f"no models suit both {' and '.join(pair)}: say so in REFUSED of cases.py"
        agrees_with_its_parts(common[0], (Part(name, "0.7"), Part(scheme, "1.3")))


WEIGHTS = st.one_of(
    st.integers(1, 30).map(lambda n: f"{n / 10}"),
    st.tuples(st.integers(0, 9), st.integers(10, 20)).map(lambda ab: f"ramp({ab[0] / 10} -> {ab[1] / 10}, until = 50%)"),
    st.tuples(st.integers(0, 9), st.integers(10, 20)).map(lambda ab: f"cosine({ab[1] / 10} -> {ab[0] / 10}, until = 80%)"),
    st.integers(1, 9).map(lambda n: f"step_at({n / 10} -> 1.5, at = 30%)"),
)  # fmt: skip


@given(st.data())
@settings(max_examples=10, derandomize=True, database=None, phases=[Phase.generate])
def test_three_to_five_methods_with_weights_that_change(data) -> None:
    world = data.draw(st.sampled_from(WORLDS[:2]))
    able = [name for name in SINGLE if world in worlds(name)]
    chosen = data.draw(st.lists(st.sampled_from(able), min_size=3, max_size=5, unique=True))
    chosen = [n for i, n in enumerate(chosen) if not any(tuple(sorted((n, o))) in REFUSED for o in chosen[:i])]
    parts = tuple(Part(name, data.draw(WEIGHTS)) for name in chosen)
    note(text_of(world, *parts))
    agrees_with_its_parts(world, parts)


def test_what_is_said_to_be_refused_is_a_pair_in_order() -> None:
    for pair, (code, why) in REFUSED.items():
        assert set(pair) <= set(TOGETHER)
        assert pair == tuple(sorted(pair)) or pair[1] in MANY
        assert code.startswith("E")
        assert len(why.split()) > 3
