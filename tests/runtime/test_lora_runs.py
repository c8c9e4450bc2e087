"""Runs of students with LoRA: what trains, what is saved, what is exported, and one process beside two."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

sys.path.insert(0, str(Path(__file__).parent / "backends"))

from small_folders import WORDS, write, write_decoders

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.planning.layout import trained
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.errors import RunError, Stopped
from gkd_dsl.runtime.models import adapters
from gkd_dsl.runtime.reopen import evaluate_run, export_run
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.session import run_spec
from gkd_dsl.runtime.stages import Run
from gkd_dsl.runtime.step import StepModule
from gkd_dsl.schedules import Clock

SPEC = """gkd 1
teacher t = hf("./t")
student s = hf("./s", num_labels = 3) { adapter = lora(ADAPTER) }
data d = csv("rows.csv", text = "text", label = "label", held_out = 20%)
loss soft = kl(s.logits <- t.logits)
loss att = attention_kl(s.layer[1].attn.scores <- t.layer[2].attn.scores)
metric acc = accuracy(s.logits, batch.labels)
stage main for 6 steps {
  batch_size = 6
  max_length = 12
  minimize soft + 0.1 * att
  optim = adamw(lr = 1e-2)
  evaluate acc every 2 steps
  keep best by acc
  checkpoint_every = 1 steps
}
runtime { fuse_logits = auto }
"""
ADAPTER = "r = 4, alpha = 8, dropout = 0.1"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A classifier `t`, and `s`, saved with a head for masked words: its pooler and classifier are new."""
    folder = tmp_path_factory.mktemp("lora_runs")
    write(folder)
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder / "s")
    return folder


def checked(world, adapter=ADAPTER, changes=()):
    text = SPEC.replace("ADAPTER", adapter)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    found = check_text(text, root=world)
    assert found.diagnostics.ok, found.diagnostics
    assert not list(found.later)
    return found


def run(world, out, adapter=ADAPTER, changes=(), **more):
    return run_spec(checked(world, adapter, changes), name="a", out=out, measure=False, **more)


def step_of(world, adapter=ADAPTER, changes=()):
    plan = compile_plan(checked(world, adapter, changes).graph)
    made = Run(plan, root=world)
    stage = plan.stages[0]
    return stage, StepModule(stage, {node.name: made.model(node.name) for node in stage.models})


def inputs(folder, texts=("w3 w7 w9", "w1 w2 w3 w4 w5")):
    return AutoTokenizer.from_pretrained(folder)(list(texts), padding=True, return_tensors="pt")


class At:
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_stage(self, record):
        pass

    def on_step(self, record):
        if record.step == self.step:
            self.act()

    def on_evaluate(self, record):
        pass

    def close(self):
        pass


ADAPTERS = {f"encoder.layer.{i}.attention.self.{x}.lora_{y}.default.weight" for i in (0, 1) for x in ("query", "value") for y in "AB"}  # fmt: skip
HEAD = {f"{module}.{x}" for module in ("bert.pooler.dense", "classifier") for x in ("weight", "bias")}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("", {f"bert.{name}" for name in ADAPTERS} | HEAD),
        ("train s.layer[0]", {f"bert.{name}" for name in ADAPTERS if ".0." in name}),
        ("train s.layer[0 ..< 2]", {f"bert.{name}" for name in ADAPTERS}),
        ("train s.head", HEAD),
        ("freeze s.head", {f"bert.{name}" for name in ADAPTERS}),
        ("freeze s.layer[1]", {f"bert.{name}" for name in ADAPTERS if ".0." in name} | HEAD),
        ("freeze s.embed", {f"bert.{name}" for name in ADAPTERS} | HEAD),
    ],
)
def test_what_a_stage_trains(change, expected, world):
    changes = [("  minimize", f"  {change}\n  minimize")] if change else []
    if change == "train s.head":
        # Attention scores lie before it, which the check says.
        changes.append((" + 0.1 * att", ""))
    stage, step = step_of(world, changes=changes)
    assert {name.removeprefix("s/") for name, _ in step.trainable()} == expected
    assert {name for name, p in step.models["s"].named_parameters() if p.requires_grad} == expected
    node = next(node for node in stage.models if node.name == "s")
    assert trained(stage, node).count == sum(p.numel() for _, p in step.trainable())


