"""A new head on another model's body: the weights that are copied, and when; what the checker refuses."""

import pytest
import torch
from tiny_models import CONFIGS, build
from transformers import AutoModelForSequenceClassification

from gkd_dsl.meaning.check import check_text
from gkd_dsl.models.describe import describe, formal, truncated, with_head
from gkd_dsl.models.errors import ModelError
from gkd_dsl.runtime.models.load import load_with_report
from gkd_dsl.runtime.session import plan_of, run_spec
from gkd_dsl.runtime.stages import Run

LANGUAGE = {f: "causal_lm" if f in ("llama", "gpt2", "mistral", "qwen2", "qwen3") else "masked_lm" for f in CONFIGS}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_body_is_the_language_models_and_the_head_is_new(folder, family):
    base = build(folder, family, LANGUAGE[family])
    info = with_head(base.info, "lm", num_labels=3)
    assert (info.task, info.size("C"), info.size("N"), info.family) == ("classification", 3, 3, family)
    model, report = load_with_report(info, models={"lm": base.model}, seed=5)
    mine, theirs = model.base_model.state_dict(), base.model.base_model.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert all(mine[name].data_ptr() != value.data_ptr() for name, value in theirs.items())
    head = {name for name, _ in model.named_parameters() if not name.startswith(base.family.prefix)}
    assert head <= set(report.new)
    assert str(report).startswith("with_head(lm): ")


def test_a_head_of_the_same_kind_is_new_too(folder):
    base = build(folder, "bert", "classification")
    model, report = load_with_report(with_head(base.info, "t", task="classification"), models={"t": base.model}, seed=8)
    assert sorted(report.new) == ["classifier.bias", "classifier.weight"]
    assert not torch.equal(model.classifier.weight, base.model.classifier.weight)


def test_what_it_cannot_be(folder):
    info = describe(str(folder / "distilbert"))
    with pytest.raises(ModelError, match="does not say which head"):
        with_head(info, "s")
    with pytest.raises(ModelError, match="no causal_lm head"):
        with_head(info, "s", task="causal_lm")
    assert with_head(formal("s"), "s", num_labels=2).formal


def test_of_a_truncated_model_that_no_stage_runs(folder):
    """Its origin says how it was made: the file at its place is another, deeper model."""
    base = build(folder, "bert", "masked_lm")
    cut = truncated(base.info, "t", layers=[0, 2])
    info = with_head(cut, "cut", num_labels=2)
    assert info.build.origin == cut
    assert info.size("N") == 2


SPEC = """gkd 1
teacher t = random_init("{t}", num_labels = 3)
model lm = truncated(base, layers = [0, 1])
model base = random_init("{lm}")
student s = with_head(lm, num_labels = 3)
data corpus = text("lines.txt")
data rows = csv("rows.csv", text = "text", label = "label", held_out = 20%)

stage pretrain for 3 steps {{
  source = corpus
  batch_size = 2
  minimize cross_entropy(lm.logits, batch.labels)
  checkpoint_every = 1 step
}}
stage task for 4 steps {{
  source = rows
  batch_size = 4
  minimize kl(s.logits <- t.logits)
  checkpoint_every = 1 step
}}
"""


@pytest.fixture
def spec(tmp_path, folder):
    (tmp_path / "lines.txt").write_text("".join(f"w{n} w{n + 1} w{n + 2}\n" for n in range(12)))
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"w{n} w{n + 1},{n % 3}\n" for n in range(20)))
    words = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(32))])
    text = (folder / "bert" / "config.json").read_text()
    for name, cls in (("t", "BertForSequenceClassification"), ("lm", "BertForMaskedLM")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text[:-1].rstrip() + f', "architectures": ["{cls}"]}}')
        (tmp_path / name / "vocab.txt").write_text(words + "\n")
    return SPEC.format(t="t", lm="lm")


def checked(text, root):
    found = check_text(text, "spec.gkd", root=root)
    assert [str(d) for d in (*found.diagnostics, *found.later)] == []
    return found


class Watch:
    """Keeps the body of `lm` at the end of the first stage; may stop the run at a step."""

    def __init__(self, run=None, stop_at=None):
        self.run, self.stop_at, self.seen, self.body = run, stop_at, 0, None

    def on_stage(self, record):
        if record.stage == "task":
            state = self.run.models["lm"].base_model.state_dict()
            self.body = {name: value.clone() for name, value in state.items()}
            mine = self.run.models["s"].base_model.state_dict()
            self.begins = all(torch.equal(mine[name], value) for name, value in self.body.items())

    def on_step(self, record):
        self.seen += 1

    def on_evaluate(self, record):
        pass

    def close(self):
        pass


def test_the_body_carries_over_at_the_stage_that_first_needs_it(spec, tmp_path):
    found = checked(spec, tmp_path)
    watch = Watch()
    watch.run = run = Run(plan_of(found), root=tmp_path, listeners=[watch])
    first = {name: value.clone() for name, value in run.model("lm").base_model.state_dict().items()}
    result = run.run()
    assert watch.begins
    assert any(not torch.equal(first[name], value) for name, value in watch.body.items()), "pretrain trained nothing"
    after = result.models["lm"].base_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in watch.body.items()), "lm is trained in pretrain alone"
    assert any(
        not torch.equal(result.models["s"].base_model.state_dict()[name], value) for name, value in watch.body.items()
    )


@pytest.mark.parametrize("at", [2, 3, 4, 6])
def test_killed_and_resumed_is_uninterrupted(spec, tmp_path, at):
    found = checked(spec, tmp_path)
    whole = run_spec(found, name="whole", out=tmp_path / "whole", measure=False).result.models["s"].state_dict()

    class Kill(Watch):
        def on_stage(self, record):
            pass

        def on_step(self, record):
            self.seen += 1
            if self.seen == at:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run_spec(found, name="cut", out=tmp_path / "cut", listeners=[Kill()], measure=False)
    again = run_spec(found, name="cut", out=tmp_path / "cut", resume=True, measure=False)
    resumed = again.result.models["s"].state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    # `lm` is a model, not a student: one export, that loads by itself.
    assert list(again.exports) == ["s"]
    loaded = AutoModelForSequenceClassification.from_pretrained(again.exports["s"]).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("made", "code", "says"),
    [
        ("with_head(lm)", "E0502", "does not say which head"),
        ('with_head("lm", num_labels = 3)', "E0508", "takes a model of this spec"),
        ("with_head(lm, num_labels = 3, layers = [0])", "E0234", "has no argument `layers`"),
        ("with_head(lm, task = clasification)", "E0402", "`task` is one of"),
        ("with_head(lm, task = masked_lm, num_labels = 3)", "E0502", "num_labels is for a classifier"),
    ],
)
def test_a_mistake_is_told(spec, tmp_path, made, code, says):
    found = check_text(spec.replace("with_head(lm, num_labels = 3)", made), "spec.gkd", root=tmp_path)
    assert [d.code for d in found.diagnostics] == [code]
    assert says in next(iter(found.diagnostics)).message
