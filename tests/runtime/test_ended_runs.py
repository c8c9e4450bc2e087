"""Runs that end before their end: killed, stopped, out of disk; and what going on with them gives."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killable_run import STEPS, make

from gkd_dsl.runtime import checkpoint
from gkd_dsl.runtime.errors import RunError, Stopped
from gkd_dsl.runtime.run_folder import RunFolder

SCRIPT = Path(__file__).with_name("killable_run.py")


class Killed(BaseException):
    """Ends a run as abruptly as Python can."""


class At:
    """Does something after one of the steps of a run, counted over its stages."""

    def __init__(self, step, act):
        self.step, self.act, self.seen = step, act, 0

    def on_stage(self, record):
        pass

    def on_step(self, record):
        self.seen += 1
        if self.seen == self.step:
            self.act()

    def on_evaluate(self, record):
        pass

    def close(self):
        pass


def kill():
    raise Killed


def lines(folder):
    """What a run has logged, without the speed."""
    found = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for data in found:
        data.pop("tokens_per_second", None)
    return found


def tensors(run):
    return {
        (name, key): value.clone() for name, model in run.models.items() for key, value in model.state_dict().items()
    } | {(name, key): v.clone() for name, block in run.projections.items() for key, v in block.state_dict().items()}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(scope="module")
def whole(configs, tmp_path_factory):
    """The run that nothing ended: its log and its weights."""
    folder = RunFolder.create("whole", root=tmp_path_factory.mktemp("runs"))
    run = make(configs, folder)
    run.run()
    return lines(folder), tensors(run)


def same(run, folder, whole):
    logged, weights = whole
    assert lines(folder) == logged
    now = tensors(run)
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[key], weights[key]) for key in now)


def test_the_whole_run_is_what_the_plan_says(whole):
    logged, _ = whole
    steps = [(data["stage"], data["step"]) for data in logged if data["kind"] == "step"]
    assert steps == [("first", n) for n in range(1, 7)] + [("second", n) for n in range(1, 6)]
    evaluated = [data["step"] for data in logged if data["kind"] == "evaluate"]
    assert evaluated == [0, 2, 4, 6]


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_after_any_step_and_gone_on_with_it_is_the_same_run(configs, whole, tmp_path, step):
    folder = RunFolder.create("run", root=tmp_path)
    with pytest.raises(Killed):
        make(configs, folder, listeners=[At(step, kill)]).run()
    torch.manual_seed(step)
    folder = RunFolder.open(folder.path)
    run = make(configs, folder)
    run.run(resume=True)
    same(run, folder, whole)


def test_killed_twice(configs, whole, tmp_path):
    folder = RunFolder.create("run", root=tmp_path)
    with pytest.raises(Killed):
        make(configs, folder, listeners=[At(5, kill)]).run()
    with pytest.raises(Killed):
        make(configs, folder, listeners=[At(4, kill)]).run(resume=True)
    run = make(configs, folder)
    run.run(resume=True)
    same(run, folder, whole)


def test_a_process_killed_at_a_random_step_is_gone_on_with(configs, whole, tmp_path):
    step = random.SystemRandom().randrange(1, STEPS + 1)
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(out), str(configs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        for number in range(1, step + 1):
            assert process.stdout.readline(), f"the process ended before step {number}"
            if number < step:
                process.stdin.write("\n")
                process.stdin.flush()
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    folder = RunFolder.open(out)
    run = make(configs, folder)
    run.run(resume=True)
    same(run, folder, whole)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 3), (signal.SIGTERM, 8)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(configs, whole, tmp_path, number, step):
    folder = RunFolder.create("run", root=tmp_path)
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught:
        make(configs, folder, listeners=[At(step, lambda: os.kill(os.getpid(), number))]).run()
    assert signal.getsignal(number) is before
    stage, done = ("first", step) if step <= 6 else ("second", step - 6)
    assert (caught.value.stage, caught.value.step) == (stage, done)
    assert "--resume" in str(caught.value)
    assert str(folder.path) in str(caught.value)
    assert folder.checkpoints.pointed("last").name == f"{stage}-{done}"
    run = make(configs, folder)
    run.run(resume=True)
    same(run, folder, whole)


def test_going_on_with_a_finished_run_changes_nothing(configs, whole, tmp_path):
    folder = RunFolder.create("run", root=tmp_path)
    make(configs, folder).run()
    run = make(configs, folder)
    result = run.run(resume=True)
    same(run, folder, whole)
    assert set(result.metrics) == {"first"}


@pytest.mark.parametrize("step", [1, 5])
def test_another_spec_is_refused_and_the_difference_named(configs, tmp_path, step):
    folder = RunFolder.create("run", root=tmp_path)
    with pytest.raises(Killed):
        make(configs, folder, listeners=[At(step, kill)]).run()
    before = folder.metrics.read_text()
    with pytest.raises(RunError, match=r"stage `first`: optim\.weight_decay is 0\.01 there and 0\.5 here") as caught:
        make(configs, folder, weight_decay=0.5).run(resume=True)
    assert caught.value.code == "E0805"
    assert folder.metrics.read_text() == before


@pytest.mark.parametrize("call", range(1, 9))
def test_a_full_disk_leaves_the_last_checkpoint_whole(configs, whole, tmp_path, monkeypatch, call):
    folder, calls = RunFolder.create("run", root=tmp_path), []
    original = checkpoint.safetensors.torch.save_file

    def save(tensors, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == call:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(tensors, path, *args, **kwargs)

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", save)
    with pytest.raises(RunError, match="the disk is full") as caught:
        make(configs, folder).run()
    assert caught.value.code == "E0804"
    assert [p.name for p in folder.checkpoints.folder.iterdir() if p.name.startswith(".")] == []
    last = folder.checkpoints.pointed("last")
    if call <= 3:
        assert last is None
    else:
        assert f"the checkpoint {last.name} is whole" in caught.value.hint
        assert checkpoint.read(last).position.step == int(last.name.rpartition("-")[2])
    monkeypatch.undo()
    run = make(configs, folder)
    run.run(resume=True)
    same(run, folder, whole)


def test_a_checkpoint_that_cannot_take_its_name_leaves_the_last_one(configs, tmp_path, monkeypatch):
    folder = RunFolder.create("run", root=tmp_path)
    original = os.replace

    def refuse(source, target):
        if Path(target).name == "first-4":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        original(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunError, match="read-only"):
        make(configs, folder).run()
    last = folder.checkpoints.pointed("last")
    assert last.name == "first-2"
    assert checkpoint.read(last).position.step == 2


def test_a_damaged_checkpoint_is_an_error_in_words(configs, tmp_path):
    folder = RunFolder.create("run", root=tmp_path)
    with pytest.raises(Killed):
        make(configs, folder, listeners=[At(5, kill)]).run()
    broken = folder.checkpoints.pointed("last") / "optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(RunError, match="cannot be read") as caught:
        make(configs, folder).run(resume=True)
    assert caught.value.code == "E0805"


def test_the_last_two_and_the_best_are_kept(configs, tmp_path):
    folder = RunFolder.create("run", root=tmp_path)
    saved = []

    def look():
        saved.append(sorted(p.name for p in folder.checkpoints.folder.iterdir()))

    class Looks(At):
        def on_step(self, record):
            if folder.checkpoints.folder.exists():
                look()

    make(configs, folder, listeners=[Looks(0, look)]).run()
    look()
    assert max(len(names) for names in saved) <= 3
    assert saved[-1] == ["second-3", "second-5"]


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