def test_a_model_that_a_caller_made_gets_its_adapter(world):
    plan = compile_plan(checked(world).graph)
    stage = plan.stages[0]
    model = AutoModelForSequenceClassification.from_pretrained(world / "s", num_labels=3)
    teacher = AutoModelForSequenceClassification.from_pretrained(world / "t")
    step = StepModule(stage, {"s": model, "t": teacher})
    assert len(step.trainable()) == 8 + 4
    assert adapters.adapted(model)
    assert not adapters.adapted(teacher)


def test_the_optimiser_keeps_state_for_what_is_trained_alone(world):
    stage, step = step_of(world)
    backend = LocalBackend()
    backend.begin(step, stage.stage.optim)
    batch = {**inputs(world / "t"), "labels": torch.tensor([0, 2])}
    backend.step([batch], Clock(0, 6, 6.0), 1e-2)
    state = backend.optimizer_state()
    node = next(node for node in stage.models if node.name == "s")
    moments = sum(value.numel() for name, value in state.items() if not name.startswith("step/"))
    assert moments == 2 * trained(stage, node).count
    backend.end()


@pytest.fixture(scope="module")
def whole(world):
    run(world, world / "whole")
    return world / "whole"


def test_checkpoints_hold_what_is_trained_and_no_base(whole):
    for path in (whole / "checkpoints").iterdir():
        assert set(load_file(path / "model.s.safetensors")) == {f"bert.{name}" for name in ADAPTERS} | HEAD


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_run_that_goes_on_is_the_run_that_was_not_ended(after, world, whole, tmp_path):
    with pytest.raises(Stopped):
        run(world, tmp_path / "cut", listeners=[At(after, lambda: os.kill(os.getpid(), signal.SIGINT))])
    run(world, tmp_path / "cut", resume=True)
    for name in (
        "export/model.safetensors",
        *(f"checkpoints/main-6/{x}.safetensors" for x in ("model.s", "optimizer")),
    ):
        found, wanted = load_file(tmp_path / "cut" / name), load_file(whole / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_a_checkpoint_of_another_rank_is_refused(world, whole):
    other = compile_plan(checked(world, ADAPTER.replace("r = 4", "r = 3")).graph)
    with pytest.raises(RunError, match=r"lora\.r is 4 there and 3 here"):
        Run(other, folder=RunFolder.open(whole), root=world).restore()


def test_the_best_step_is_what_is_exported(world, tmp_path):
    outcome = run(world, tmp_path / "best")
    accuracies = [
        record["metrics"]["acc"]
        for line in (tmp_path / "best" / "metrics.jsonl").read_text().splitlines()
        if (record := json.loads(line))["kind"] == "evaluate" and record["step"] > 0
    ]
    best = (tmp_path / "best" / "best").read_text().strip()
    assert outcome.metrics["main"]["acc"] == max(accuracies)
    saved = load_file(tmp_path / "best" / best / "model.s.safetensors")
    exported = load_file(tmp_path / "best" / "export" / "model.safetensors")
    assert torch.equal(exported["classifier.weight"], saved["classifier.weight"])
    assert evaluate_run(checked(world), tmp_path / "best", "best")["main"]["acc"] == pytest.approx(max(accuracies))


def test_merged_it_loads_as_a_plain_model_with_the_same_logits(world, tmp_path):
    outcome = run(world, tmp_path / "m")
    folder = outcome.exports["s"]
    again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model = outcome.result.models["s"].eval()
    batch = inputs(folder)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-6, rtol=1e-5)
    base = load_file(world / "s" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    written = load_file(folder / "model.safetensors")
    assert not torch.allclose(written[name], base[name])
    name = "bert.encoder.layer.0.attention.self.key.weight"
    assert torch.equal(written[name], base[name])
    card = (folder / "README.md").read_text()
    assert "LoRA of rank 4, alpha 8, on query, value; merged into the weights" in card
    assert not any("lora" in key for key in written)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("more", ["", ", dora = true", ", rslora = true"])
def test_alone_it_is_put_on_its_base_by_the_library(more, world, tmp_path):
    outcome = run(world, tmp_path / "a", f"{ADAPTER}, export = adapter{more}")
    folder = outcome.exports["s"]
    assert not list(folder.glob("model*.safetensors"))
    base = AutoModelForSequenceClassification.from_pretrained(world / "s", num_labels=3)
    again = peft.PeftModel.from_pretrained(base, folder).eval()
    batch = inputs(folder)
    model = outcome.result.models["s"].eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-6, rtol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world / "s")
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]
    card = (folder / "README.md").read_text()
    assert f"from_pretrained({json.dumps(str(world / 's'))}, num_labels=3)" in card
    assert 'PeftModel.from_pretrained(base, "path/to/this/folder")' in card
    assert 'library_name: "peft"' in card
    # From a checkpoint too, over an earlier export.
    export_run(checked(world, f"{ADAPTER}, export = adapter{more}"), tmp_path / "a", "last", tmp_path / "again", None)
    base = AutoModelForSequenceClassification.from_pretrained(world / "s", num_labels=3)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-6, rtol=1e-5)


