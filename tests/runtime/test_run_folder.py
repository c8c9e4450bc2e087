"""What a run leaves in its folder, and what it shows on the way."""

import gc
import io
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from killable_run import make
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import LOGITS, Rows, infos, models, spec_of, stage_plan

from gkd_dsl.graph.nodes import TrainTarget
from gkd_dsl.graph.plan import Apply, Run
from gkd_dsl.runtime.checkpoint import Position
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.logs import RunLog, evaluations
from gkd_dsl.runtime.progress import Progress, duration
from gkd_dsl.runtime.records import EvaluateRecord, StageRecord, StepRecord
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run as SpecRun
from gkd_dsl.schedules import Constant, Span

STAGE = StageRecord("main", 0, 1, 0, 20, ("soft",), ("acc",), 1234)


def step_record(step, **changes):
    record = StepRecord("main", step, 20, step / 10, 0.7, {"soft": 1.4}, {"soft": 0.5}, 1e-3, 2.0, 100 * step, 5000.0)
    return replace(record, **changes)


def scalars(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a whole run."""
    folder = RunFolder.create("whole", root=tmp_path_factory.mktemp("runs"))
    make(tmp_path_factory.mktemp("configs"), folder).run()
    return folder


def test_the_folder_holds_what_it_says(done):
    assert {p.name for p in done.path.iterdir()} == {"plan.json", "metrics.jsonl", "tensorboard", "checkpoints", "last"}
    last = done.checkpoints.pointed("last")
    assert last.name == "second-5"
    assert {p.name for p in last.iterdir()} == {
        "model.s.safetensors",
        "optimizer.safetensors",
        "projections.safetensors",
        "spec.json",
        "state.json",
    }
    state = json.loads((last / "state.json").read_text())
    assert set(state["versions"]) == {"torch", "transformers", "numpy"}
    assert set(state["rng"]) == {"python", "numpy", "torch", "cuda"}
    assert state["position"]["finished"]
    assert json.loads((done.path / "plan.json").read_text())["stage `first`: batch_size"] == "32"


def test_tensorboard_has_every_number_of_the_log(done):
    logged = [json.loads(line) for line in done.metrics.read_text().splitlines()]
    for stage in ("first", "second"):
        steps = [data for data in logged if data["kind"] == "step" and data["stage"] == stage]
        found = scalars(done.tensorboard / stage)
        for tag, number in {
            "loss": lambda data: data["loss"],
            "lr": lambda data: data["lr"],
            "gradient_norm": lambda data: data["gradient_norm"],
            "tokens_per_second": lambda data: data["tokens_per_second"],
            "raw/inside": lambda data: data["terms"]["inside"],
            "weight/inside": lambda data: data["weights"]["inside"],
            "weighted/inside": lambda data: data["terms"]["inside"] * data["weights"]["inside"],
        }.items():
            assert [step for step, _ in found[tag]] == [data["step"] for data in steps]
            # The log rounds tokens per second to a tenth.
            assert [value for _, value in found[tag]] == pytest.approx(
                [number(d) for d in steps], rel=1e-4, abs=0.06 if tag == "tokens_per_second" else 0.0
            )
    assert [step for step, _ in scalars(done.tensorboard / "first")["metric/acc"]] == [0, 2, 4, 6]


def test_the_objective_in_the_log_is_the_weighted_sum_of_its_terms(done):
    for data in map(json.loads, done.metrics.read_text().splitlines()):
        if data["kind"] == "step":
            total = sum(data["weights"][name] * value for name, value in data["terms"].items())
            assert data["loss"] == pytest.approx(total, rel=1e-5)


def test_a_resumed_log_shows_no_step_twice_and_drops_a_torn_line(tmp_path):
    folder = RunFolder.create("run", root=tmp_path)
    log = RunLog(folder)
    log.on_stage(STAGE)
    for step in range(1, 6):
        log.on_step(step_record(step))
    log.close()
    with folder.metrics.open("a") as file:
        file.write('{"kind": "step", "sta')
    log = RunLog(folder, Position("main", 0, step=3))
    log.on_stage(replace(STAGE, step=3))
    for step in range(4, 8):
        log.on_step(step_record(step, loss=0.1))
    log.close()
    found = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [data["step"] for data in found] == list(range(1, 8))
    assert [data["loss"] for data in found] == [0.7] * 3 + [0.1] * 4
    shown = scalars(folder.tensorboard / "main")["loss"]
    assert [step for step, _ in shown] == list(range(1, 8))
    assert [value for _, value in shown] == pytest.approx([0.7] * 3 + [0.1] * 4)


def test_lines_that_are_none_of_ours_are_left_out(tmp_path):
    folder = RunFolder.create("run", root=tmp_path)
    log = RunLog(folder)
    log.on_evaluate(EvaluateRecord("main", 1, {"acc": 0.5}))
    log.close()
    whole = folder.metrics.read_bytes()
    folder.metrics.write_bytes(
        b'[]\n3\n{}\n{"kind": "step", "order": null, "step": 1}\n\xff\xfe\x00\n' + whole + b'{"ki'
    )
    assert [record.metrics for record in evaluations(folder)] == [{"acc": 0.5}]
    RunLog(folder, Position("main", 0, step=3)).close()
    assert folder.metrics.read_bytes() == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_log_that_cannot_be_written_ends_in_words_and_so_does_its_end(tmp_path):
    folder = RunFolder.create("run", root=tmp_path)
    folder.metrics.symlink_to("/dev/full")
    log = RunLog(folder)
    log.on_stage(STAGE)
    for act in (lambda: log.on_step(step_record(1)), log.close):
        with pytest.raises(RunError, match=r"E0804: metrics.jsonl cannot be written to .*: the disk is full"):
            act()
    log.close()


def test_what_is_not_a_number_is_null_in_the_log_and_comes_back(tmp_path):
    folder = RunFolder.create("run", root=tmp_path)
    log = RunLog(folder)
    log.on_stage(STAGE)
    log.on_evaluate(EvaluateRecord("main", 0, {"acc": math.nan}))
    log.on_evaluate(EvaluateRecord("main", 4, {"acc": 0.5}, best=True))
    log.close()
    assert json.loads(folder.metrics.read_text().splitlines()[0])["metrics"] == {"acc": None}
    first, second = evaluations(folder)
    assert math.isnan(first.metrics["acc"])
    assert second == EvaluateRecord("main", 4, {"acc": 0.5}, best=True)


def test_lines_where_there_is_no_terminal():
    out = io.StringIO()
    progress = Progress(Console(file=out, width=60), every=10)
    progress.on_stage(STAGE)
    progress.on_evaluate(EvaluateRecord("main", 0, {"acc": 0.25}))
    for step in range(1, 21):
        progress.on_step(step_record(step))
    progress.on_evaluate(EvaluateRecord("main", 20, {"acc": 0.5}, best=True))
    progress.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "stage main: 20 steps, 1,234 parameters trained"
    assert lines[1].strip() == "step 0: acc 0.2500"
    steps = [line for line in lines if line.startswith("  main ")]
    assert [line.split()[1] for line in steps] == ["1/20", "10/20", "20/20"]
    assert all("loss 0.7" in line and "soft 1.4" in line and "5,000 tokens/s" in line for line in steps)
    assert lines[-1].strip() == "step 20: acc 0.5000  (best so far)"


def test_a_terminal_shows_every_loss_the_rate_the_speed_and_the_time_left():
    out = io.StringIO()
    progress = Progress(Console(file=out, width=120, force_terminal=True, color_system=None))
    progress.on_stage(STAGE)
    for step in range(1, 21):
        progress.on_step(step_record(step))
    progress.close()
    text = out.getvalue()
    for part in ("step 20/20", "epoch 2.00", "lr 0.001", "5,000 tokens/s", "left", "soft", "1.4", "0.5", "objective"):
        assert part in text, part


@pytest.mark.parametrize(("seconds", "text"), [(41.6, "42 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


def _alone(plan, *trains):
    """The stage with the student and its labels only."""
    taps = tuple(tap for tap in plan.forward("s/forward").taps if tap.path == LOGITS)
    loss = tuple(i for i in plan.program if isinstance(i, Apply) and i.key == "op/ce")
    return replace(
        plan,
        models=plan.models[:1],
        projections=(),
        forwards=(replace(plan.forward("s/forward"), taps=taps),),
        valid_program=(),
        counted=plan.counted[:1],
        program=(Run("s/forward"), *loss),
        losses=plan.losses[:1],
        weights=(Constant(1.0),),
        stage=replace(plan.stage, trains=trains),
    )


def test_a_model_that_no_later_stage_reads_is_let_go(tmp_path):
    found = infos(tmp_path)
    plan = stage_plan(found, duration=Span(1, "steps"))
    made = models(found)
    teacher = weakref.ref(made["t"])
    seen = []

    class Watch(Progress):
        def on_stage(self, record):
            seen.append(teacher() is not None)

        def on_step(self, record):
            pass

    run = SpecRun(
        spec_of(plan, _alone(plan, TrainTarget("model", "s"))),
        models=made,
        loaders=lambda stage: Rows(),
        listeners=[Watch()],
    )
    del made
    original = run._release

    def release(done):
        original(done)
        gc.collect()

    run._release = release
    result = run.run()
    assert seen == [True, False]
    assert set(result.models) == {"s"}


def test_a_run_folder_is_never_written_over(tmp_path):
    first, second = (RunFolder.create("a spec", root=tmp_path / "runs") for _ in range(2))
    assert first.path != second.path
    assert second.path.name == f"{first.path.name}-2"
    (first.path / "spec.gkd").write_text("gkd 1\n")
    with pytest.raises(RunError, match="--resume"):
        RunFolder.create("a spec", out=first.path)
    assert (first.path / "spec.gkd").read_text() == "gkd 1\n"


def test_a_folder_that_cannot_be_made_is_an_error_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as caught:
        RunFolder.create("run", root=tmp_path / "file" / "runs")
    assert caught.value.code == "E0804"
    with pytest.raises(RunError, match="there is no run folder"):
        RunFolder.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="holds no run"):
        RunFolder.open(tmp_path / "empty")
