"""What is said when memory runs out."""

import pytest
import torch
from plans import batch, models, stage_plan

from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.units import in_bytes
from gkd_dsl.runtime import memory
from gkd_dsl.runtime.backends.base import Settings
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.step import StepModule
from gkd_dsl.schedules import Clock

CLOCK = Clock(3, 10, 5.0)


@pytest.fixture
def run_out():
    """The error of a second step, in which a loss finds no memory."""
    made = models(dropout=0.0)
    step = StepModule(stage_plan(("hard",), dropout=0.0), made)
    backend = LocalBackend(Settings(device="cpu"))
    backend.begin(step, step.plan.stage.optim)
    backend.step([batch(4, 7)], CLOCK, 1e-3)

    def full(**given):
        raise MemoryError

    def run():
        step._program._functions["cross_entropy"] = full
        with pytest.raises(RunError) as raised:
            backend.step([batch(4, 7)], CLOCK, 1e-3)
        return raised.value

    run.step = step
    return run


def test_it_says_what_was_alive_and_what_the_plan_is(run_out):
    error = run_out()
    weights = sum(p.nbytes for model in run_out.step.models.values() for p in model.parameters())
    weights += sum(p.nbytes for model in run_out.step.teachers.models.values() for p in model.parameters())
    trained = [p for _, p in run_out.step.trainable()]
    # Two moments, and a step counter for each tensor.
    state = 2 * sum(p.nbytes for p in trained) + 4 * len(trained)
    assert f"alive were weights {in_bytes(weights)}, gradients 0, optimiser {in_bytes(state)}" in error.hint
    assert "; the plan is " in error.hint
    # This machine has room for it: the plan does not explain what happened, and the usual advice follows.
    assert "would fit" in error.hint
    assert "lower `batch_size` to 2" in error.hint


def test_it_says_what_would_fit(run_out, monkeypatch):
    monkeypatch.setattr(memory, "this_machine", lambda: Machine(1, 130_000, 130_000, kind="cpu"))
    whole = memory._machine(run_out.step.trainable()[0][1].device, 1)
    assert whole.host_memory == 130_000
    assert "; this fits: " in run_out().hint
    assert "runtime {" in run_out().hint


def test_a_plan_that_cannot_be_made_hides_nothing(run_out, monkeypatch):
    def broken(*given, **more):
        raise ValueError

    monkeypatch.setattr(memory, "estimate_stage", broken)
    error = run_out()
    assert error.code == "E0803"
    assert "lower `batch_size` to 2 and double `accumulate`" in error.hint


def test_which_memory_it_was():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    full = torch.OutOfMemoryError("CUDA out of memory")
    assert [memory._where(full, device) for device in (gpu, cpu)] == ["the GPU", "this machine"]
    assert [memory._where(MemoryError(), device) for device in (gpu, cpu)] == ["the host", "this machine"]


@pytest.mark.parametrize(("processes", "own"), [(1, 5), (2, 3), (4, 2)])
def test_the_plan_is_of_this_micro_batch(monkeypatch, processes, own):
    """Of the rows of one process, and of the length that the texts had; weights in bf16 count as such."""
    asked = []
    inner = memory.estimate_stage

    def estimate(plan, machine, setup, **more):
        asked.append((plan.stage.max_length, setup.half, more["rows"], machine.devices))
        return inner(plan, machine, setup, **more)

    monkeypatch.setattr(memory, "estimate_stage", estimate)
    step = StepModule(stage_plan(("hard",), max_length=32), models())
    settings, cpu = Settings(precision="bf16", device="cpu"), torch.device("cpu")
    said, hint = memory.memory_words(
        step, {}, [batch(5, 7), batch(3, 6)], cpu, settings, backend="ddp", processes=processes
    )
    assert "a micro-batch of 5 texts of 7 tokens" in said
    assert hint.startswith("alive were nothing; the plan is ")
    assert asked[0] == (7, True, own, processes)
