"""`precision = fp16` under Gemini: the losses of bf16, steps that are skipped, and the scale that a run goes on with."""

import json
import subprocess

import numpy as np
import pytest
import torch
from forked import GEMINI
from ranks import HERE, started
from safetensors.torch import load_file
from small_folders import write

from gkd_dsl.runtime.backends.base import Settings
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.checkpoint import read

pytestmark = pytest.mark.gemini
STEPS = 5
SPEC = f"""gkd 1
teacher t = hf("./t", num_labels = 3)
student s = hf("./s", num_labels = 3)
data d = csv("rows.csv", text = "text", label = "label")
loss soft = kl(s.logits <- t.logits)
stage main for {STEPS} steps {{
  batch_size = 4
  accumulate = 2
  max_length = 12
  minimize soft
  optim = adamw(lr = 1e-2, eps = 0.01, clip = 0.2)
  checkpoint_every = 2 steps
}}
runtime {{
  backend = gemini
  min_chunk_size_m = 0.001
  search_range_m = 1
  SETTINGS
}}
"""
# By 2^32 every gradient is beyond fp16.
LARGEST = "precision = fp16\n  initial_scale = 4294967296.0\n  hysteresis = 1"
SPECS = {
    "bf16": "precision = bf16",
    "fp16": "precision = fp16",
    "chunks": "precision = fp16\n  teacher t {\n    placement = gemini\n  }",
    "grows": "precision = fp16\n  growth_interval = 1\n  initial_scale = 1024.0",
    "falls": f"{LARGEST}\n  backoff_factor = 0.0009765625",
    "never": f"{LARGEST}\n  backoff_factor = 0.5",
    "least": f"{LARGEST}\n  min_scale = 4294967296.0",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The specs, and the run of each in one process."""
    folder = tmp_path_factory.mktemp("fp16")
    write(folder)
    for name, settings in SPECS.items():
        (folder / f"{name}.gkd").write_text(SPEC.replace("SETTINGS", settings))
    for name in SPECS:
        if name != "least":
            ran(1, folder, name)
    return folder


def gkd(count, folder, name, *words, out=None, script=("gemini_run.py",), **more):
    words = (*script[1:], "run", f"{name}.gkd", "--offline", "--out", out or name, *words)
    return started(count, HERE / script[0], *words, cwd=folder, modules=GEMINI, **more)


def ran(count, folder, name, *words, out=None):
    assert [process.wait(300) for process in gkd(count, folder, name, *words, out=out)] == [0] * count


def steps(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def column(run, name="loss"):
    return [line[name] for line in steps(run)]


@pytest.mark.parametrize("name", ["fp16", "grows"])
def test_the_losses_and_norms_of_bf16(place, name):
    np.testing.assert_allclose(column(place / name), column(place / "bf16"), rtol=0.03, atol=0.002)
    norms = (column(place / run, "gradient_norm") for run in (name, "bf16"))
    np.testing.assert_allclose(*norms, rtol=0.1, atol=0.02)
    assert not any("skipped" in line for line in steps(place / name))


def test_a_scale_that_grows_changes_nothing(place):
    """Gradients are divided by the scale that they were made with."""
    np.testing.assert_allclose(column(place / "grows"), column(place / "fp16"), rtol=2e-3, atol=1e-5)
    state = read(place / "grows" / "checkpoints" / f"main-{STEPS}").optimizer
    assert float(state["scaler/scale"]) == 1024.0 * 2**STEPS
    other = read(place / "fp16" / "checkpoints" / f"main-{STEPS}").optimizer
    for what in ("exp_avg", "exp_avg_sq"):
        found, expected = (
            torch.cat([value.flatten() for key, value in sorted(held.items()) if key.startswith(f"{what}/")])
            for held in (state, other)
        )
        assert (found - expected).norm() <= 0.02 * expected.norm()


def test_a_teacher_in_chunks(place):
    assert column(place / "chunks") == column(place / "fp16")


def test_a_step_beyond_fp16_is_skipped_and_said(place):
    *skipped, first, _, _ = steps(place / "falls")
    assert all(line["skipped"] is True and line["gradient_norm"] is None for line in skipped)
    assert not any("skipped" in line for line in steps(place / "falls")[2:])
    # The weights of the third step are those of the first one, and its gradient is its own alone.
    assert first["loss"] == steps(place / "never")[2]["loss"]
    assert 0 < first["gradient_norm"] < 4 * steps(place / "fp16")[2]["gradient_norm"]


def test_nothing_is_updated_where_all_are_skipped(place):
    assert all(line["skipped"] for line in steps(place / "never"))
    found = load_file(place / "never" / "export" / "model.safetensors")
    start = load_file(place / "s" / "model.safetensors")
    assert found.keys() == start.keys()
    assert all(torch.equal(found[name], value) for name, value in start.items())


def test_at_the_least_scale_the_run_ends(place):
    (process,) = gkd(1, place, "least", stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "E0802" in said
    assert "beyond fp16 at the least loss scale" in said
    assert "precision = bf16" in said


def test_one_process_reads_such_a_run_back_in_fp16():
    with LocalBackend(Settings(precision="fp16", device="cpu")).taps_context():
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float16


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_the_scale_goes_on_in_another_number_of_processes(place, before, after):
    """Killed in the fourth step; the first two were skipped."""
    out = f"falls-{before}"
    processes = gkd(before, place, "falls", out=out, script=("gemini_killed.py", "0", "4"))
    assert all(process.wait(200) != 0 for process in processes)
    kept = read(place / out / "checkpoints" / "main-2").optimizer
    assert float(kept["scaler/scale"]) == 2**12
    assert int(kept["scaler/hysteresis_step"]) == 2
    ran(after, place, "falls", "--resume", out=out)
    np.testing.assert_allclose(column(place / out), column(place / "falls"), rtol=0.02, atol=2e-3)
