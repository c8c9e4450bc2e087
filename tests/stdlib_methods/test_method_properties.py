"""What holds for every method: padding, batches, equal models, teachers, precision, finite differences."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import CASES, Case
from method_world import Pair, Step, batch_of, close, made, plans, use

EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
LENGTHS = st.lists(st.integers(2, 7), min_size=1, max_size=4).map(tuple)
_STEPS: dict[str, Step] = {}


def step_of(case: Case) -> Step:
    if case.id not in _STEPS:
        _STEPS[case.id] = case.step()
    return _STEPS[case.id]


def flat(step: Step, value) -> torch.Tensor:
    found = zip(step.gradients(value), step.parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in found])


@EACH
@given(lengths=LENGTHS, pad=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=4)
def test_appended_padding_changes_neither_values_nor_gradients(case, lengths, pad, seed) -> None:
    step = step_of(case)
    plain, longer = (case.batch(lengths=lengths, seed=seed, pad=n) for n in (0, pad))
    (total, values), (total_longer, values_longer) = step(plain), step(longer)
    for name in values:
        close(values_longer[name], values[name], name)
    close(flat(step, total_longer), flat(step, total), "gradient", rtol=1e-7)


@EACH
def test_what_stands_in_the_padding_does_not_matter(case) -> None:
    step, batch = step_of(case), case.batch()
    other = dict(batch)
    other["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], torch.tensor(9))
    (total, _), (changed, _) = step(batch), step(other)
    close(changed, total, "total")
    close(flat(step, changed), flat(step, total), "gradient", rtol=1e-7)


@EACH
@given(
    lengths=st.lists(st.integers(2, 7), min_size=2, max_size=4).map(tuple),
    seed=st.integers(0, 99),
    cut=st.integers(1, 3),
)
@settings(max_examples=4)
def test_a_batch_is_its_parts_weighted_by_what_they_count(case, lengths, seed, cut) -> None:
    step, cut = step_of(case), min(cut, len(lengths) - 1)
    whole = case.batch(lengths=lengths, seed=seed)
    parts = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, cut), slice(cut, None))]
    module, distiller = step.distiller.module, step.distiller
    counts = distiller.denominators(parts)
    assert counts == distiller.denominators([whole])
    total, _ = step(whole)
    halves = [module(part, distiller._clock, counts).loss for part in parts]
    close(sum(halves), total, "total")
    close(sum(flat(step, half) for half in halves), flat(step, total), "gradient", rtol=1e-7)
    rows = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    close(step({name: value[rows] for name, value in whole.items()})[0], total, "rows in another order")


@EACH
def test_equal_models_give_zero_where_the_definition_says_so(case) -> None:
    """The student is the teacher; layers that the method pairs are made the same by an equal depth."""
    sizes = case.pair.teacher
    if case.method == "pkd":
        body = use("pkd", args="last_beta = 3.0", run=False)
        pair = Pair(sizes, sizes, case.pair.task)
    else:
        body = use(case.method, args=case.args, run=False)
        pair = Pair(sizes, sizes, case.pair.task)
    if "student_layer = 0" in case.args or "teacher_layer = 2" in case.args:
        body = tuple(
            line.replace("teacher_layer = 1", "teacher_layer = 0").replace("teacher_layer = 2", "teacher_layer = 3")
            for line in body
        )
    alias = f"m_{case.method}"
    text = pair.spec(
        *body, f"stage total for 5 steps {{\n  minimize {' + '.join(f'{alias}.{name}' for name in case.zero)}\n}}"
    )
    plan = plans(text)["total"]
    models = made(plan)
    models["s"].load_state_dict(models["t"].state_dict())
    step = Step(plan, models)
    total, values = step(case.batch())
    for name, value in values.items():
        assert abs(value.item()) < 1e-12, name
    assert flat(step, total).abs().max().item() < 1e-7


@EACH
def test_equal_states_through_the_identity_give_zero(case) -> None:
    if case.method != "tinybert":
        assert case.plan().projections == ()
        return
    sizes = case.pair.teacher
    plan = plans(Pair(sizes, sizes).spec(*use("tinybert")))["m_tinybert.intermediate"]
    models = made(plan)
    models["s"].load_state_dict(models["t"].state_dict())
    step = Step(plan, models)
    (block,) = step.projections.values()
    with torch.no_grad():
        block.weight.copy_(torch.eye(sizes[1]))
        block.bias.zero_()
    total, _ = step(case.batch())
    assert total.item() == 0
    assert flat(step, total).abs().max().item() == 0


@EACH
def test_soft_cross_entropy_of_equal_models_has_no_gradient(case) -> None:
    """CE(p, p) is the entropy of p, which is not 0, and its gradient is."""
    if "soft" not in dict(case.stages)["total"]:
        assert case.method in ("minilm", "minilmv2", "distilbert", "tinybert")
        return
    sizes = case.pair.teacher
    alias = f"m_{case.method}"
    body = (*use(case.method, run=False), f"stage total for 5 steps {{\n  minimize {alias}.soft\n}}")
    plan = plans(Pair(sizes, sizes, case.pair.task).spec(*body))["total"]
    models = made(plan)
    models["s"].load_state_dict(models["t"].state_dict())
    step = Step(plan, models)
    total, _ = step(case.batch())
    if case.method == "tinybert":
        batch = case.batch()
        logits = models["t"](batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        close(total, torch.distributions.Categorical(logits=logits).entropy().mean(), "entropy")
    assert flat(step, total).abs().max().item() < 1e-8


@EACH
def test_the_teacher_gets_no_gradient(case) -> None:
    step = case.step()
    total, _ = step(case.batch())
    total.backward()
    assert all(p.grad is None and not p.requires_grad for p in step.models["t"].parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in step.models["s"].parameters())
    for block in step.projections.values():
        assert block.weight.grad.abs().max() > 0


@EACH
def test_the_gradient_is_that_of_finite_differences(case) -> None:
    step, batch = case.step(), case.batch()
    total, _ = step(batch)
    gradient = flat(step, total)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    direction /= direction.norm()
    pieces = direction.split([p.numel() for p in step.parameters])
    around = []
    for amount in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, piece in zip(step.parameters, pieces, strict=True):
                parameter.add_(amount * piece.view_as(parameter))
        around.append(step(batch)[0].item())
    slope = (around[0] - around[1]) / 2e-5
    expected = (gradient @ direction).item()
    assert abs(slope - expected) <= 1e-5 * max(1.0, abs(expected), gradient.norm().item() / 100)


@EACH
def test_bf16_autocast_stays_finite_and_near(case) -> None:
    plan = case.plan()
    step, batch = Step(plan, made(plan, dtype=torch.float32)), case.batch()
    exact, _ = step(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, values = step(batch)
    assert all(value.dtype == torch.float32 for value in values.values())
    assert torch.isfinite(flat(step, total)).all()
    close(total, exact, "total", rtol=0.1)


@EACH
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_extreme_models_stay_finite(case, scale) -> None:
    plan = case.plan()
    models = made(plan, dtype=torch.float32)
    with torch.no_grad():
        for model in models.values():
            for name, parameter in model.named_parameters():
                if "query" in name or "classifier" in name or "decoder" in name:
                    parameter.mul_(scale)
    step = Step(plan, models)
    total, values = step(case.batch())
    assert all(torch.isfinite(value) for value in values.values())
    assert torch.isfinite(flat(step, total)).all()


@EACH
def test_fp32_agrees_with_fp64(case) -> None:
    plan = case.plan()
    single = made(plan, dtype=torch.float32)
    double = {name: copy.deepcopy(model).double() for name, model in single.items()}
    a, b = Step(plan, single), Step(plan, double)
    batch = case.batch()
    for name, value in a(batch)[1].items():
        close(value.double(), b(batch)[1][name], name, rtol=1e-4)


@EACH
def test_optimised_or_not_the_losses_and_gradients_are_the_same(case) -> None:
    models = made(case.plan())
    fast, plain = (Step(case.plan(optimise=optimise), models) for optimise in (True, False))
    batch = case.batch()
    (total, values), (plain_total, plain_values) = fast(batch), plain(batch)
    for name, value in values.items():
        close(value, plain_values[name], name)
    gradients = dict(zip(plain.names, plain.gradients(plain_total), strict=True))
    for name, gradient in zip(fast.names, fast.gradients(total), strict=True):
        other = gradients[name]
        if gradient is None or other is None:
            assert gradient is None or not gradient.any()
            assert other is None or not other.any()
        else:
            close(gradient, other, name)


@pytest.mark.parametrize("case", [c for c in CASES if c.method != "kd"], ids=lambda case: case.id)
def test_padding_on_the_left_is_padding_on_the_right(case) -> None:
    """With position ids that count real tokens: BERT's positions are learned, so the ids must move with the text."""
    step = step_of(case)
    right = case.batch(lengths=(6, 6, 6))
    left = {name: value.clone() for name, value in right.items()}
    pad = torch.zeros(3, 2, dtype=torch.long)
    places = torch.arange(6).expand(3, 6)
    right = {
        name: torch.cat([v, pad + fill], 1) if v.ndim == 2 else v
        for (name, v), fill in zip(right.items(), (0, 0, -100), strict=True)
    }
    left = {
        name: torch.cat([pad + fill, v], 1) if v.ndim == 2 else v
        for (name, v), fill in zip(left.items(), (0, 0, -100), strict=True)
    }
    right["position_ids"], left["position_ids"] = torch.cat([places, pad], 1), torch.cat([pad, places], 1)
    terms = step(right)[1], step(left)[1]
    pooled = {f"m_{case.method}/{name}" for name in ("soft", "hard")} if case.pair.task == "classification" else set()
    for name in terms[0]:
        if name not in pooled:  # BERT's own pooler reads the first column, pad or not
            close(terms[1][name], terms[0][name], name)


def test_the_denominators_are_those_of_the_definitions() -> None:
    counts = {
        "m_kd": {3},
        "m_pkd": {3},
        "m_minilm": {4 * 13},
        "m_minilmv2": {8 * 13},
        "m_tinybert": {3, 13, 4 * (49 + 16 + 4)},
    }
    for case in (CASES[0], CASES[2], CASES[6], CASES[8], CASES[10]):
        step = step_of(case)
        assert set(step.distiller.denominators([batch_of()]).values()) == counts[f"m_{case.method}"]
