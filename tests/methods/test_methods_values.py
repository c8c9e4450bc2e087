"""What holds for every stage of every method: padding, parts of a batch, equal models, teachers, precision, slopes."""

import copy
from functools import cache

import pytest
import torch
from cases import CASES, INNER, NAMES, STILL, ZERO, full_args
from harness import Step, batch_of, close, made, plans, spec, use
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

EACH = pytest.mark.parametrize("name", NAMES)
# No shrinking: what is drawn is small.
FEW = settings(max_examples=2, derandomize=True, database=None, phases=[Phase.generate])
LENGTHS = st.lists(st.integers(3, 7), min_size=4, max_size=4).map(tuple)


def stages(name: str, args: str | None = None, models=None) -> dict:
    """The stages of a method with all its losses, and its total as one more."""
    case, args = CASES[name], full_args(name) if args is None else args
    models = models or case.models
    found = dict(plans(spec(models, *use(name, case.call, args), "run m"), case.warns))
    if not case.alone:
        body = (*use(name, case.call, args), "stage total for 10 steps {\n  minimize m\n}")
        found["total"] = plans(spec(models, *body), case.warns)["total"]
    return found


def looks(name: str, args: str | None = None, models=None) -> list:
    """(stage, values of its counters) to look at."""
    counts = CASES[name].counts
    return [
        (plan, count) for plan in stages(name, args, models).values() for count in (counts if plan.counters else ({},))
    ]


@cache
def steps(name: str, args: str | None = None) -> tuple[Step, ...]:
    return tuple(Step(plan, made(plan), counts=counts) for plan, counts in looks(name, args))


def steps_for(name: str, test: str) -> tuple[Step, ...]:
    """The steps for one property: none where it is left out, those of another call where the table says so."""
    case = CASES[name]
    if test in case.without:
        return ()
    return steps(name, case.apart[test][0] if test in case.apart else None)


def task(name: str) -> str:
    return CASES[name].models.task


@EACH
@given(lengths=LENGTHS, pad=st.integers(1, 5), seed=st.integers(0, 99))
@FEW
def test_padding_changes_neither_values_nor_gradients(name, lengths, pad, seed) -> None:
    for step in steps_for(name, "padding"):
        plain, longer = (batch_of(task(name), lengths, seed, n) for n in (0, pad))
        longer["input_ids"] = torch.where(longer["attention_mask"].bool(), longer["input_ids"], torch.tensor(9))
        (total, values), (padded_total, padded_values) = step(plain), step(longer)
        for key, value in values.items():
            close(padded_values[key], value, f"{step.plan.name}: {key}")
        one, two = step.gradient(padded_total), step.gradient(total)
        close(one, two, f"{step.plan.name}: gradient", rtol=1e-7, atol=1e-9 * max(1.0, two.abs().max().item()))


@EACH
@given(lengths=LENGTHS, seed=st.integers(0, 99))
@FEW
def test_a_batch_of_four_is_two_of_two(name, lengths, seed) -> None:
    for step in steps_for(name, "parts"):
        whole = batch_of(task(name), lengths, seed)
        parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 2), slice(2, 4))]
        assert step.distiller.denominators(parts) == step.distiller.denominators([whole])
        total, values = step(whole)
        halves = [step(*parts, row=row) for row in (0, 1)]
        for key, value in values.items():
            close(sum(part[key] for _, part in halves), value, f"{step.plan.name}: {key}")
        close(sum(half for half, _ in halves), total, f"{step.plan.name}: total")
        one, two = sum(step.gradient(half) for half, _ in halves), step.gradient(total)
        close(one, two, f"{step.plan.name}: gradient", rtol=1e-7, atol=1e-9 * max(1.0, two.abs().max().item()))


@EACH
def test_the_order_of_the_rows_does_not_matter(name) -> None:
    for step in steps_for(name, "order"):
        whole, order = batch_of(task(name), seed=5), torch.tensor([2, 0, 3, 1])
        total, _ = step(whole)
        turned, _ = step({key: value[order] for key, value in whole.items()})
        close(turned, total, step.plan.name)


@EACH
def test_equal_models_give_what_the_table_says(name) -> None:
    """The student is a copy of its teacher, projections are the identity; each loss once at least, in some stage."""
    case, seen = CASES[name], set()
    for plan, counts in looks(name, models=case.models.twins()):
        models = made(plan)
        for other in models.values():
            other.load_state_dict(next(iter(models.values())).state_dict())
        step = Step(plan, models, counts=counts)
        with torch.no_grad():
            for block in step.projections.values():
                if block.in_features == block.out_features:
                    block.weight.copy_(torch.eye(block.in_features))
                    if block.bias is not None:
                        block.bias.zero_()
        _, values = step(batch_of(case.models.task))
        for key, value in values.items():
            short = key.rpartition("/")[2].partition(".")[0]
            seen.add(short)
            said, where = case.equal[short], f"{plan.name}: {key}"
            size = step.gradient(value).abs().max().item()
            assert size < 1e-6 or said not in (ZERO, STILL), f"{where} has a gradient of {size}"
            assert abs(value.item()) < 1e-9 or said != ZERO, f"{where} is {value.item()}"
            if said == STILL:
                assert abs(value.item()) > 1e-6, f"{where} is zero: say so in the table"
            elif said != ZERO and value.requires_grad:
                assert max(size, abs(value.item())) > 1e-6, f"{where} is zero: say so in the table"
    inner = {loss for loss, said in case.equal.items() if said == INNER}
    assert seen == set(case.equal) - inner, "losses that no stage has, or that are not INNER"


