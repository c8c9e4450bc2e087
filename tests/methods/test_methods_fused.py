"""Every method over language models: with the head fused, the objective, its losses and its gradient are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import CASES, NAMES
from harness import CAUSAL, FAMILIES, Step, batch_of, close, errors, made, spec, spec_plan, use

from gkd_dsl.graph.passes.fuse import fusions


def task_of(family: str) -> str:
    return "causal_lm" if family in CAUSAL else "masked_lm"


def text_of(name: str, family: str) -> str:
    """A spec that uses a method over language models, also one whose own case has classifiers."""
    case = CASES[name]
    models = replace(case.models, family=family, task=task_of(family))
    return spec(models, *use(name, case.call, case.args), "run m")


ROWS = [(name, family) for name in NAMES for family in FAMILIES if not errors(text_of(name, family))]


def both(name: str, family: str):
    """Each stage that has fused losses, with its models and two micro-batches."""
    for plan in spec_plan(text_of(name, family), CASES[name].warns).stages:
        if fusions(plan):
            task = task_of(family)
            yield plan, Step(plan, made(plan)), (batch_of(task), batch_of(task, (6, 5), seed=2))


@pytest.mark.parametrize(("name", "family"), ROWS)
def test_fused_it_is_the_same(name: str, family: str) -> None:
    for plan, step, batches in both(name, family):
        module = step.distiller.module
        counts = step.distiller.denominators(batches)
        for micro, batch in enumerate(batches):
            clock = replace(step.distiller.counters.on(step.distiller._clock), micro=micro)
            whole = module(batch, clock, counts, fused=False)
            gradient = step.gradient(whole.loss)
            out = module(batch, clock, counts)
            close(out.loss, whole.loss, f"{plan.name} of {name}")
            assert out.terms.keys() == whole.terms.keys()
            for term, value in out.terms.items():
                close(value, whole.terms[term], term)
            close(step.gradient(out.loss), gradient, f"the gradient of {plan.name} of {name}")


def test_the_library_has_methods_to_fuse_in_every_family() -> None:
    fused = {(name, family) for name, family in ROWS if next(both(name, family), None) is not None}
    assert {family for _, family in fused} == set(FAMILIES)
    assert ("kd", "llama") in fused


def test_nothing_is_fused_in_classifiers() -> None:
    for name in NAMES:
        case = CASES[name]
        if case.models.task == "classification":
            text = spec(case.models, *use(name, case.call, case.args), "run m")
            assert [group for plan in spec_plan(text, case.warns).stages for group in fusions(plan)] == []
