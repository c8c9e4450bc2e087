"""Checkpoints: bit for bit, whole or not at all."""

import errno
import json
import os
import random
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from plans import Data, info, models, spec, stage_plan
from torch import nn
from transformers import BertForMaskedLM

from gkd_dsl.runtime import checkpoint, rng
from gkd_dsl.runtime.checkpoint import Checkpoints, Position, State
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.fingerprint import fingerprint
from gkd_dsl.runtime.models.load import config_of
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run
from gkd_dsl.schedules import Span


def state(step=3, seed=0, **position):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a.weight": torch.randn(3, 5, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "whole": torch.arange(6).reshape(2, 3),
        "one": torch.tensor(2.5),
        "turned": torch.randn(4, 3, generator=generator).T,
        "none": torch.zeros(0, 3),
    }
    return State(
        Position("main", 0, step, **position),
        {"s": tensors, "train": {"w": torch.ones(2)}},
        {"tb/W.0/weight": torch.eye(2)},
        {"exp_avg/s/a.weight": torch.full((3, 5), 1e-40)},
        rng.get_state(),
        {"stage `main`: seed": "0"},
    )


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_comes_back_bit_for_bit(tmp_path):
    saved = state(best=0.5, best_step=2, tokens=77)
    path = Checkpoints(tmp_path).save(saved)
    read = checkpoint.read(path)
    assert path.name == "main-3"
    assert read.position == saved.position
    assert read.spec == saved.spec
    assert read.models.keys() == saved.models.keys()
    for ours, theirs in (
        (saved.models["s"], read.models["s"]),
        (saved.projections, read.projections),
        (saved.optimizer, read.optimizer),
    ):
        assert ours.keys() == theirs.keys()
        assert all(same(ours[name], theirs[name]) for name in ours)
    assert json.loads(json.dumps(saved.rng)) == read.rng
    versions = json.loads((path / "state.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__


def test_every_generator_comes_back():
    rng.seed_all(11)
    random.gauss(0, 1)
    np.random.standard_normal()
    kept = json.loads(json.dumps(rng.get_state()))

    def draw():
        return random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()

    first = draw()
    draw()
    rng.set_state(kept)
    assert draw() == first


def test_tied_weights_are_kept_once_and_stay_tied():
    config = config_of(info("s"))
    config.tie_word_embeddings = True
    model, other = BertForMaskedLM(config), BertForMaskedLM(config)
    kept = {name: value.clone() for name, value in checkpoint.module_tensors(model).items()}
    assert sum(value.shape == (37, 16) for value in kept.values()) == 1
    checkpoint.load_module(other, kept, "model `s`")
    decoder = other.cls.predictions.decoder.weight
    assert decoder is other.bert.embeddings.word_embeddings.weight
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(RunError, match="does not fit model `s`: `weight` differs"):
        checkpoint.load_module(nn.Linear(2, 3), {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, "model `s`")
    with pytest.raises(RunError, match="`bias` differs"):
        checkpoint.load_module(nn.Linear(2, 3), {"weight": torch.zeros(3, 2)}, "model `s`")


def test_the_newest_two_and_the_best_stay(tmp_path):
    store = Checkpoints(tmp_path)
    for step in range(1, 7):
        store.save(state(step), best=step == 2)
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == ["main-2", "main-5", "main-6"]
    assert store.pointed("best").name == "main-2"
    assert store.pointed("last").name == "main-6"


def test_a_checkpoint_left_by_a_killed_run_is_replaced(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(state(1, seed=1))
    left = store.save(state(2, seed=2))
    (tmp_path / "last").write_text("checkpoints/main-1\n")
    store.save(state(2, seed=3))
    expected = state(2, seed=3).models["s"]
    assert same(checkpoint.read(left).models["s"]["a.weight"], expected["a.weight"])
    assert sorted(path.name for path in store.folder.iterdir()) == ["main-1", "main-2"]


def test_what_killed_runs_left_half_written_goes(tmp_path):
    store = Checkpoints(tmp_path)
    for name in (".main-2.7", ".old.main-1.7"):
        left = store.folder / name
        left.mkdir(parents=True)
        (left / "state.json").write_text("{}")
        (left / "model.s.safetensors").write_bytes(b"half")
    store.save(state(3))
    assert [path.name for path in store.folder.iterdir()] == ["main-3"]


def test_a_run_that_ends_between_the_two_pointers_keeps_its_best(tmp_path, monkeypatch):
    """The weights that a resumed run would end with are those of the step that its state calls the best, or better."""
    store = Checkpoints(tmp_path)
    store.save(state(1, best=0.5, best_step=1), best=True)
    point, written = Checkpoints._point, []

    def dies(self, name, target):
        if written:
            raise KeyboardInterrupt
        written.append(name)
        point(self, name, target)

    monkeypatch.setattr(Checkpoints, "_point", dies)
    with pytest.raises(KeyboardInterrupt):
        store.save(state(2, best=0.9, best_step=2), best=True)
    last, best = (checkpoint.read(store.pointed(name)).position for name in ("last", "best"))
    assert last.best_step <= best.step


@contextmanager
def files_no_longer_than(size):
    """The system itself refuses to let a file grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [0, 20, 200, 700])
def test_a_write_that_the_system_refuses_leaves_the_last_one_whole(tmp_path, size):
    store = Checkpoints(tmp_path)
    store.save(state(1, seed=1), best=True)
    with files_no_longer_than(size), pytest.raises(RunError) as raised:
        store.save(state(2, seed=2), best=True)
    assert raised.value.code == "E0804"
    assert "a checkpoint cannot be written" in raised.value.message
    assert "the checkpoint main-1 is whole" in raised.value.hint
    for name in ("last", "best"):
        read = checkpoint.read(store.pointed(name))
        assert read.position.step == 1
        assert same(read.models["s"]["a.weight"], state(1, seed=1).models["s"]["a.weight"])
    assert [path.name for path in store.folder.iterdir()] == ["main-1"]
    store.save(state(2, seed=2))
    assert store.pointed("last").name == "main-2"


def test_a_checkpoint_that_cannot_take_its_name_leaves_the_last_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(step=2))
    original = os.replace

    def refuse(source, target):
        if Path(target).name == "main-4":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        original(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunError, match="read-only"):
        checkpoints.save(state(step=4))
    assert checkpoint.read(checkpoints.pointed("last")).position.step == 2


def test_a_run_goes_on_after_the_disk_was_full(tmp_path):
    """The checkpoint of step 4 cannot be written; resumed, the run is the one that never failed."""

    def run(folder, resume=False):
        plan = stage_plan(duration=Span(6, "steps"), checkpoint_every=Span(2, "steps"))
        return Run(spec(plan), folder=folder, loaders=lambda _: Data(), models=models()).run(resume=resume)

    whole = run(RunFolder.create("whole", root=tmp_path))
    folder = RunFolder.create("full", root=tmp_path)
    real = Checkpoints.save

    def failing(self, given, *, best=False):
        if given.position.step < 4:
            return real(self, given, best=best)
        with files_no_longer_than(20_000):
            return real(self, given, best=best)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", failing)
        with pytest.raises(RunError, match="the checkpoint main-2 is whole"):
            run(folder)
    again = run(RunFolder.open(folder.path), resume=True)
    for name, value in whole.models["s"].state_dict().items():
        assert torch.equal(value, again.models["s"].state_dict()[name])


@pytest.mark.parametrize("name", ["state.json", "spec.json", "model.s.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("cut", [None, 10])
def test_a_damaged_checkpoint_is_an_error_in_words(tmp_path, name, cut):
    path = Checkpoints(tmp_path).save(state())
    if cut is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:cut])
    with pytest.raises(RunError, match=r"E0805: the checkpoint .* cannot be read"):
        checkpoint.read(path)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    path = Checkpoints(tmp_path).save(state())
    data = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(RunError, match="has format 99, and this version reads 1"):
        checkpoint.read(path)


def test_a_pointer_to_nothing_is_no_checkpoint(tmp_path):
    (tmp_path / "last").write_text("checkpoints/gone-1\n")
    assert Checkpoints(tmp_path).pointed("last") is None
    (tmp_path / "last").write_text("")
    assert Checkpoints(tmp_path).pointed("last") is None
    (tmp_path / "last").write_bytes(b"\xff\x00")
    assert Checkpoints(tmp_path).pointed("last") is None


def test_equal_plans_have_equal_fingerprints_wherever_the_files_lie():
    plan = spec(stage_plan())
    found = fingerprint(plan)
    assert found == fingerprint(spec(stage_plan()))
    assert found["stage `main`: optim.lr"] == "0.001"
    assert found["stage `main`: weight of `hid`"] == "ramp(0 -> 1, until = 50%)"
    assert found["stage `main`: duration"] == "10 steps"
    assert not any(str(info("s").path) in value for value in found.values())


@pytest.mark.parametrize("text", [None, "", "checkpoints/gone\n", "../..\n"])
def test_where_last_names_none_it_is_the_one_furthest_in_the_run(tmp_path, text):
    """As after a kill before it was written, or in a copy without it: nothing begins anew over what is there."""
    store = Checkpoints(tmp_path)
    assert store.pointed("last") is None
    store.save(state(9), best=True)
    store.save(state(10))
    # The time of a copy says nothing.
    os.utime(store.folder / "main-9", (2**31, 2**31))
    (store.folder / ".main-11.1").mkdir()
    (store.folder / ".main-11.1" / "state.json").write_text((store.folder / "main-10" / "state.json").read_text())
    (store.folder / "main-12").mkdir()
    (store.folder / "main-12" / "state.json").write_text("{")
    for name in ("last", "best"):
        (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    assert store.pointed("last").name == "main-10"
    assert store.pointed("best") is None


def test_a_damaged_checkpoint_names_another(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(state(1))
    path = store.save(state(2))
    (path / "model.s.safetensors").write_bytes(b"")
    with pytest.raises(RunError) as raised:
        checkpoint.read(path)
    assert raised.value.hint == "to go on from main-1, write checkpoints/main-1 into the file `last`"
    (tmp_path / "last").write_text("checkpoints/main-1\n")
    assert checkpoint.read(store.pointed("last")).position.step == 1
    for wrong in ("[1]", "3", '"abc"'):
        (store.folder / "main-1" / "spec.json").write_text(wrong)
        with pytest.raises(RunError, match="cannot be read"):
            checkpoint.read(store.folder / "main-1")