@EACH
def test_teachers_get_no_gradient_and_all_that_trains_does(name) -> None:
    case = CASES[name]
    for plan, counts in looks(name):
        step = Step(plan, made(plan), counts=counts)
        total, _ = step(batch_of(case.models.task))
        total.backward()
        trains = {target.name for target in plan.stage.trains if target.kind == "model"}
        assert trains <= {"s", *case.teaches} or plan.name == "total", plan.name
        for model in step.models.keys() - trains:
            assert all(p.grad is None and not p.requires_grad for p in step.models[model].parameters()), model
        reached = {key.split("/")[0] for key, p in zip(step.names, step.parameters, strict=True) if _moves(p)}
        assert trains <= reached, f"{plan.name}: no gradient reaches {trains - reached}"
        blocks = {target.name for target in plan.stage.trains if target.kind == "project"}
        for block, module in step.projections.items():
            assert block not in blocks or any(_moves(p) for p in module.parameters()), (
                f"{plan.name}: no gradient reaches {block}"
            )


def _moves(parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().max() > 0)


@EACH
def test_bf16_stays_finite_and_near(name) -> None:
    for plan, counts in looks(name):
        step, batch = Step(plan, made(plan, dtype=torch.float32), counts=counts), batch_of(task(name))
        exact, _ = step(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, values = step(batch)
        assert all(value.dtype == torch.float32 for value in values.values())
        assert torch.isfinite(step.gradient(total)).all(), plan.name
        close(total, exact, plan.name, rtol=0.2, atol=2e-2)


@EACH
@pytest.mark.parametrize("extreme", ["logits", "hidden", "zero"])
def test_extreme_models_stay_finite(name, extreme) -> None:
    """Logits 1000 times as large, hidden states 100 times, and hidden states and logits that are all 0."""
    if "extreme" in CASES[name].without:
        assert CASES[name].without["extreme"]
        return
    scale = {"logits": 1e3, "hidden": 1e2, "zero": 0.0}[extreme]
    for plan, counts in looks(name):
        models = made(plan, dtype=torch.float32)
        with torch.no_grad():
            for model in models.values():
                for key, parameter in model.named_parameters():
                    head = any(part in key for part in ("classifier", "decoder", "predictions.bias"))
                    norm = "LayerNorm" in key and "predictions" not in key
                    if (extreme != "hidden" and head) or (extreme != "logits" and norm):
                        parameter.mul_(scale)
        step = Step(plan, models, counts=counts)
        total, values = step(batch_of(task(name)))
        for key, value in values.items():
            assert torch.isfinite(value), f"{plan.name}: {key}"
            assert torch.isfinite(step.gradient(value)).all(), f"{plan.name}: gradient of {key}"
        assert torch.isfinite(step.gradient(total)).all(), plan.name


@EACH
def test_the_gradient_is_that_of_finite_differences(name) -> None:
    for step in steps_for(name, "slope"):
        batch = batch_of(task(name), seed=3)
        gradient = step.gradient(step(batch)[0])
        for seed in (5, 6):
            direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            direction /= direction.norm()
            before = [p.detach().clone() for p in step.parameters]
            around = []
            for amount in (1e-5, -1e-5):
                with torch.no_grad():
                    pieces = direction.split([p.numel() for p in step.parameters])
                    for parameter, piece, held in zip(step.parameters, pieces, before, strict=True):
                        parameter.copy_(held + amount * piece.view_as(held))
                around.append(step(batch)[0].item())
            with torch.no_grad():
                for parameter, held in zip(step.parameters, before, strict=True):
                    parameter.copy_(held)
            slope, expected = (around[0] - around[1]) / 2e-5, (gradient @ direction).item()
            bound = 1e-6 * max(1.0, abs(expected), gradient.norm().item(), abs(around[0]) / 10)
            assert abs(slope - expected) <= bound, f"{step.plan.name}: {slope} is not {expected}"


@EACH
def test_fp32_agrees_with_fp64(name) -> None:
    for plan, counts in looks(name):
        single = made(plan, dtype=torch.float32)
        double = {key: copy.deepcopy(model).double() for key, model in single.items()}
        one, two, batch = Step(plan, single, counts=counts), Step(plan, double, counts=counts), batch_of(task(name))
        wanted = two(batch)[1]
        for key, value in one(batch)[1].items():
            close(value, wanted[key], f"{plan.name}: {key}", rtol=2e-4, atol=1e-5)
