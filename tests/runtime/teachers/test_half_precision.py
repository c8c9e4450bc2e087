"""Runs in bf16 whose teacher is held in it, beside the same with its weights in fp32."""

import pytest
import torch
from safetensors.torch import load_file
from stored_world import ALL, CACHED, CLASSIFY, LANGUAGE, cache, classifiers, decoders, placed, plan, run, spec
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gkd_dsl.runtime import stages
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run

BF16 = "precision = bf16"
EPS = 2.0**-8
WORLDS = {"bert": (classifiers, CLASSIFY, {"OBJECTIVE": ALL}), "llama": (decoders, LANGUAGE, {"LOSS": "kl"})}


def path_of(folder, family, placement="", name="spec.gkd"):
    _, text, words = WORLDS[family]
    return spec(folder, text, f"{BF16}\n  {placement}", name=name, **words)


@pytest.mark.parametrize("family", WORLDS)
@pytest.mark.parametrize("representable", [True, False])
def test_the_losses_are_those_of_weights_in_fp32(family, representable, tmp_path, monkeypatch):
    """The same to the last bit where the weights are numbers of bf16; else to the rounding of the embeddings."""
    folder = WORLDS[family][0](tmp_path)
    if representable:
        kind = AutoModelForCausalLM if family == "llama" else AutoModelForSequenceClassification
        kind.from_pretrained(folder / "t", dtype=torch.bfloat16).save_pretrained(folder / "t")
    path = path_of(folder, family)
    found = run(path)
    monkeypatch.setattr(stages, "untrained", lambda plan, precision: {})
    expected = run(path)
    assert len(found.steps) == len(expected.steps) > 0
    for one, other in zip(found.steps, expected.steps, strict=True):
        for name, value in other.items():
            assert one[name] == (value if representable else pytest.approx(value, rel=8 * EPS)), name


@pytest.mark.parametrize("family", WORLDS)
@pytest.mark.parametrize("place", ["offload", "disk"])
def test_every_place_gives_the_same_bits(family, place, tmp_path):
    folder = WORLDS[family][0](tmp_path)
    live = run(path_of(folder, family))
    assert run(path_of(folder, family, placed(f"placement = {place}"))).steps == live.steps


@pytest.mark.parametrize("family", WORLDS)
@pytest.mark.parametrize("place", ["resident", "offload", "disk"])
def test_its_matrices_take_two_bytes(family, place, tmp_path):
    folder = WORLDS[family][0](tmp_path)
    made = Run(plan(path_of(folder, family, placed(f"placement = {place}"))), root=folder)
    stage = made.placed(made.plan.stages[0])
    teacher, student = stage.models["t"], stage.models["s"]
    for name, parameter in teacher.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim > 1 else torch.float32), name
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_what_is_stored_is_what_is_run(tmp_path):
    folder = classifiers(tmp_path)
    path = path_of(folder, "bert", CACHED)
    cache(path)
    stored = run(path)
    live = run(path_of(folder, "bert", name="live.gkd"))
    # Afterwards the students differ, since hidden states are stored in bf16 and live ones are not.
    assert stored.steps[0]["soft"] == pytest.approx(live.steps[0]["soft"], rel=1e-6)
    assert stored.steps[0]["hid"] == pytest.approx(live.steps[0]["hid"], rel=2 * EPS)
    assert stored.steps[-1]["soft"] == pytest.approx(live.steps[-1]["soft"], rel=8 * EPS)


STARTED = """gkd 1
teacher t = hf("t")
student s = truncated(t, layers = [0, 2])
data d = csv("rows.csv", text = "text", label = "label", held_out = 20%)
loss soft = kl(s.logits <- t.logits, temperature = 2.0)
metric agree = agreement(s.logits <- t.logits)
stage main for 1 epochs {
  batch_size = 4
  evaluate agree
  minimize soft
}
runtime {
  device = cpu
  precision = bf16
  PLACEMENT
}
"""


@pytest.mark.parametrize("place", ["resident", "offload", "disk"])
@pytest.mark.parametrize("first", ["s", "t"])
def test_a_student_starts_from_the_weights_as_they_were_saved(place, first, tmp_path):
    folder = classifiers(tmp_path)
    made = Run(plan(spec(folder, STARTED, placed(f"placement = {place}"))), root=folder)
    if place != "disk":
        made.model(first)
    stage = made.placed(made.plan.stages[0])
    saved = load_file(folder / "t" / "model.safetensors")
    student = stage.models["s"].state_dict()
    key = "bert.encoder.layer.%d.output.dense.weight"
    assert torch.equal(student[key % 1], saved[key % 2])
    assert torch.equal(student["classifier.weight"], saved["classifier.weight"])
    assert stage.models["t"].classifier.weight.dtype == torch.bfloat16


def test_a_model_that_an_earlier_stage_trains_stays_whole(tmp_path):
    folder = classifiers(tmp_path)
    text = CLASSIFY.replace(
        "stage main", "loss own = cross_entropy(t.logits, batch.labels)\n"
        "stage first for 1 epochs {\n  train t\n  batch_size = 4\n  minimize own\n}\nstage main",
    )  # fmt: skip
    made = Run(plan(spec(folder, text, BF16, OBJECTIVE="soft")), root=folder)
    assert {p.dtype for p in made.model("t").parameters()} == {torch.float32}


def test_the_model_itself_is_given_out_as_it_was_saved(tmp_path):
    folder = classifiers(tmp_path)
    made = Run(plan(path_of(folder, "bert")), root=folder)
    made.model("t")
    saved = load_file(folder / "t" / "model.safetensors")
    for name, value in made.whole("t").state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_a_run_goes_on_where_it_was_ended(tmp_path):
    folder = classifiers(tmp_path)
    path = path_of(folder, "bert")
    whole = run(path, RunFolder.create("x", out=folder / "whole"))

    class Stop:
        def on_step(self, record):
            if record.step == 3:
                raise KeyboardInterrupt

        on_stage = on_evaluate = lambda self, record: None
        close = lambda self: None  # noqa: E731

    ended = RunFolder.create("x", out=folder / "ended")
    text = path.read_text().replace("batch_size = 4", "batch_size = 4\n  checkpoint_every = 2 steps")
    path.write_text(text)
    with pytest.raises(KeyboardInterrupt):
        run(path, ended, listeners=[Stop()])
    assert run(path, ended, resume=True).steps == whole.steps[2:]
