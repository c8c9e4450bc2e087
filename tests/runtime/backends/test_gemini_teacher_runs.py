"""Runs whose teacher is in Gemini's chunks: stages, evaluation, checkpoints, fused logits."""

import json
import signal
import time

import numpy as np
import pytest
from forked import GEMINI
from ranks import HERE, started
from safetensors import safe_open
from small_folders import write, write_decoders

from gkd_dsl.meaning.check import check_path
from gkd_dsl.runtime.reopen import evaluate_run

pytestmark = pytest.mark.gemini
STEPS = 3
SPEC = f"""gkd 1
teacher t = hf("./t", num_labels = 3)
student s = truncated(t, layers = [0, 1])
data d = csv("rows.csv", text = "text", label = "label", held_out = 20%)
loss soft = kl(s.logits <- t.logits)
loss hidden = mse(s.hidden[1] |> W <- t.hidden[2])
loss att = attention_kl(s.layer[1].attn.scores <- t.layer[2].attn.scores)
project W = linear(s.H -> t.H)
metric agree = agreement(s.logits <- t.logits)
metric known = accuracy(t.logits, batch.labels)
stage first for {STEPS} steps {{
  batch_size = 4
  max_length = 12
  minimize 0.1 * hidden + att
  optim = adamw(lr = 1e-2, eps = 0.1)
}}
stage second for {STEPS} steps {{
  batch_size = 4
  accumulate = 2
  max_length = 12
  minimize soft
  optim = adamw(lr = 1e-2, eps = 0.1)
  evaluate agree, known every 2 steps
  checkpoint_every = 1 steps
}}
runtime {{
  backend = gemini
  precision = bf16
  min_chunk_size_m = 0.001
  search_range_m = 1
  PLACEMENT
}}
"""
LANGUAGE = f"""gkd 1
teacher t = hf("./t")
student s = hf("./s")
data d = csv("rows.csv", text = "text")
loss soft = kl(s.logits <- t.logits)
stage main for {STEPS} steps {{
  batch_size = 4
  max_length = 12
  minimize soft
  optim = adamw(lr = 1e-2, eps = 0.1)
}}
runtime {{
  backend = gemini
  precision = bf16
  fuse_logits = FUSE
  PLACEMENT
}}
"""
CHUNKS = "teacher t {\n    placement = gemini\n  }"


def gkd(count, folder, *words, **more):
    return started(count, HERE / "gemini_run.py", "run", *words, "--offline", cwd=folder, modules=GEMINI, **more)


def ran(count, folder, *words):
    assert [process.wait(300) for process in gkd(count, folder, *words)] == [0] * count


def lines(run, kind="step"):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def losses(run):
    return [line["loss"] for line in lines(run)]


def close(run, other):
    """The same losses to the rounding of bf16, in which the gradients are summed too."""
    assert len(losses(run)) > 0
    np.testing.assert_allclose(losses(run), losses(other), rtol=0.02, atol=0.005)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The spec with its teacher in chunks (`one` and `two`: its runs) and in memory (`resident`)."""
    folder = tmp_path_factory.mktemp("runs")
    write(folder)
    (folder / "a.gkd").write_text(SPEC.replace("PLACEMENT", CHUNKS))
    (folder / "live.gkd").write_text(SPEC.replace("PLACEMENT", ""))
    ran(1, folder, "a.gkd", "--out", "one")
    ran(2, folder, "a.gkd", "--out", "two")
    ran(1, folder, "live.gkd", "--out", "resident")
    return folder


def test_the_losses_and_metrics_of_a_teacher_in_memory(place):
    assert losses(place / "one") == losses(place / "resident")
    for run in ("one", "two"):
        assert len(lines(place / run, "evaluate")) == len(lines(place / "resident", "evaluate")) == 3
        for one, other in zip(lines(place / run, "evaluate"), lines(place / "resident", "evaluate"), strict=True):
            assert one["metrics"]["known"] == other["metrics"]["known"]


def test_two_processes_are_one_run(place):
    assert len(losses(place / "two")) == 2 * STEPS
    close(place / "two", place / "one")


def test_one_process_without_gemini_reads_the_run_back(place):
    """The teacher comes from host memory then; the student has its masters, in bf16 as in the run."""
    found = evaluate_run(check_path(place / "a.gkd"), place / "two")["second"]
    expected = lines(place / "two", "evaluate")[-1]["metrics"]
    assert found["known"] == expected["known"]
    # Of 8 rows one may be at the border.
    assert abs(found["agree"] - expected["agree"]) <= 1 / 8


def test_it_is_written_nowhere(place):
    files = list((place / "two").rglob("*.safetensors"))
    assert len(files) >= 2
    sizes = json.loads((place / "t" / "config.json").read_text())["num_hidden_layers"]
    for path in files:
        with safe_open(path, "pt") as held:
            assert not [name for name in held.keys() if name.startswith("t/") or f"layer.{sizes - 1}." in name]  # noqa: SIM118


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_stopped_in_the_second_stage_goes_on_in_another_number(place, before, after):
    run = place / f"stopped-{before}"
    processes = gkd(before, place, "a.gkd", "--out", run.name)
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(lines(run)) < STEPS + 1:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < until
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGINT)
    assert [process.wait(100) for process in processes] == [130] * before
    assert len(lines(run)) < 2 * STEPS
    ran(after, place, "a.gkd", "--out", run.name, "--resume")
    close(run, place / "one")


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    write_decoders(folder)
    for fuse in ("auto", "on", "off"):
        (folder / f"{fuse}.gkd").write_text(LANGUAGE.replace("PLACEMENT", CHUNKS).replace("FUSE", fuse))
    ran(1, folder, "off.gkd", "--out", "off")
    return folder


def test_logits_are_fused_with_the_head_of_the_student_alone(language):
    ran(2, language, "auto.gkd", "--out", "auto")
    close(language / "auto", language / "off")


def test_where_fusing_is_wanted_the_check_says_why_not(language):
    found = check_path(language / "on.gkd").diagnostics.errors
    assert [d.code for d in found] == ["E0433"]
    assert "the head of `t` is in Gemini's chunks" in found[0].message


def test_what_the_first_epoch_stores_serves_the_later_ones(place):
    """With `cache = auto` the chunks are run in the first epoch alone; what is read later is rounded as bf16 is."""
    longer = SPEC.replace(f"for {STEPS} steps", "for 12 steps")
    (place / "long.gkd").write_text(longer.replace("PLACEMENT", CHUNKS))
    (place / "auto.gkd").write_text(longer.replace("PLACEMENT", CHUNKS.replace("gemini", "gemini\n    cache = auto")))
    ran(1, place, "long.gkd", "--out", "long")
    ran(1, place, "auto.gkd", "--out", "auto")
    rows = len((place / "rows.csv").read_text().splitlines()) - 1
    assert rows < 12 * 4
    assert len(losses(place / "auto")) == 24
    close(place / "auto", place / "long")
    stored = list((place / "auto" / "teachers" / "t").rglob("manifest.json"))
    assert len(stored) == 2
