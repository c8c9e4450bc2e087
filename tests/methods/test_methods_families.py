"""Every method on BERT and RoBERTa, Llama and GPT-2: it steps, or the checker says why it does not."""

import pytest
import torch
from cases import CASES, NAMES, full_args
from families import CAUSAL, FAMILIES, PAGE, UPDATE, answer, models_of, page
from harness import Step, batch_of, close, made, plans, spec, use

CELLS = [(name, family) for name in NAMES for family in FAMILIES]
EACH = pytest.mark.parametrize(("name", "family"), CELLS)


def stages(name: str, family: str) -> list:
    case = CASES[name]
    text = spec(models_of(name, family), *use(name, case.call, full_args(name)), "run m")
    return list(plans(text, case.warns).values())


@EACH
def test_it_steps_or_is_refused_with_the_code_of_the_table(name, family) -> None:
    case, (code, said) = CASES[name], answer(name, family)
    if family in case.refused:
        assert code == case.refused[family]
        assert len(said.split()) >= 4
        return
    assert code == "yes", f"{code}: {said}"
    task = models_of(name, family).task
    for plan in stages(name, family):
        step = Step(plan, made(plan))
        total, values = step(batch_of(task))
        gradient = step.gradient(total)
        assert all(torch.isfinite(value) for value in values.values()), plan.name
        assert torch.isfinite(gradient).all(), plan.name
        assert gradient.abs().max() > 0, plan.name
        if "padding" in case.without:
            continue
        padded, longer = step(batch_of(task, pad=3))
        for key, value in values.items():
            close(longer[key], value, f"{plan.name}: {key}")
        close(step.gradient(padded), gradient, plan.name, rtol=1e-7, atol=1e-9 * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize(("name", "family"), [cell for cell in CELLS if cell[1] in CAUSAL])
def test_padding_on_the_left_of_causal_models_changes_nothing(name, family) -> None:
    case = CASES[name]
    if family in case.refused or "left" in case.without or "padding" in case.without:
        assert answer(name, family)[0] == case.refused.get(family, "yes")
        return
    task = models_of(name, family).task
    for plan in stages(name, family):
        step = Step(plan, made(plan))
        plain = batch_of(task)
        # The same texts, moved to the right: positions are those of the tokens.
        plain["position_ids"] = torch.arange(plain["input_ids"].shape[1]).expand_as(plain["input_ids"])
        (total, values), (moved_total, moved) = step(plain), step(batch_of(task, left=2))
        for key, value in values.items():
            close(moved[key], value, f"{plan.name}: {key}", rtol=1e-7)
        one, two = step.gradient(moved_total), step.gradient(total)
        close(one, two, plan.name, rtol=1e-6, atol=1e-8 * max(1.0, two.abs().max().item()))


def test_the_page_of_the_docs_is_that_of_this_code() -> None:
    text = page()
    if UPDATE:
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.exists(), "GKD_UPDATE_FAMILIES=1 writes it"
    assert text == PAGE.read_text(encoding="utf-8"), "docs/methods/families.md is stale: GKD_UPDATE_FAMILIES=1"
