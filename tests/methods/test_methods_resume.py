"""A run of every method that is killed or stopped, then resumed, is the run that nobody ended, bit for bit."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from cases import CASES, NAMES, full_args
from harness import batch_of, spec, spec_plan, use

from gkd_dsl.runtime.errors import Stopped
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run
from gkd_dsl.schedules import Span

EACH = pytest.mark.parametrize("name", NAMES)
STEPS, BATCHES = 3, 2


class KilledError(Exception):
    pass


class At:
    """Does something after one step of the run, counted over all stages, and keeps the losses."""

    def __init__(self, step=0, act=None):
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


class Data:
    """Batches that follow from seed and epoch alone; an epoch has BATCHES."""

    def __init__(self, task, seed):
        self.task, self.seed = task, seed

    def steps_per_epoch(self, accumulate=1):
        return -(-BATCHES // accumulate)

    def epoch(self, epoch, start=0):
        for number in range(start, BATCHES):
            yield batch_of(self.task, (5, 3, 4, 6), 1000 * self.seed + 10 * epoch + number)

    def held_out(self):
        yield batch_of(self.task, (5, 3), 9000)

    @staticmethod
    def tokens(batch):
        return int(batch["attention_mask"].sum())


def plan_of(name):
    """The run of a method with dropout: STEPS steps a stage, over more than one epoch; a checkpoint every second."""
    case = CASES[name]
    text = spec(replace(case.models, dropout=0.1), *use(name, case.call, full_args(name)), "run m")
    plan = spec_plan(text, case.warns)
    shorter = {"duration": Span(STEPS, "steps"), "checkpoint_every": Span(2, "steps")}
    stages = [replace(s, stage=replace(s.stage, optim=replace(s.stage.optim, lr=1e-2), **shorter)) for s in plan.stages]
    return replace(plan, stages=tuple(stages))


def run(name, folder, listeners=(), resume=False):
    task = CASES[name].models.task
    return Run(
        plan_of(name), folder=folder, loaders=lambda plan: Data(task, plan.stage.order), listeners=listeners
    ).run(resume=resume)


def lines(folder):
    found = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for line in found:
        line.pop("tokens_per_second", None)
    return found


def tensors(result):
    kept = {**result.models, **result.projections}
    return {f"{name}/{key}": value for name, module in kept.items() for key, value in module.state_dict().items()}


def kill():
    raise KilledError


def stop():
    os.kill(os.getpid(), signal.SIGINT)


@EACH
def test_killed_and_resumed_is_uninterrupted(name, tmp_path) -> None:
    whole = RunFolder.create("whole", root=tmp_path)
    result = run(name, whole)
    wanted, expected = lines(whole), tensors(result)
    steps = [line for line in wanted if line["kind"] == "step"]
    plan = plan_of(name)
    stages = len(plan.stages)
    trained = {target.name for stage in plan.stages for target in stage.stage.trains if target.kind == "model"}
    assert len(steps) == STEPS * stages
    # A kill loses the step since the checkpoint, a stop loses none: between two stages, or in the only one.
    points = [(STEPS * stages, kill, KilledError), (STEPS if stages > 1 else 1, stop, Stopped)]
    if stages > 1:
        points.append((2, kill, KilledError))  # Nothing of this step is written, and nothing of the stages after it.
    for number, (step, act, error) in enumerate(points):
        folder = RunFolder.create(f"ended{number}", root=tmp_path)
        with pytest.raises(error):
            run(name, folder, [At(step, act)])
        found = run(name, RunFolder.open(folder.path), resume=True)
        assert lines(folder) == wanted, f"{act.__name__} after step {step}"
        again = tensors(found)
        assert expected.keys() >= again.keys(), again.keys() - expected.keys()
        different = [key for key, value in again.items() if not torch.equal(value, expected[key])]
        assert not different, f"{act.__name__} after step {step}: {different[:3]}"
        assert trained <= {key.split("/")[0] for key in again}