CHAIN = """gkd 1
teacher t = hf("./t")
model a = hf("./t") { adapter = lora(4) }
student s = truncated(a, layers = [0, 2]) { adapter = lora(r = 2, targets = ["dense"]) }
data d = csv("rows.csv", text = "text", label = "label", held_out = 20%)
loss first = cross_entropy(a.logits, batch.labels)
loss soft = kl(s.logits <- a.logits)
loss hid = mse(s.hidden[1] <- a.hidden[1])
stage teach for 4 steps { batch_size = 6 max_length = 12 minimize first optim = adamw(lr = 5e-2) checkpoint_every = 1 steps }
stage learn for 4 steps { batch_size = 6 max_length = 12 minimize soft + hid optim = adamw(lr = 1e-2) checkpoint_every = 1 steps }
"""


def chain(world, out, **more):
    text = CHAIN.replace(" batch_size", "\n batch_size").replace(" max_length", "\n max_length")
    text = (
        text.replace(" minimize", "\n minimize").replace(" optim", "\n optim").replace(" checkpoint_", "\n checkpoint_")
    )
    found = check_text(text.replace(" }\nstage", "\n}\nstage").replace("steps }\n", "steps\n}\n"), root=world)
    assert found.diagnostics.ok, found.diagnostics
    return run_spec(found, name="c", out=out, measure=False, **more)


def test_a_student_of_one_stage_teaches_in_the_next(world, tmp_path):
    outcome = chain(world, tmp_path / "whole")
    models = outcome.result.models
    base = load_file(world / "t" / "model.safetensors")
    name = "bert.encoder.layer.2.attention.self.query"
    own = dict(models["s"].named_parameters())
    with adapters.merged(models["a"]):
        taught = models["a"].get_parameter(f"{name}.weight")
    # The student was cut from what the first stage made of its teacher, and its own maps are others.
    assert not torch.allclose(taught, base[f"{name}.weight"])
    assert torch.equal(own["bert.encoder.layer.1.attention.self.query.weight"], taught)
    assert "bert.encoder.layer.1.output.dense.lora_A.default.weight" in own
    stop, seen = At(2, lambda: None), []
    stop.on_stage = lambda record: seen.append(record.stage)
    stop.on_step = lambda record: os.kill(os.getpid(), signal.SIGINT) if (record.step, len(seen)) == (2, 2) else None
    with pytest.raises(Stopped):
        chain(world, tmp_path / "cut", listeners=[stop])
    chain(world, tmp_path / "cut", resume=True)
    found, wanted = (load_file(tmp_path / x / "export" / "model.safetensors") for x in ("cut", "whole"))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


