import json
import math
import os
import signal
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console
from tiny_runs import Rows, batch_of, cut, infos, models

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.plan import CounterPlan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.checkpoint import Checkpoints, Position, State, read
from gkd_dsl.runtime.counters import Counters
from gkd_dsl.runtime.distiller import Distiller
from gkd_dsl.runtime.errors import RunError, Stopped
from gkd_dsl.runtime.progress import Progress
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run
from gkd_dsl.schedules import AtCount, Clock, Comparison, Constant, Logic, Recent, StageProgress

SPEC = """gkd 1
teacher t = random_init("t", task = "classification", num_labels = 3)
student s = random_init("s", task = "classification", num_labels = 3)
data rows = csv("rows.csv", text = "text", label = "label")
project W = linear(s.H -> t.H)
loss inside[i] = mse(s.layer[i].out |> W <- t.layer[i + 1].out)
loss soft = kl(s.logits <- t.logits, temperature = 2.0)
loss hard = cross_entropy(s.logits, batch.labels)
counter k from 0 to 2 advance when mean(inside[k], last = 2 steps) < 1000.0
stage first for 5 steps { minimize hard + coin(0.5) * soft }
stage main for 9 steps {
  minimize sum(gate(i <= k) * inside[i] for i in 0 ..< 2) + coin(0.5) * soft + gate(k == 2) * hard
  optim = adamw(lr = 1e-2)
  accumulate = 2
  checkpoint_every = 1 step
  seed = 3
}
"""
# Two steps are needed before there is a mean of two; then the next member begins.
TRAJECTORY = [0, 0, 1, 1, 2, 2, 2, 2, 2]


def plan_of(folder, text=SPEC, dropout=0.2):
    (folder / "rows.csv").write_text("text,label\na,0\nb,1\nc,2\n")
    infos(folder, dropout=dropout)
    checked = check_text(text, "spec.gkd", root=folder)
    assert [f"{d.code} {d.message}" for d in checked.diagnostics] == []
    assert list(checked.later) == []
    return compile_plan(checked.graph)


class Steps:
    def __init__(self, at=None, act=None):
        self.records, self.stages, self.at, self.act = [], [], at, act

    def on_stage(self, record):
        self.stages.append(record)

    def on_step(self, record):
        self.records.append(record)
        if self.at == (record.stage, record.step):
            self.act()

    def on_evaluate(self, record):
        pass

    def close(self):
        pass


def run(folder, plan, steps, resume=False):
    return Run(
        plan, folder=folder, loaders=lambda stage: Rows(batches=5, seed=stage.stage.order), listeners=[steps]
    ).run(resume=resume)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody ends: its records, its tensors, its lines."""
    place = tmp_path_factory.mktemp("whole")
    steps, folder = Steps(), RunFolder.create("run", root=place)
    plan = plan_of(place)
    result = run(folder, plan, steps)
    return plan, steps, {name: value.clone() for name, value in tensors(result).items()}, lines(folder)


def tensors(result):
    kept = {**result.models, **result.projections}
    return {f"{name}/{key}": value for name, module in kept.items() for key, value in module.state_dict().items()}


def lines(folder):
    found = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for line in found:
        line.pop("tokens_per_second", None)
    return found


# --- the counters themselves --------------------------------------------------------------------


def sid(threshold, layers=3, steps=2):
    """SID's counter: one more layer where the last one is near enough, or its share of the stage is over."""
    cases = tuple(
        Logic(
            "or",
            Comparison("<", Recent(f"cos.{k - 1}", steps), Constant(threshold)),
            Comparison(">=", StageProgress("progress"), Constant(k / (layers + 1))),
        )
        for k in range(1, layers + 1)
    )
    names = tuple(f"cos.{k}" for k in range(layers))
    return CounterPlan("k", 1, layers + 1, AtCount("k", 1, cases), names)


def walk(plan, script, total):
    """The counter's value in each step, for the losses that a script gives at each."""
    counters, found = Counters([plan]), []
    for step in range(total):
        found.append(counters.values["k"])
        name = f"cos.{counters.values['k'] - 1}"
        watched = {name: script(name, step)} if counters.values["k"] < plan.stop else {}
        counters.advance(watched, Clock(step + 1, total, 10.0))
    return found


def test_without_a_threshold_each_layer_has_its_share_of_the_stage():
    assert walk(sid(0.0), lambda name, step: 1.0, 16) == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4


def test_a_scripted_loss_moves_the_counter_when_its_mean_is_under_the_threshold():
    values = {"cos.0": [0.9, 0.3, 0.1, 0.0], "cos.1": [0.5, 0.1, 0.1], "cos.2": [0.05, 0.05]}
    at = dict.fromkeys(values, 0)

    def script(name, step):
        at[name] += 1
        return values[name][at[name] - 1]

    # Means of two: 0.6, 0.2 (not under), 0.05; 0.3, 0.1; 0.05.
    assert walk(sid(0.2), script, 100)[:12] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]


