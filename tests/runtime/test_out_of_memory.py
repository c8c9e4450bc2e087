"""Memory that runs out anywhere in a run: what was done, what was alive, the plan, and the change to try."""

import sys
from functools import wraps
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

sys.path.append(str(Path(__file__).parent / "teachers"))

from stored_world import CACHED, CLASSIFY, cache, classifiers, placed, run, spec

from gkd_dsl.meaning.check import check_path
from gkd_dsl.runtime import checkpoint, memory, session
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.reopen import evaluate_run, export_run
from gkd_dsl.runtime.session import run_spec
from gkd_dsl.runtime.teachers.streamed import StreamedTeachers

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def full(*args, **more):
    raise FULL


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GKD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return classifiers(tmp_path_factory.mktemp("world"))


def of(folder, placement="", name="spec.gkd"):
    return spec(folder, CLASSIFY, placement, name, OBJECTIVE="soft + hid")


def told(call, doing, *alive):
    """The error of a call: its code, what it says was done, what was alive, the plan, a change."""
    with pytest.raises(RunError) as raised:
        call()
    error = raised.value
    assert error.code == "E0803"
    assert error.message == f"this machine has too little memory {doing}"
    assert "alive were " in error.hint
    for part in alive:
        assert f"{part} " in error.hint.partition("; the plan is ")[0], error.hint
    assert "; the plan is " in error.hint
    assert "lower `batch_size` to 2 and double `accumulate`" in error.hint or "this fits: " in error.hint
    assert error.__cause__ is FULL
    return error


def test_reading_weights(folder, monkeypatch):
    monkeypatch.setattr(BertForSequenceClassification, "from_pretrained", full)
    told(lambda: run(of(folder)), "to load `t`")


def test_bringing_weights_to_the_device(folder, monkeypatch):
    monkeypatch.setattr(LocalBackend, "place", full)
    told(lambda: run(of(folder)), "to bring `s` to its device")


def test_pinning_weights_that_are_streamed(folder, monkeypatch):
    monkeypatch.setattr(StreamedTeachers, "_settle", full)
    call = lambda: run(of(folder, placed("placement = offload")))  # noqa: E731
    told(call, "to load the models of stage `main`", "t")


def test_making_the_optimiser(folder, monkeypatch):
    monkeypatch.setattr(LocalBackend, "_make_optimizer", full)
    told(lambda: run(of(folder)), "to begin stage `main`", "t", "s")


@pytest.mark.parametrize("name", ["t", "s"])
def test_a_forward(name, folder, monkeypatch):
    inner = BertForSequenceClassification.forward

    @wraps(inner)
    def forward(self, *args, **more):
        if self.config.hidden_size == {"t": 24, "s": 16}[name] and stepping:
            raise FULL
        return inner(self, *args, **more)

    stepping = []
    step = LocalBackend.step
    monkeypatch.setattr(LocalBackend, "step", lambda *args: stepping.append(1) or step(*args))
    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    with pytest.raises(RunError) as raised:
        run(of(folder))
    assert "too little memory for a micro-batch of 4 texts of " in raised.value.message
    assert "alive were weights " in raised.value.hint
    assert "; the plan is " in raised.value.hint


def test_a_backward(folder, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", full)
    with pytest.raises(RunError, match=r"too little memory for a micro-batch of 4 texts of .*; the plan is "):
        run(of(folder))


def test_a_step_of_the_optimiser(folder, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(RunError, match=r"alive were weights .*, gradients \d.*, optimiser 0; the plan is "):
        run(of(folder))


def test_an_evaluation(folder, monkeypatch):
    monkeypatch.setattr(LocalBackend, "infer", full)
    told(lambda: run(of(folder)), "to evaluate in stage `main`", "t", "s", "gradients", "optimiser")


def test_saving(folder, monkeypatch, tmp_path):
    from gkd_dsl.runtime.run_folder import RunFolder

    monkeypatch.setattr(checkpoint.Checkpoints, "save", full)
    call = lambda: run(of(folder), RunFolder.create("x", out=tmp_path / "run"))  # noqa: E731
    told(call, "to save the state of stage `main`", "t", "s", "optimiser")


def test_storing_outputs(folder, monkeypatch):
    monkeypatch.setattr(BertForSequenceClassification, "forward", full)
    error = told(lambda: cache(of(folder, CACHED)), "to run `t`", "t")
    assert error.hint.startswith("lower `batch_size`, then go on with `--resume`; alive were ")


@pytest.mark.parametrize(
    ("what", "doing", "first"),
    [
        ("expanded", "to export `s`", "the run is done and saved: `gkd export` writes the model; alive were "),
        ("compare", "to time `t` beside `s`", "the run is done, and its student exported; alive were "),
    ],
)
def test_after_a_run(what, doing, first, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(session, what, full)
    checked = check_path(of(folder))
    error = told(lambda: run_spec(checked, name="x", out=tmp_path / "run"), doing, "t", "s")
    assert error.hint.startswith(first)


def test_a_run_that_is_opened_again(folder, monkeypatch, tmp_path):
    checked = check_path(of(folder))
    run_spec(checked, name="x", out=tmp_path / "run", measure=False)
    monkeypatch.setattr(LocalBackend, "infer", full)
    told(lambda: evaluate_run(checked, tmp_path / "run"), "to evaluate stage `main`", "t", "s")
    monkeypatch.setattr(session, "expanded", full)
    told(lambda: export_run(checked, tmp_path / "run", "last", tmp_path / "out", None), "to export `s`", "s")


def test_what_was_alive_and_planned_is_right(folder, monkeypatch):
    monkeypatch.setattr(LocalBackend, "infer", full)
    error = told(lambda: run(of(folder)), "to evaluate in stage `main`", "t", "s")
    teacher = BertForSequenceClassification.from_pretrained(folder / "t")
    assert f"t {memory.in_bytes(sum(p.nbytes for p in teacher.parameters()))}" in error.hint


def test_a_machine_that_is_too_small_gets_the_change(folder, monkeypatch):
    from gkd_dsl.planning.machine import Machine

    monkeypatch.setattr(memory, "this_machine", lambda: Machine(1, 260_000, 260_000, kind="cpu"))
    monkeypatch.setattr(LocalBackend, "infer", full)
    error = told(lambda: run(of(folder)), "to evaluate in stage `main`", "t", "s")
    assert "; this fits: " in error.hint
    assert "runtime {" in error.hint


def test_an_error_of_something_else_stays(folder, monkeypatch):
    def broken(*args, **more):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(LocalBackend, "infer", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(of(folder))
