"""The loop: how long a stage is, what happens when, and what listeners hear."""

import math
import time
from dataclasses import replace

import pytest
import torch
from plans import Data, evaluating, models, spec, stage_plan, teaching_plan

from gkd_dsl.graph.nodes import EvaluateSpec, OptimSpec
from gkd_dsl.runtime.checkpoint import Position
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.loop import length_of
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run, student_of
from gkd_dsl.schedules import Constant, Ramp, Span


class Heard:
    """Keeps every record, in the order they came."""

    def __init__(self):
        self.stages, self.steps, self.evaluations, self.order, self.closed = [], [], [], [], False

    def on_stage(self, record):
        self.stages.append(record)

    def on_step(self, record):
        self.steps.append(record)
        self.order.append(("step", record.step))

    def on_evaluate(self, record):
        self.evaluations.append(record)
        self.order.append(("evaluate", record.step))

    def close(self):
        self.closed = True


def run(*plans, data=None, folder=None, runtime=()):
    heard = Heard()
    whole = Run(
        spec(*plans, runtime=runtime),
        folder=folder,
        loaders=lambda _: data or Data(),
        models=models(),
        listeners=[heard],
    )
    return heard, whole.run(), whole


@pytest.mark.parametrize(
    ("duration", "accumulate", "steps"),
    [
        (Span(5, "steps"), 1, 5),
        (Span(13, "steps"), 4, 13),
        (Span(2, "epochs"), 1, 14),
        (Span(2, "epochs"), 4, 4),
        (Span(0.5, "epochs"), 1, 4),
    ],
)
def test_durations(duration, accumulate, steps):
    """25 rows by 4 are 7 micro-batches an epoch, the last of one row."""
    data = Data(rows=25)
    plan = stage_plan(("hard",), duration=duration, accumulate=accumulate)
    assert length_of(plan.stage, data).total_steps == steps
    heard, _, _ = run(plan, data=data)
    assert [record.step for record in heard.steps] == list(range(1, steps + 1))
    assert {record.total_steps for record in heard.steps} == {steps}
    assert heard.steps[-1].epoch == pytest.approx(steps / data.steps_per_epoch(accumulate))
    assert heard.closed


def test_a_stage_in_tokens_ends_with_the_step_that_reaches_them():
    data = Data(rows=24)
    counts = [data.tokens(made) for epoch in range(3) for made in data.epoch(epoch)]
    target = sum(counts[:9]) - 1
    heard, _, _ = run(stage_plan(("hard",), duration=Span(target, "tokens")), data=data)
    assert len(heard.steps) == 9
    assert heard.steps[-1].tokens == sum(counts[:9])
    mean = sum(counts[:6]) / 6
    assert heard.steps[0].total_steps == math.ceil(target / mean)


def test_the_tokens_of_a_step_are_those_of_all_its_micro_batches():
    data = Data(rows=24)
    mean = sum(data.tokens(made) for made in data.epoch(0)) / 6
    plan = stage_plan(("hard",), duration=Span(1000, "tokens"), accumulate=3)
    found = length_of(plan.stage, data)
    assert found.tokens_per_step == pytest.approx(3 * mean)
    assert found.total_steps == math.ceil(1000 / (3 * mean))


def test_a_step_knows_the_seed_of_its_stage():
    """Coins, drawn maps and random spans follow it."""
    from gkd_dsl.conditions import Coin

    def falls(seed):
        found = length_of(stage_plan(("hard",), seed=seed).stage, Data())
        return [Coin(Constant(0.5), "c").value(found.clock(Position("main", 0, step=step))) for step in range(64)]

    assert falls(3) == falls(3)
    assert falls(3) != falls(4)


def test_dropout_new_weights_and_projections_follow_the_seed_of_the_stage():
    def first(seed):
        heard, _, _ = run(stage_plan(("hard",), duration=Span(1, "steps"), seed=seed))
        plan = stage_plan(seed=seed)
        whole = Run(spec(plan), models=models())
        whole.make_projections(plan)
        assert whole.seed("s") == seed
        return heard.steps[0].loss, whole.projections["W"].weight.tolist()

    (loss, weight), again, (other_loss, other_weight) = first(3), first(3), first(4)
    assert (loss, weight) == again
    assert loss != other_loss
    assert weight != other_weight