def test_a_mean_needs_all_of_its_steps_and_a_loss_that_was_not_watched_begins_anew():
    counters = Counters([sid(0.5)])
    assert math.isnan(counters.mean("cos.0", 2))
    counters.advance({"cos.0": 0.9}, Clock(1, 100, 10.0))
    assert math.isnan(counters.mean("cos.0", 2))
    counters.advance({"cos.0": 0.5}, Clock(2, 100, 10.0))
    assert counters.mean("cos.0", 2) == pytest.approx(0.7)
    assert counters.recent["cos.0"] == [0.9, 0.5]
    counters.advance({"cos.0": 0.1}, Clock(3, 100, 10.0))
    assert counters.recent == {"cos.0": [0.5, 0.1]}
    counters.advance({}, Clock(4, 100, 10.0))
    assert counters.recent == {}


@pytest.mark.parametrize("order", [(2, 5), (5, 2)])
def test_of_two_windows_over_one_loss_the_wider_is_kept(order):
    plans = [
        CounterPlan(f"k{steps}", 0, 1, Comparison("<", Recent("cos", steps), Constant(0.0)), ("cos",))
        for steps in order
    ]
    counters = Counters(plans)
    for step in range(8):
        counters.advance({"cos": float(step)}, Clock(step + 1, 100, 10.0))
    assert counters.recent == {"cos": [3.0, 4.0, 5.0, 6.0, 7.0]}
    assert (counters.mean("cos", 2), counters.mean("cos", 5)) == (6.5, 5.0)


def test_begun_anew_no_loss_is_remembered():
    counters = Counters([sid(0.5)])
    counters.advance({"cos.0": 0.1}, Clock(1, 100, 10.0))
    counters.advance({"cos.0": 0.1}, Clock(2, 100, 10.0))
    assert counters.values == {"k": 2}
    counters.reset()
    assert (counters.values, counters.recent) == ({"k": 1}, {})


def test_every_condition_is_read_before_any_counter_moves():
    from gkd_dsl.schedules import CounterValue

    late = CounterPlan("b", 0, 5, Comparison(">=", CounterValue("a", 0, 5), Constant(1.0)), ())
    early = CounterPlan("a", 0, 5, Comparison(">=", StageProgress("step"), Constant(2.0)), ())
    for order in ([late, early], [early, late]):
        counters = Counters(order)
        found = []
        for step in range(1, 6):
            counters.advance({}, Clock(step, 10, 10.0))
            found.append((counters.values["a"], counters.values["b"]))
        assert found == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)]


def test_a_counter_stops_at_its_last_value():
    assert walk(sid(0.0, layers=1), lambda name, step: 1.0, 30)[-1] == 2


# --- in a run -----------------------------------------------------------------------------------


def test_a_run_counts_as_its_condition_says(whole):
    _, steps, _, _ = whole
    main = [record for record in steps.records if record.stage == "main"]
    assert [record.counters["k"] for record in main] == TRAJECTORY
    assert [record.weights["inside.1"] for record in main] == [float(k >= 1) for k in TRAJECTORY]
    assert [record.weights["hard"] for record in main] == [float(k == 2) for k in TRAJECTORY]
    assert all(record.counters == {} for record in steps.records if record.stage == "first")
    assert [dict(record.counters) for record in steps.stages] == [{}, {"k": 2}]


def test_two_coins_of_one_probability_fall_for_themselves(whole):
    _, steps, _, _ = whole
    first = [record.weights["soft"] for record in steps.records if record.stage == "first"]
    main = [record.weights["soft"] for record in steps.records if record.stage == "main"]
    assert set(first) | set(main) == {0.0, 1.0}
    assert first != main[:5]


def test_the_counter_is_logged(whole):
    _, _, _, logged = whole
    assert [line["counters"] for line in logged if line["kind"] == "step" and line["stage"] == "main"] == [
        {"k": k} for k in TRAJECTORY
    ]
    assert all("counters" not in line for line in logged if line["stage"] == "first")


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 8])
def test_stopped_after_a_step_and_resumed_is_the_run_that_was_not(whole, tmp_path, step):
    plan, steps, wanted, logged = whole
    folder = RunFolder.create("run", root=tmp_path)
    before, after = Steps(("main", step), lambda: os.kill(os.getpid(), signal.SIGINT)), Steps()
    with pytest.raises(Stopped):
        run(folder, plan, before)
    result = run(RunFolder.open(folder.path), plan, after, resume=True)
    found = tensors(result)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert lines(folder) == logged
    assert [record.counters for record in (*before.records, *after.records)] == [
        record.counters for record in steps.records
    ]


