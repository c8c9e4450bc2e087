"""Gemini, its real chunks and optimiser on the host: the losses of the local backend, checkpoints, exports.

`make gemini` installs ColossalAI; `make test` runs these after it.
"""

import json
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from forked import GEMINI
from ranks import CASES, HERE, losses, started, takes_gradients
from safetensors.torch import load_file

from gkd_dsl.runtime.checkpoint import read

pytestmark = pytest.mark.gemini
BF16 = (("precision", "bf16"),)
IN_TWO = (
    "kd", "minilm", "mgskd", "rl_kd", "tinybert", "dgkd", "diito", "pd_pretrain", "alp_kd_buckets", "annealing_kd", "ckd",
    "distilbert", "mobilebert", "rail_kd", "sid", "takd", "theseus", "universal_kd",
)  # fmt: skip
STEPS = 6
SPEC = f"""gkd 1
teacher t = hf("./t", num_labels = 3)
student s = hf("./s", num_labels = 3)
data d = csv("rows.csv", text = "text", label = "label", held_out = 20%%)
loss soft = kl(s.logits <- t.logits)
loss hidden = mse(s.hidden[1] |> W <- t.hidden[2])
project W = linear(s.H -> t.H)
metric acc = accuracy(s.logits, batch.labels)
stage main for {STEPS} steps {{
  batch_size = 4
  accumulate = 2
  max_length = 12
  minimize soft + 0.1 * hidden
  optim = adamw(lr = 1e-2, eps = 0.1, clip = 0.05, weight_decay = 2.0)
  evaluate acc every 2 steps
  keep best by acc
  checkpoint_every = 2 steps
}}
runtime {{
  backend = %s
  precision = bf16
  %s
}}
"""


def ran(count, script, *words, **more):
    processes = started(count, script, *words, modules=GEMINI, **more)
    assert [process.wait(300) for process in processes] == [0] * count


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The losses of every method in one process and of some in two, on each rank."""
    out = tmp_path_factory.mktemp("gemini")
    ran(1, HERE / "ranks.py", out / "one", 4, "gemini", *CASES)
    ran(2, HERE / "ranks.py", out / "two", 4, "gemini", *IN_TWO)
    return {name: json.loads((out / name).read_text()) for name in ("one.0", "two.0", "two.1")}


def close(found, expected):
    """The same losses to the rounding of bf16: 2^-8 in each forward, at most a few of them after three steps."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=0.03)
        np.testing.assert_allclose(one[1], other[1], rtol=0.15)


@pytest.mark.parametrize("name", CASES)
def test_the_losses_of_the_local_backend(found, name):
    """All methods but those with a gradient inside a step, which the check refuses."""
    if takes_gradients(name):
        assert [code for code, _ in found["one.0"][name]["refused"]] == ["E0421"]
        return
    close(found["one.0"][name], losses(name, 4, runtime=BF16, micro=1 + len(name) % 2))