def test_the_tokenizer_of_the_first_trained_model_reads_the_rows():
    plan = stage_plan()
    for nodes in (plan.models, plan.models[::-1]):
        assert student_of(replace(plan, models=nodes)).name == "s"
    assert student_of(teaching_plan()).name == "t"


def test_a_warm_up_in_tokens():
    data = Data(rows=24)
    mean = sum(data.tokens(made) for made in data.epoch(0)) / 6
    optim = OptimSpec(lr=1e-3, warmup=Span(4 * mean, "tokens"), decay="constant")
    heard, _, _ = run(stage_plan(("hard",), duration=Span(6, "steps"), optim=optim), data=data)
    assert [record.lr for record in heard.steps] == pytest.approx([0.0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_every_row_is_seen_once_an_epoch_and_steps_do_not_cross_epochs():
    seen = []

    class Counting(Data):
        def epoch(self, epoch, start=0):
            for number, made in enumerate(super().epoch(epoch, start)):
                seen.append((epoch, start + number, len(made["labels"])))
                yield made

    data = Counting(rows=25)
    heard, _, _ = run(stage_plan(("hard",), duration=Span(2, "epochs"), accumulate=3), data=data)
    assert len(heard.steps) == 6
    assert [(e, n) for e, n, _ in seen] == [(e, n) for e in range(2) for n in range(7)]
    assert sum(rows for _, _, rows in seen) == 50


def test_rates_weights_and_terms_are_told_as_they_were():
    optim = OptimSpec(lr=1e-3, warmup=Span(2, "steps"), decay="linear")
    ramp = Ramp(0.0, 1.0, Span(100, "percent"))
    plan = stage_plan(("hard", "hid"), duration=Span(6, "steps"), optim=optim, weights={"hid": ramp})
    heard, _, _ = run(plan)
    rates = [0.0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    assert [record.lr for record in heard.steps] == pytest.approx(rates)
    assert [record.weights["hid"] for record in heard.steps] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for record in heard.steps:
        assert record.loss == pytest.approx(sum(record.weights[n] * v for n, v in record.terms.items()), rel=1e-5)
        assert record.gradient_norm > 0
        assert record.tokens_per_second > 0
    assert heard.stages[0].losses == ("hard", "hid")
    assert heard.stages[0].parameters == sum(p.numel() for p in models()["s"].parameters()) + 16 * 20 + 20


def test_terms_over_micro_batches_are_the_means_over_all_their_rows():
    data = Data(rows=8, batch_size=2)
    made = models(dropout=0.0)
    with torch.no_grad():
        logits = made["s"](data.rows["input_ids"], attention_mask=data.rows["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits, data.rows["labels"]).item()
    heard = Heard()
    plan = stage_plan(("hard",), dropout=0.0, duration=Span(1, "steps"), accumulate=4)
    Run(spec(plan), loaders=lambda _: data, models=made, listeners=[heard]).run()
    assert heard.steps[0].terms["hard"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("every", "at"),
    [
        (Span(4, "steps"), [4, 8, 10]),
        (Span(30, "percent"), [3, 6, 9, 10]),
        (Span(1, "epochs"), [6, 10]),
        (Span(0.5, "epochs"), [3, 6, 9, 10]),
        (None, [10]),
    ],
)
def test_evaluations_come_when_they_are_due_and_at_the_end(every, at):
    plan = stage_plan(("hard",), duration=Span(10, "steps"), metrics=("acc",), evaluate=evaluating(every))
    heard, result, _ = run(plan)
    assert [record.step for record in heard.evaluations] == [0, *at]
    assert heard.order.index(("evaluate", at[0])) == heard.order.index(("step", at[0])) + 1
    assert result.metrics["main"]["acc"] == heard.evaluations[-1].metrics["acc"]


def test_an_evaluation_in_tokens():
    data = Data()
    counts = [data.tokens(made) for made in data.epoch(0)]
    every = sum(counts[:2])
    plan = stage_plan(
        ("hard",), duration=Span(6, "steps"), metrics=("acc",), evaluate=evaluating(Span(every, "tokens"))
    )
    heard, _, _ = run(plan, data=data)
    totals = [sum(counts[: n + 1]) for n in range(6)]
    due = [n + 1 for n in range(6) if totals[n] // every > (totals[n - 1] if n else 0) // every]
    assert [record.step for record in heard.evaluations] == list(dict.fromkeys([0, *due, 6]))


def test_a_metric_is_that_of_the_model_in_eval_mode_over_the_whole_set_and_changes_nothing():
    data = Data()
    plan = stage_plan(("hard",), duration=Span(4, "steps"))
    silent, _, _ = run(plan, data=data)
    measured = stage_plan(("hard",), duration=Span(4, "steps"), metrics=("acc",), evaluate=evaluating(Span(1, "steps")))
    heard, result, _ = run(measured, data=data)
    assert [record.loss for record in heard.steps] == [record.loss for record in silent.steps]
    model = result.models["s"].eval()
    with torch.no_grad():
        logits = model(data.held["input_ids"], attention_mask=data.held["attention_mask"]).logits
    right = (logits.argmax(-1) == data.held["labels"]).double().mean().item()
    assert heard.evaluations[-1].metrics["acc"] == pytest.approx(right)


@pytest.mark.parametrize("saved", [True, False])
def test_the_best_weights_are_those_left_at_the_end(tmp_path, saved, monkeypatch):
    """The metric is made to be best at step 2 of 5."""
    from gkd_dsl.runtime import evaluate

    values = iter([0.1, 0.2, 0.9, 0.5, 0.9, 0.3])
    real = evaluate.Evaluator.__call__
    kept = {}

    def scripted(self, names, batches, backend, clock):
        real(self, names, batches, backend, clock)
        kept[clock.step] = {k: v.clone() for k, v in self._models["s"].state_dict().items()}
        return {"acc": next(values)}

    monkeypatch.setattr(evaluate.Evaluator, "__call__", scripted)
    plan = stage_plan(
        duration=Span(5, "steps"), metrics=("acc",), evaluate=evaluating(Span(1, "steps")), keep_best="acc"
    )
    folder = RunFolder.create("best", root=tmp_path) if saved else None
    heard, result, _ = run(plan, folder=folder)
    assert [record.best for record in heard.evaluations] == [False, True, True, False, False, False]
    assert all(torch.equal(v, kept[2][k]) for k, v in result.models["s"].state_dict().items())
    assert result.metrics["main"]["acc"] == 0.9
    if folder is not None:
        assert folder.checkpoints.pointed("best").name == "main-2"
        assert folder.checkpoints.pointed("last").name == "main-5"


def test_a_metric_that_is_no_number_is_never_the_best(monkeypatch):
    from gkd_dsl.runtime import evaluate

    values = iter([math.nan, math.nan, 0.3, math.nan])
    monkeypatch.setattr(evaluate.Evaluator, "__call__", lambda *given: {"acc": next(values)})
    plan = stage_plan(
        duration=Span(3, "steps"), metrics=("acc",), evaluate=evaluating(Span(1, "steps")), keep_best="acc"
    )
    heard, result, _ = run(plan)
    assert [record.best for record in heard.evaluations] == [False, False, True, False]
    assert result.metrics["main"]["acc"] == 0.3


def test_of_a_metric_that_falls_the_least_is_the_best(monkeypatch):
    from gkd_dsl.runtime import evaluate

    values = iter([0.9, 0.5, 0.2, 0.4])
    monkeypatch.setattr(evaluate.Evaluator, "__call__", lambda *given: {"acc": next(values)})
    plan = stage_plan(
        duration=Span(3, "steps"), metrics=("acc",), evaluate=evaluating(Span(1, "steps")), keep_best="acc"
    )
    (item,) = plan.metrics
    plan = replace(plan, metrics=(replace(item, metric=replace(item.metric, greater_is_better=False)),))
    heard, result, _ = run(plan)
    assert [record.best for record in heard.evaluations] == [False, True, True, False]
    assert result.metrics["main"]["acc"] == 0.2


def test_a_model_taught_in_one_stage_teaches_in_the_next():
    heard, result, _ = run(teaching_plan(duration=Span(3, "steps")), stage_plan(order=1, duration=Span(3, "steps")))
    before = models()
    changed = [k for k, v in result.models["t"].state_dict().items() if not torch.equal(v, before["t"].state_dict()[k])]
    assert "classifier.weight" in changed
    assert [record.stage for record in heard.steps] == ["teach"] * 3 + ["main"] * 3
    fresh, _, _ = run(stage_plan(duration=Span(3, "steps")))
    assert heard.steps[3].terms["hard"] == fresh.steps[0].terms["hard"]
    assert heard.steps[3].terms["soft"] != fresh.steps[0].terms["soft"]
    assert all(p.requires_grad and p.grad is None for m in result.models.values() for p in m.parameters())
    assert not any(m.training for m in result.models.values())


def test_checkpoints_come_when_they_are_due(tmp_path, monkeypatch):
    from gkd_dsl.runtime.checkpoint import Checkpoints

    saved = []
    real = Checkpoints.save

    def save(self, state, *, best=False):
        saved.append(state.position.step)
        return real(self, state, best=best)

    monkeypatch.setattr(Checkpoints, "save", save)
    folder = RunFolder.create("due", root=tmp_path)
    run(stage_plan(("hard",), duration=Span(7, "steps"), checkpoint_every=Span(3, "steps")), folder=folder)
    assert saved == [3, 6, 7]
    assert sorted(path.name for path in folder.checkpoints.folder.iterdir()) == ["main-6", "main-7"]


def test_a_stage_that_says_nothing_saves_every_ten_minutes(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from gkd_dsl.runtime import loop
    from gkd_dsl.runtime.checkpoint import Checkpoints

    saved, now = [], [0.0]
    real = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, state, *, best=False: saved.append(state.position.step) or real(self, state)
    )
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter))

    class Slow(Heard):
        def on_step(self, record):
            now[0] += 400.0

    plan = stage_plan(("hard",), duration=Span(7, "steps"))
    folder = RunFolder.create("slow", root=tmp_path)
    Run(spec(plan), folder=folder, loaders=lambda _: Data(), models=models(), listeners=[Slow()]).run()
    assert saved == [2, 4, 6, 7]


def test_an_evaluation_without_held_out_rows_is_refused():
    plan = stage_plan(("hard",), metrics=("acc",), evaluate=(EvaluateSpec(("acc",), None),))
    with pytest.raises(RunError, match="holds nothing out"):
        run(plan, data=Data(held=0))


def test_a_source_without_batches_is_an_error_and_no_endless_loop():
    data = Data()
    data.epoch = lambda epoch, start=0: iter(())
    with pytest.raises(RunError, match="gives no batch"):
        run(stage_plan(("hard",)), data=data)


def test_a_step_that_is_not_finite_stops_the_run_and_closes_the_listeners(tmp_path):
    data = Data()
    plan = stage_plan(("hard", "soft"), optim=OptimSpec(name="sgd", lr=1e18, clip=None), duration=Span(9, "steps"))
    folder = RunFolder.create("wild", root=tmp_path)
    heard = Heard()
    whole = Run(spec(plan), folder=folder, loaders=lambda _: data, models=models(), listeners=[heard])
    with pytest.raises(RunError, match=r"E0802: .*in step \d of stage `main`"):
        whole.run()
    assert heard.closed
    assert all(math.isfinite(record.loss) for record in heard.steps)


def test_bf16_and_checkpointing_run_to_the_end():
    plan = stage_plan(duration=Span(3, "steps"))
    heard, _, _ = run(plan, runtime=(("checkpoint", True), ("device", "cpu"), ("precision", "bf16")))
    assert len(heard.steps) == 3
    assert all(math.isfinite(record.loss) for record in heard.steps)


def test_gemini_says_what_is_missing():
    with pytest.raises(RunError, match=r"`backend = gemini` needs (ColossalAI|a GPU)"):
        Run(replace(spec(stage_plan(("hard",))), backend="gemini"))