def test_killed_between_checkpoints_and_resumed_is_the_run_that_was_not(whole, tmp_path):
    plan, _, wanted, logged = whole
    rare = replace(plan, stages=tuple(replace(s, stage=replace(s.stage, checkpoint_every=None)) for s in plan.stages))

    class KilledError(Exception):
        pass

    def kill():
        raise KilledError

    folder = RunFolder.create("run", root=tmp_path)
    with pytest.raises(KilledError):
        run(folder, rare, Steps(("main", 4), kill))
    result = run(RunFolder.open(folder.path), rare, Steps(), resume=True)
    assert all(torch.equal(value, wanted[name]) for name, value in tensors(result).items())
    assert lines(folder) == logged


def test_another_condition_is_another_spec(whole, tmp_path):
    plan, _, _, _ = whole
    folder = RunFolder.create("run", root=tmp_path)
    with pytest.raises(Stopped):
        run(folder, plan, Steps(("main", 2), lambda: os.kill(os.getpid(), signal.SIGINT)))
    other = plan_of(tmp_path, SPEC.replace("1000.0", "1.0"))
    with pytest.raises(RunError, match="counter `k`"):
        run(RunFolder.open(folder.path), other, Steps(), resume=True)


def test_a_checkpoint_without_counters_is_still_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    position = Position("main", 0, 3, counters={"k": 2}, recent={"cos": [0.1, 1 / 3]})
    path = checkpoints.save(State(position))
    assert read(path).position == position
    data = json.loads((path / "state.json").read_text())
    assert data["position"] == asdict(position)
    del data["position"]["counters"], data["position"]["recent"]
    (path / "state.json").write_text(json.dumps(data))
    assert read(path).position == Position("main", 0, 3)


def test_the_progress_line_shows_the_counter(whole):
    _, steps, _, _ = whole
    console = Console(width=200, record=True, force_terminal=False)
    progress = Progress(console, every=1)
    progress.on_stage(steps.stages[1])
    for record in steps.records:
        if record.stage == "main":
            progress.on_step(record)
    progress.close()
    text = console.export_text()
    assert "k = 0/2" in text
    assert "k = 2/2" in text


# --- in a step ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def main_plan(tmp_path_factory):
    return plan_of(tmp_path_factory.mktemp("step"), dropout=0.0).stages[1]


def test_of_a_watched_family_only_the_present_member_is_computed(main_plan):
    distiller = Distiller(main_plan, models({node.name: node.info for node in main_plan.models}))
    batch = batch_of()
    counts = distiller.denominators([batch])
    for k, watched in ((0, {"inside.0"}), (1, {"inside.1"}), (2, set())):
        out = distiller.module(batch, Clock(0, 10, 5.0, counters=(("k", k),)), counts)
        assert set(out.watched) == watched
        for name in watched:
            assert not out.watched[name].requires_grad
            torch.testing.assert_close(out.watched[name], out.terms[name])


def test_a_loop_of_ones_own_keeps_the_counter(main_plan):
    distiller = Distiller(main_plan, models({node.name: node.info for node in main_plan.models}))
    for _ in range(2):  # Begun anew at step 0.
        found = []
        for step in range(6):
            distiller.step_to(step, 9)
            for part in range(2):
                distiller(batch_of(seed=10 * step + part)).backward()
            found.append((distiller.counters.values["k"], distiller.weights["hard"]))
        assert found == [(k, float(k == 2)) for k in TRAJECTORY[:6]]


def test_what_a_counter_reads_is_of_all_micro_batches(main_plan):
    whole = batch_of(8, 9, seed=5)
    parts = [cut(whole, start, start + 2) for start in range(0, 8, 2)]
    found = []
    for batches in ([whole], parts):
        distiller = Distiller(main_plan, models({node.name: node.info for node in main_plan.models}))
        for step in range(2):
            distiller.step_to(step, 9)
            counts = distiller.denominators(batches)
            for batch in batches:
                distiller(batch, counts)
        found.append(distiller.counters.recent["inside.0"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert len(found[0]) == 1


def test_a_coin_falls_alike_in_every_micro_batch(main_plan):
    distiller = Distiller(main_plan, models({node.name: node.info for node in main_plan.models}))
    falls = []
    for step in range(20):
        distiller.step_to(step, 20)
        seen = set()
        for part in range(3):
            distiller(batch_of(seed=part))
            seen.add(distiller.weights["soft"])
        assert len(seen) == 1
        falls += seen
    assert set(falls) == {0.0, 1.0}
