"""One step against a loop written by hand with transformers and torch alone."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import START, batch_of, cut, infos, models, stage_plan

from gkd_dsl.graph.nodes import OptimSpec, ProjectNode, TrainTarget
from gkd_dsl.graph.plan import Apply, Counted, Free, LossPlan
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.extensions import load_extensions
from gkd_dsl.runtime.step import StepModule, make_projections
from gkd_dsl.schedules import Clock, Constant, Span, StepAt
from gkd_dsl.types import BATCH, LENGTH, Dim, LossType, TensorType


@pytest.fixture
def found(tmp_path):
    return infos(tmp_path)


def by_hand(teacher, student, projection, batch, weights):
    """The objective of `stage_plan`, as a person would write it."""
    teacher, student = copy.deepcopy(teacher).eval(), copy.deepcopy(student)
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        t = teacher(**inputs, output_hidden_states=True, output_attentions=True)
    s = student(**inputs, output_hidden_states=True, output_attentions=True)
    mask = batch["attention_mask"].bool()
    hard = F.cross_entropy(s.logits, batch["labels"])
    soft = 4.0 * F.kl_div((s.logits / 2).log_softmax(-1), (t.logits / 2).softmax(-1), reduction="batchmean")
    hidden = ((projection(s.hidden_states[1]) - t.hidden_states[2]) ** 2)[mask].mean()
    rows = []
    for b in range(len(mask)):
        n = int(mask[b].sum())
        p, q = (x[b, :, :n, :n] for x in (t.attentions[2], s.attentions[1]))
        rows.append((p * (p.log() - q.log())).sum(-1).flatten())
    inside = 0.5 * hidden + 2.0 * torch.cat(rows).mean()
    total = weights[0] * hard + weights[1] * soft + weights[2] * inside
    return total, {"hard": hard, "soft": soft, "inside": inside}, student


@pytest.mark.parametrize(("at", "last"), [(0, 0.5), (2, 0.5 + 0.5 * 2 / 4.5), (9, 1.0)])
def test_value_and_gradient_are_those_of_the_loop_by_hand(found, at, last):
    plan, made, batch = stage_plan(found), models(found), batch_of()
    step = StepModule(plan, made)
    clock = Clock(at, 10, 10.0)
    out = step(batch, clock, step.denominators([batch], clock))
    hand_block = copy.deepcopy(step.projections["W"])
    total, terms, student = by_hand(made["t"], made["s"], hand_block, batch, (0.3, 0.7, last))
    torch.testing.assert_close(out.loss, total, rtol=1e-5, atol=1e-6)
    for name, value in terms.items():
        torch.testing.assert_close(out.terms[name], value.detach(), rtol=1e-5, atol=1e-6)
    assert out.weights == pytest.approx({"hard": 0.3, "soft": 0.7, "inside": last})
    out.loss.backward()
    total.backward()
    for (name, ours), theirs in zip(made["s"].named_parameters(), student.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(step.projections["W"].weight.grad, hand_block.weight.grad, rtol=1e-4, atol=1e-6)


def test_accumulating_four_times_two_is_one_batch_of_eight(found):
    plan = stage_plan(found, optim=OptimSpec("sgd", lr=0.1, clip=None))
    whole = batch_of(8, 9, seed=5)
    parts = [cut(whole, start, start + 2) for start in range(0, 8, 2)]
    assert len({part["input_ids"].shape[1] for part in parts}) > 1
    after = []
    for batches in ([whole], parts):
        made = models(found)
        step, backend = StepModule(plan, made), LocalBackend()
        backend.begin(step, plan.stage.optim)
        after.append((backend.step(batches, START, 0.1), [p.detach().clone() for _, p in step.trainable()]))
        backend.end()
    (one, one_weights), (four, four_weights) = after
    assert four.loss == pytest.approx(one.loss, rel=1e-5)
    assert four.terms == pytest.approx(one.terms, rel=1e-5)
    assert four.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)
    for ours, theirs in zip(four_weights, one_weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_denominators_are_the_counted_positions(found):
    step, batches = StepModule(stage_plan(found), models(found)), [batch_of(4, 9, 1), batch_of(3, 5, 2)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    counts = step.denominators(batches, START)
    assert counts == {"op/ce": 7, "op/kl": 7, "op/mse": tokens, "op/akl": 2 * tokens}


def test_a_teacher_stays_in_eval_and_gets_no_gradient(tmp_path):
    found = infos(tmp_path, dropout=0.5)
    made, batch = models(found), batch_of()
    made["t"].train()
    step = StepModule(stage_plan(found), made).train()
    assert made["s"].training
    counts = step.denominators([batch], START)
    step(batch, START, counts).loss.backward()
    assert not made["t"].training
    assert made["s"].training
    assert all(p.grad is None and not p.requires_grad for p in made["t"].parameters())
    assert not any(module is made["t"] for module in step.modules())


@pytest.mark.parametrize(
    ("part", "inside"),
    [("body", "bert."), ("embed", "bert.embeddings."), ("head", "classifier."), ("layer.1", "bert.encoder.layer.1.")],
)
def test_only_the_named_part_trains_and_the_rest_is_put_back(found, part, inside):
    made, batch = models(found), batch_of()
    made["s"].bert.embeddings.LayerNorm.weight.requires_grad_(False)
    before = {(m, n): p.requires_grad for m, model in made.items() for n, p in model.named_parameters()}
    step = StepModule(stage_plan(found, trains=(TrainTarget("model", "s", part),)), made)
    names = {name for name, _ in step.trainable()}
    expected = {f"s/{n}" for n, _ in made["s"].named_parameters() if n.startswith(inside)}
    assert names == expected
    step(batch, START, step.denominators([batch], START)).loss.backward()
    for name, parameter in made["s"].named_parameters():
        assert parameter.requires_grad == (f"s/{name}" in names)
        if f"s/{name}" not in names:
            assert parameter.grad is None, name
    assert step.projections["W"].weight.grad is None
    step.release()
    assert {(m, n): p.requires_grad for m, model in made.items() for n, p in model.named_parameters()} == before


def test_nothing_to_train_is_an_error(found):
    with pytest.raises(RunError, match="no parameter to train"):
        StepModule(stage_plan(found, trains=()), models(found))


def test_a_wrong_shape_is_found_in_the_first_batch_with_tap_and_origin(found):
    plan, batch = stage_plan(found), batch_of()
    forward = plan.forward("t/forward")
    wrong = Dim("t.H", 99, 'config `hidden_size` of "t"')
    taps = tuple(
        replace(tap, type=TensorType("float", (BATCH, LENGTH, wrong))) if tap.key == "t/hidden" else tap
        for tap in forward.taps
    )
    plan = replace(plan, forwards=(replace(forward, taps=taps), plan.forward("s/forward")))
    step = StepModule(plan, models(found))
    with pytest.raises(RunError) as caught:
        step(batch, START, step.denominators([batch], START))
    assert caught.value.code == "E0801"
    assert "`t.hidden[2]`" in caught.value.message
    assert "t.H = 99" in caught.value.message
    assert "[4, 9, 24]" in caught.value.message
    assert 'config `hidden_size` of "t"' in caught.value.hint


def test_sizes_that_no_config_says_are_not_checked_and_count(found):
    plan, made, batch = stage_plan(found), models(found), batch_of()
    odd = (BATCH, Dim("?"), LENGTH)
    program = tuple(
        replace(i, type=LossType(odd)) if isinstance(i, Apply) and i.key == "op/akl" else i for i in plan.program
    )
    counted = tuple(replace(c, dims=odd) if c.key == "op/akl" else c for c in plan.counted)
    values = []
    for each in (plan, replace(plan, program=program, counted=counted)):
        step = StepModule(each, made)
        values.append(step(batch, START, step.denominators([batch], START)).loss.detach())
        step.release()
    torch.testing.assert_close(*values)


def test_a_column_that_is_missing_is_named(found):
    step, batch = StepModule(stage_plan(found), models(found)), batch_of()
    del batch["labels"]
    with pytest.raises(RunError, match=r"reads `batch\.labels`"):
        step.count(batch, START)


def _with_labelled(plan):
    """The plan whose `hard` counts rows with a label only."""
    valid = Apply("op/labelled", "not_equal", (("a", "batch/labels"),), (("b", -100),), TensorType("bool", (BATCH,)))
    program = tuple(
        replace(i, inputs=(*i.inputs, ("valid", "op/labelled"))) if isinstance(i, Apply) and i.key == "op/ce" else i
        for i in plan.program
    )
    counted = tuple(Counted("op/ce", (BATCH,), "op/labelled") if c.key == "op/ce" else c for c in plan.counted)
    return replace(plan, valid_program=(*plan.valid_program, valid), program=program, counted=counted)


def test_a_loss_that_counts_nothing_is_zero_and_has_no_gradient(found):
    plan, made, batch = _with_labelled(stage_plan(found)), models(found), batch_of()
    plan = replace(plan, weights=(Constant(1.0), Constant(0.0), Constant(0.0)))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    step = StepModule(plan, made)
    out = step(batch, START, step.denominators([batch], START))
    assert out.terms["hard"].item() == 0.0
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for _, p in step.trainable())


def test_rows_without_a_label_change_nothing(found):
    plan, made, batch = _with_labelled(stage_plan(found)), models(found), batch_of()
    batch["labels"][2:] = -100
    step = StepModule(plan, made)
    hard = step(batch, START, step.denominators([batch], START)).terms["hard"]
    made["s"].eval()
    logits = made["s"](input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(hard, F.cross_entropy(logits[:2], batch["labels"][:2]).detach())


def test_parts_without_weight_are_left_out_after_the_first_batch(found, monkeypatch):
    plan, made, batch = stage_plan(found), models(found), batch_of()
    off = StepAt(0.0, 0.5, Span(5, "steps"))
    losses = (*plan.losses[:2], LossPlan("inside", ((off, "op/mse"), (Constant(2.0), "op/akl"))))
    step = StepModule(replace(plan, losses=losses), made)
    counts = step.denominators([batch], START)
    first = step(batch, START, counts)
    calls = []
    block = step.projections["W"]
    block.register_forward_hook(lambda *_: calls.append(1))
    second = step(batch, START, counts)
    assert calls == []
    assert torch.equal(first.loss, second.loss)
    step(batch, Clock(5, 10, 10.0), counts)
    assert calls == [1]


def test_nothing_of_the_taps_is_left_when_the_step_is_done(found, monkeypatch):
    plan, made, batch = stage_plan(found), models(found), batch_of()
    step = StepModule(plan, made)
    kept = []
    original = step._program.run

    def run(env, *args, **kwargs):
        original(env, *args, **kwargs)
        kept.append(set(env))

    monkeypatch.setattr(step._program, "run", run)
    step(batch, START, step.denominators([batch], START))
    assert {key for key in kept[0] if not key.startswith("batch/")} == {"op/valid"}


def test_freeing_changes_nothing(found):
    plan, made, batch = stage_plan(found), models(found), batch_of()
    kept = replace(plan, program=tuple(step for step in plan.program if not isinstance(step, Free)))
    gradients = []
    for each in (plan, kept):
        step = StepModule(each, made, make_projections(plan.projections))
        step(batch, START, step.denominators([batch], START)).loss.backward()
        gradients.append([p.grad.clone() for _, p in step.trainable() if p.grad is not None])
        made["s"].zero_grad()
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_is_on_in_the_student_and_off_in_the_teacher(tmp_path):
    found = infos(tmp_path, dropout=0.5)
    made, batch = models(found), batch_of()
    step, seen = StepModule(stage_plan(found), made).train(), {"s": [], "t": []}
    for name, taken in seen.items():
        made[name].base_model.encoder.layer[0].register_forward_hook(
            lambda module, args, output, taken=taken: taken.append(
                (output if isinstance(output, torch.Tensor) else output[0]).detach()
            )
        )
    counts = step.denominators([batch], START)
    for _ in range(2):
        step(batch, START, counts)
    assert torch.equal(*seen["t"])
    assert not torch.equal(*seen["s"])


def test_a_projection_alone_trains_beside_a_student_that_does_not(found):
    plan = stage_plan(found, trains=(TrainTarget("project", "W"),))
    made, batch = models(found), batch_of()
    step = StepModule(plan, made).train()
    assert [name for name, _ in step.trainable()] == ["project/W/weight", "project/W/bias"]
    step(batch, START, step.denominators([batch], START)).loss.backward()
    assert not made["s"].training
    assert all(p.grad is None for p in made["s"].parameters())
    assert step.projections["W"].weight.grad.any()


def test_a_loss_of_weight_zero_is_still_told(found):
    plan, made, batch = stage_plan(found), models(found), batch_of()
    step = StepModule(replace(plan, weights=(Constant(1.0), Constant(0.0), Constant(0.0))), made)
    out = step(batch, START, step.denominators([batch], START))
    assert out.terms["soft"] > 0
    torch.testing.assert_close(out.loss.detach(), out.terms["hard"])


def test_token_and_sample_weights_multiply_the_sum_and_leave_the_count(found):
    plan, made, batch = stage_plan(found), models(found), batch_of()
    batch["weight"] = torch.tensor([0.0, 1.0, 2.0, 0.5])
    program = tuple(
        replace(i, inputs=(*i.inputs, ("sample_weight", "batch/weight")))
        if isinstance(i, Apply) and i.key == "op/ce"
        else i
        for i in plan.program
    )
    counted = tuple(replace(c, sample_weight="batch/weight") if c.key == "op/ce" else c for c in plan.counted)
    step = StepModule(replace(plan, program=program, counted=counted), made)
    hard = step(batch, START, step.denominators([batch], START)).terms["hard"]
    logits = made["s"](input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    each = F.cross_entropy(logits, batch["labels"], reduction="none").detach()
    torch.testing.assert_close(hard, (each * batch["weight"]).sum() / 4)


def test_a_causal_map_counts_its_lower_half_and_is_weighted_by_its_queries(found):
    plan, made, batch = stage_plan(found), models(found), batch_of()
    batch["weight"] = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    dims = (BATCH, found["s"].dim("A", "s"), LENGTH, LENGTH)
    (old,) = (i for i in plan.program if isinstance(i, Apply) and i.key == "op/akl")
    cells = replace(
        old, op="mse", inputs=(*old.inputs, ("token_weight", "batch/weight")),
        attrs=(("causal", False), ("dims", ("B", "*", "L", "L"))), type=LossType(dims),
    )  # fmt: skip
    counted = tuple(
        Counted("op/akl", dims, "op/valid", True, "batch/weight") if c.key == "op/akl" else c for c in plan.counted
    )
    program = tuple(cells if i is old else i for i in plan.program)
    losses = (*plan.losses[:2], LossPlan("inside", ((Constant(1.0), "op/akl"),)))
    step, seen = StepModule(replace(plan, program=program, counted=counted, losses=losses), made), []
    mse = step._program._functions["mse"]

    def spy(student, teacher, **rest):
        seen.append((student.detach(), teacher))
        return mse(student=student, teacher=teacher, **rest)

    step._program._functions["mse"] = spy
    counts = step.denominators([batch], START)
    inside = step(batch, START, counts).terms["inside"]
    ((s, t),) = seen
    values = [
        (s[b, a, q, k] - t[b, a, q, k]) ** 2 * batch["weight"][b, q]
        for b, n in enumerate(batch["attention_mask"].sum(1).tolist())
        for a in range(2)
        for q in range(n)
        for k in range(q + 1)
    ]
    assert counts["op/akl"] == len(values)
    torch.testing.assert_close(inside, torch.stack(values).sum() / len(values))


@pytest.mark.parametrize("init", ["default", "identity", "zeros"])
def test_projections_start_as_they_say_and_alike_beside_others(init):
    node = ProjectNode("project/W", name="W", in_features=3, out_features=4, init=init)
    other = ProjectNode("project/V", name="V", in_features=3, out_features=4)
    state = torch.get_rng_state()
    alone, beside = make_projections([node], 3)["W"], make_projections([other, node], 3)["W"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(alone.weight, beside.weight)
    assert alone.bias.shape == (4,)
    assert alone.bias.any() == (init == "default")
    if init == "identity":
        assert torch.equal(alone.weight, torch.eye(4, 3))
    elif init == "zeros":
        assert not alone.weight.any()
    else:
        assert 0 < alone.weight.abs().max() <= 1 / math.sqrt(3)


def test_an_operator_of_the_users_runs(found, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import gkd_dsl\n\n"
        '@gkd_dsl.op("gap(student: Float[B, C], teacher: Float[B, C], power: float = 1.0) -> Loss[B]")\n'
        "def gap(student, teacher, power):\n    return ((student - teacher).abs() ** power).sum(-1)\n"
    )
    plan, made, batch = stage_plan(found), models(found), batch_of()
    program = tuple(
        replace(i, op="mine.py:gap", attrs=(("power", StepAt(1.0, 2.0, Span(5, "steps"))),))
        if isinstance(i, Apply) and i.key == "op/kl"
        else i
        for i in plan.program
    )
    plan = replace(plan, program=program)
    load_extensions(plan, tmp_path)
    step = StepModule(plan, made)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    gap = (made["s"](**inputs).logits - made["t"](**inputs).logits).detach()
    for at, power in ((0, 1), (5, 2)):
        clock = Clock(at, 10, 10.0)
        soft = step(batch, clock, step.denominators([batch], clock)).terms["soft"]
        torch.testing.assert_close(soft, (gap.abs() ** power).sum(-1).mean())


def test_an_operator_whose_file_is_gone_is_an_error(found, tmp_path):
    plan = stage_plan(found)
    program = tuple(replace(i, op="gone.py:gap") if isinstance(i, Apply) else i for i in plan.program)
    with pytest.raises(RunError, match=r"gone\.py"):
        load_extensions(replace(plan, program=program), tmp_path)