DECODERS = """gkd 1
teacher t = hf("./t")
student s = hf("./s") { adapter = lora(r = 4, export = EXPORT) }
data d = csv("rows.csv", text = "text", held_out = 20%)
loss soft = kl(s.logits <- t.logits)
stage main for 4 steps {
  batch_size = 4
  max_length = 12
  minimize soft
  optim = adamw(lr = 1e-2)
}
runtime {
  fuse_logits = FUSE
  checkpoint = CHECKPOINT
}
"""


def decoders(folder, out, export="merged", fuse="auto", checkpoint="false"):
    text = DECODERS.replace("EXPORT", export).replace("FUSE", fuse).replace("CHECKPOINT", checkpoint)
    found = check_text(text, root=folder)
    assert found.diagnostics.ok, found.diagnostics
    return run_spec(found, name="d", out=out, measure=False)


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_decoders_fused_or_not_checkpointed_or_not(tmp_path):
    write_decoders(tmp_path)
    outcome = decoders(tmp_path, tmp_path / "on", "adapter", "on")
    decoders(tmp_path, tmp_path / "off", fuse="off")
    decoders(tmp_path, tmp_path / "again", fuse="off", checkpoint="true")
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "off"), rel=1e-5)
    assert len(losses(tmp_path / "on")) == 4
    folder = outcome.exports["s"]
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "s"), folder).eval()
    batch = inputs(folder)
    wanted = outcome.result.models["s"].eval()(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(
        again(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, wanted, atol=1e-5, rtol=1e-4
    )
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] is None


def test_in_bf16_under_checkpointing_it_learns_what_it_learns_in_fp32(world, tmp_path):
    runtime = ("fuse_logits = auto", "precision = bf16\n checkpoint = true\n")
    run(world, tmp_path / "half", "r = 4, alpha = 8", [runtime])
    run(world, tmp_path / "full", "r = 4, alpha = 8")
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "full"), rel=0.03)
    saved = load_file(tmp_path / "half" / "checkpoints" / "main-6" / "model.s.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


KEPT = """gkd 1
teacher t = hf("./s")
student s = hf("./s") {
  adapter = lora(r = 2)
  vocabulary = kept(30, source = d)
}
data d = csv("rows.csv", text = "text", held_out = 20%)
loss soft = mse(s.hidden[2] <- t.hidden[2])
loss words = kl(s.logits <- t.logits, align = "kept")
stage main for 3 steps {
  batch_size = 4
  max_length = 12
  minimize soft + words
  optim = adamw(lr = 1e-2)
  checkpoint_every = 1 steps
}
"""


def test_a_part_of_a_vocabulary_and_an_adapter(world, tmp_path):
    found = check_text(KEPT, root=world)
    assert found.diagnostics.ok, found.diagnostics
    outcome = run_spec(found, name="k", out=tmp_path / "k", measure=False)
    again = AutoModelForMaskedLM.from_pretrained(outcome.exports["s"]).eval()
    model = outcome.result.models["s"].eval()
    batch = inputs(outcome.exports["s"])
    kept = model.get_input_embeddings().kept_ids
    torch.testing.assert_close(again(**batch).logits[..., kept], model(**batch).logits, atol=1e-5, rtol=1e-4)
    written = json.loads((outcome.exports["s"] / "kept_vocabulary.json").read_text())
    assert written["kept"] == sorted(kept.tolist())


def test_two_processes_have_the_losses_of_one(world, tmp_path):
    run(world, tmp_path / "1", "r = 4, alpha = 8")
    text = SPEC.replace("ADAPTER", "r = 4, alpha = 8").replace("fuse_logits = auto", "backend = ddp")
    (world / "two.gkd").write_text(text)
    words = ["run", "two.gkd", "--offline", "--processes", "2", "--out", str(tmp_path / "2")]
    done = subprocess.run(
        [sys.executable, "-c", "from gkd_dsl.cli.main import main; main()", *words],
        cwd=world, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
    found, wanted = (load_file(tmp_path / count / "export" / "model.safetensors") for count in ("2", "1"))
    assert all(torch.allclose(found[key], wanted[key], atol=1e-4) for key in wanted)