@pytest.mark.parametrize("name", IN_TWO)
def test_two_processes(found, name):
    assert found["two.0"][name] == found["two.1"][name]
    close(found["two.0"][name], losses(name, 4, runtime=BF16, micro=1 + len(name) % 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two small models, rows, the spec for three backends, and `whole`: its run by Gemini in one process."""
    from small_folders import write

    folder = tmp_path_factory.mktemp("spec")
    write(folder)
    (folder / "a.gkd").write_text(SPEC % ("gemini", "min_chunk_size_m = 0.001\n  search_range_m = 1"))
    (folder / "local.gkd").write_text(SPEC % ("local", ""))
    (folder / "kept.gkd").write_text(SPEC % ("gemini", "shard_param_frac = 0.0\n  offload_optim_frac = 0.5"))
    ran(1, HERE / "gemini_run.py", "run", "a.gkd", "--offline", "--out", "whole", cwd=folder)
    return folder


def steps(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def same(run, whole, rtol=0.01):
    for one, other in zip(steps(run), steps(whole), strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=rtol)
        np.testing.assert_allclose(one["gradient_norm"], other["gradient_norm"], rtol=10 * rtol)
    tensors, wanted = (load_file(folder / "export" / "model.safetensors") for folder in (run, whole))
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensors[name].dtype == torch.float32
        np.testing.assert_allclose(tensors[name], tensor, rtol=0.02, atol=3e-3)


def optimiser(run):
    """The optimiser's tensors in the last checkpoint, by what they are; all parameters in one."""
    found = {}
    for key, value in sorted(read(run / "checkpoints" / f"main-{STEPS}").optimizer.items()):
        found.setdefault(key.partition("/")[0], []).append(value.float().reshape(-1))
    return {what: torch.cat(values) for what, values in found.items()}


def same_updates(run, whole):
    """Steps, moments and what weights moved by are those of all steps, and not of those since the run went on."""
    found, expected = optimiser(run), optimiser(whole)
    assert found.keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(found["step"], torch.full_like(expected["step"], STEPS))
    for what, value in expected.items():
        assert (found[what] - value).norm() <= 0.1 * value.norm(), what
    # Matrices move by decay above all, vectors by their gradient alone.
    start = load_file(whole.parent / "s" / "model.safetensors")
    mine, theirs = (read(place / "checkpoints" / f"main-{STEPS}").models["s"] for place in (run, whole))
    for axes in (1, 2):
        names = [name for name, value in start.items() if value.ndim == axes]
        moved, wanted = (torch.cat([(held[n] - start[n]).flatten() for n in names]) for held in (mine, theirs))
        assert (moved - wanted).norm() <= 0.1 * wanted.norm(), axes


def test_the_run_and_the_export_are_those_of_the_local_backend(place):
    ran(1, HERE / "gemini_run.py", "run", "local.gkd", "--offline", "--out", "local", cwd=place)
    same(place / "whole", place / "local", rtol=0.03)
    names = [{path.name for path in (place / run / "export").iterdir()} for run in ("whole", "local")]
    assert names[0] == names[1]
    gemini, local = (read(place / run / "checkpoints" / f"main-{STEPS}") for run in ("whole", "local"))
    assert gemini.optimizer.keys() == local.optimizer.keys()
    assert all(gemini.optimizer[key].shape == value.shape for key, value in local.optimizer.items())
    same_updates(place / "whole", place / "local")
    # Biases and the scales of norms do not decay.
    assert gemini.models["s"]["bert.encoder.layer.0.output.LayerNorm.weight"].mean() > 0.99
    # Masters are saved, not what bf16 leaves of them.
    weights = gemini.models["s"].values()
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights if value.is_floating_point())


def test_the_best_weights_are_put_back_into_chunks(place):
    ran(1, HERE / "gemini_best.py", "run", "a.gkd", "--offline", "--out", "best", cwd=place)
    first, last = (read(place / "best" / "checkpoints" / f"main-{step}").models["s"] for step in (2, 4))
    found = load_file(place / "best" / "export" / "model.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in found.items())
    assert any(not torch.equal(value, last[name]) for name, value in found.items())


@pytest.mark.parametrize(("spec", "before", "after"), [("a", 2, 1), ("kept", 2, 1), ("a", 1, 2)])
def test_stopped_it_goes_on_in_another_number(place, spec, before, after):
    run = place / f"stopped-{spec}-{before}"
    processes = started(
        before, HERE / "gemini_run.py", "run", f"{spec}.gkd", "--offline", "--out", run.name, cwd=place, modules=GEMINI
    )
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(steps(run)) < 3:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < until
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGINT)
    assert [process.wait(100) for process in processes] == [130] * before
    assert len(steps(run)) < STEPS
    ran(after, HERE / "gemini_run.py", "run", f"{spec}.gkd", "--offline", "--out", run.name, "--resume", cwd=place)
    same(run, place / "whole")
    same_updates(run, place / "whole")


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_in_the_middle_of_a_step(place, killed):
    """The other process ends at once and says so; the last checkpoint is whole, and the run goes on from it."""
    run = place / f"killed-{killed}"
    words = ("run", "a.gkd", "--offline", "--out", run.name)
    more = {"cwd": place, "stderr": subprocess.PIPE, "modules": GEMINI}
    processes = started(2, HERE / "gemini_killed.py", str(killed), "4", *words, **more)
    processes[killed].communicate(timeout=120)
    assert processes[killed].returncode == -signal.SIGKILL
    began = time.monotonic()
    _, said = processes[1 - killed].communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert processes[1 - killed].returncode == 1
    assert "another process of this run has ended, or cannot be reached" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert len(steps(run)) == 4 - 1
    assert read(run / "checkpoints" / "main-2").position.step == 2
    ran(2, HERE / "gemini_run.py", *words, "--resume", cwd=place)
    same(run, place / "whole")
    same_updates(run, place / "whole")
