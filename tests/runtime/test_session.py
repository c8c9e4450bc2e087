"""A run from a checked spec: what is exported, how, what is measured beside it, and which run is gone on with."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "backends"))

from small_folders import write, write_decoders

from gkd_dsl.cli.main import application
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_path, check_text
from gkd_dsl.runtime import session
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.evaluate import Evaluator
from gkd_dsl.runtime.reopen import evaluate_run, export_run
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.session import newest, run_spec, students

SPEC = """gkd 1
teacher t = hf("./t")
student s = hf("./s")
data d = csv("rows.csv", text = "text", label = "label", held_out = 20%)
loss soft = LOSS
metric acc = accuracy(s.logits, batch.labels)
metric far = kl(s.logits <- t.logits)
stage main for 4 steps {
  batch_size = 6
  max_length = 12
  minimize soft
  optim = adamw(lr = 1e-2)
  evaluate acc, far every 2 steps
  keep best by far
}
runtime { device = cpu }
"""
KL = "kl(s.logits <- t.logits)"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    write(folder)
    return folder


def checked(root, text=SPEC, loss=KL):
    found = check_text(text.replace("LOSS", loss), root=root)
    assert found.diagnostics.ok, found.diagnostics
    return found


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """A whole run with its comparison."""
    folder = tmp_path_factory.mktemp("done") / "run"
    return run_spec(checked(world), name="a", out=folder, params={"T": "2"})


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_is_reported_is_what_was_logged(done):
    evaluated = [line for line in logged(done.folder) if line["kind"] == "evaluate"]
    assert done.before == {"main": evaluated[0]["metrics"]}
    best = min(evaluated[1:], key=lambda line: line["metrics"]["far"])
    assert done.metrics == {"main": best["metrics"]}
    card = json.loads((done.exports["s"] / "gkd_export.json").read_text())["card"]
    assert card["metrics"] == {
        name: {"before": done.before["main"][name], "after": best["metrics"][name]} for name in ("acc", "far")
    }
    assert card["teachers"] == ["./t"]
    assert card["student"] == "./s"
    assert card["data"] == ["csv"]
    assert json.loads((done.folder / "run.json").read_text())["params"] == {"T": "2"}


def test_teacher_and_student_are_measured(done, world):
    found = json.loads((done.folder / "comparison.json").read_text())
    assert found == done.comparison.to_json()
    assert [model["name"] for model in found["models"]] == ["t", "s"]
    assert found["sentences"] == 8
    assert [model["size_bytes"] for model in found["models"]] == [
        (folder / "model.safetensors").stat().st_size for folder in (world / "t", done.exports["s"])
    ]
    assert found["metrics"]["acc"] == {
        "before": done.before["main"]["acc"],
        "after": done.metrics["main"]["acc"],
    }


def test_the_classes_keep_their_names(done):
    config = json.loads((done.exports["s"] / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_checkpoint_is_evaluated_and_exported_as_it_is(done, world, tmp_path, name):
    step = int((done.folder / name).read_text().rpartition("-")[2])
    assert step > 0
    saved = load_file(done.folder / "checkpoints" / f"main-{step}" / "model.s.safetensors")
    folder, model = export_run(checked(world), done.folder, name, tmp_path / "out", None)
    assert model == "s"
    assert all(torch.equal(value, saved[key]) for key, value in load_file(folder / "model.safetensors").items())
    found = evaluate_run(checked(world), done.folder, name)["main"]
    assert found == pytest.approx(done.metrics["main"])
    teacher, model = export_run(checked(world), done.folder, name, tmp_path / "teacher", "t")
    assert model == "t"
    wanted = load_file(world / "t" / "model.safetensors")
    assert all(torch.equal(value, wanted[key]) for key, value in load_file(teacher / "model.safetensors").items())


def test_a_checkpoint_before_the_last_step_has_its_own_weights(world, tmp_path):
    """Without `keep best`, `best` is not there; a run of another name for it is refused."""
    text = SPEC.replace("  keep best by far\n", "")
    run_spec(checked(world, text), name="a", out=tmp_path / "run", measure=False)
    with pytest.raises(RunError, match="holds no checkpoint `best`"):
        evaluate_run(checked(world, text), tmp_path / "run", "best")
    with pytest.raises(RunError, match="there is no checkpoint `first`; it is `last` or `best`"):
        evaluate_run(checked(world, text), tmp_path / "run", "first")


def test_a_checkpoint_is_evaluated_at_the_end_of_its_stage(done, world, tmp_path, monkeypatch):
    """With the counters that it has: schedules in metrics are those of the last step."""
    folder = tmp_path / "run"
    shutil.copytree(done.folder, folder)
    state = folder / (folder / "last").read_text().strip() / "state.json"
    data = json.loads(state.read_text())
    data["position"]["counters"] = {"k": 3}
    state.write_text(json.dumps(data))
    clocks = []
    monkeypatch.setattr(Evaluator, "__call__", lambda self, names, batches, backend, clock: clocks.append(clock) or {})
    evaluate_run(checked(world), folder, "last")
    (clock,) = clocks
    assert (clock.step, clock.total_steps, clock.counters) == (4, 4, (("k", 3),))


POOLED = """gkd 1
teacher t = hf("./t")
student s = hf("./s")
data d = csv("rows.csv", text = "text", held_out = 20%)
project W = linear(s.H -> t.H)
loss soft = LOSS
stage main for 1 step {
  batch_size = 6
  max_length = 12
  minimize soft
}
"""


@pytest.mark.parametrize(
    ("decoder", "loss", "pooling"),
    [
        (False, "mse(pool(s.final) |> W <- pool(t.final))", "mean"),
        (False, "mse(pool(s.hidden[2]) |> W <- pool(t.hidden[3]))", "mean"),
        (False, "mse(cls(s.final) |> W <- cls(t.final))", "cls"),
        (False, "mse(cls(s.final, last = true) |> W <- cls(t.final, last = true))", "last"),
        # sentence-transformers pools what the model gives last, and nothing before it.
        (False, "mse(pool(s.hidden[1]) |> W <- pool(t.hidden[1]))", None),
        (False, "mse(s.final |> W <- t.final)", None),
        (True, "mse(pool(s.final) |> W <- pool(t.final))", "mean"),
        (True, "mse(cls(s.final) |> W <- cls(t.final))", "last"),
        # The last residual stream, before the norm that a decoder ends with.
        (True, "mse(pool(s.hidden[2]) |> W <- pool(t.hidden[3]))", None),
    ],
)
def test_how_texts_become_vectors_is_read_from_the_objective(tmp_path, decoder, loss, pooling):
    (write_decoders if decoder else write)(tmp_path)
    plan = compile_plan(checked(tmp_path, POOLED, loss).graph)
    assert session._pooling(plan.stages[0], "s") == pooling
    assert session._pooling(plan.stages[0], "t") in (pooling, None)


def test_the_export_of_a_sentence_encoder(world, tmp_path):
    outcome = run_spec(
        checked(world, POOLED, "mse(pool(s.final) |> W <- pool(t.final))"), name="a", out=tmp_path / "x", measure=False
    )
    folder = outcome.exports["s"]
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 12


def test_students_are_exported_and_teachers_that_are_trained_are_not(world):
    text = SPEC.replace(
        "stage main", "loss own = cross_entropy(t.logits, batch.labels)\n"
        "stage first for 1 step {\n  train t\n  batch_size = 6\n  minimize own\n}\nstage main",
    )  # fmt: skip
    assert students(compile_plan(checked(world, text).graph)) == ["s"]
    # The student of an earlier stage, where the last one trains its teacher.
    alone = text.index("stage first")
    end = text.index("stage main")
    runtime = text.index("runtime {")
    turned = text[:alone] + text[end:runtime] + text[alone:end] + text[runtime:]
    plan = compile_plan(checked(world, turned).graph)
    assert [stage.name for stage in plan.stages] == ["main", "first"]
    assert students(plan) == ["s"]


def test_half_precision_is_evaluated_as_it_was_run_and_exported_as_it_was_saved(world, tmp_path):
    found = checked(world, SPEC.replace("device = cpu", "device = cpu\n  precision = bf16\n"))
    outcome = run_spec(found, name="a", out=tmp_path / "run", measure=False)
    assert evaluate_run(found, tmp_path / "run", "last")["main"] == pytest.approx(outcome.metrics["main"], rel=1e-6)
    folder, _ = export_run(found, tmp_path / "run", "last", tmp_path / "t", "t")
    wanted = load_file(world / "t" / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    assert written.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(written[name], value), name


def run_folder(root, path, spec, at):
    folder = root / path
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"spec": spec, "params": {}}))
    os.utime(folder, (at, at))
    return folder


def test_the_newest_run_of_a_spec(tmp_path):
    root = tmp_path / "runs"
    run_folder(root, "a", "a.gkd", 10)
    second = run_folder(root, "a-2", "a.gkd", 30)
    run_folder(root, "a-3", "a.gkd", 20)
    assert newest("a", root) == second
    # Runs of other specs whose names begin alike.
    other = run_folder(root, "a2", "a2.gkd", 50)
    far = run_folder(root, "a-4", "specs/a-4.gkd", 60)
    assert newest("a", root) == second
    assert newest("a2", root) == other
    assert newest("a-4", root) == far
    with pytest.raises(RunError, match="there is no run of a-2"):
        newest("a-2", root)


@pytest.mark.parametrize("name", ["my spec", "a[1]", "50% held out"])
def test_a_run_is_found_under_the_name_that_it_was_given(tmp_path, name):
    root = tmp_path / "runs"
    first = RunFolder.create(name, root=root)
    assert newest(name, root) == first.path
    os.utime(first.path, (1, 1))
    again = RunFolder.create(name, root=root)
    assert again.path != first.path
    assert newest(name, root) == again.path


def test_a_run_is_evaluated_from_another_folder(tmp_path, monkeypatch):
    write(tmp_path)
    (tmp_path / "small.gkd").write_text(SPEC.replace("LOSS", KL))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run_spec(check_path("small.gkd"), name="small", measure=False)
    found = json.loads((tmp_path / "runs" / "small" / "run.json").read_text())
    assert found["spec"] == "small.gkd"
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = CliRunner().invoke(application(), ["eval", "../runs/small", "--json"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["main"]) == {"acc", "far"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"spec": 3, "params": {}}', '{"spec": "a.gkd", "params": 1}'])
def test_a_run_json_that_says_nothing_is_told_in_words(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"is not a run folder; it has no readable run.json"):
        session.about(tmp_path)
