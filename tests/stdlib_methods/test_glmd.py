"""GLMD (arXiv 2306.06625): logits alone, over the whole vocabulary or the part that the student keeps."""

import json

import pytest
import torch
import torch.nn.functional as F
from method_world import VOCABULARY, Pair, Step, agree, batch_of, close, folder, plans, row_kl, use, world
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.models.describe import whole
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.models.vocabulary import attached
from gkd_dsl.runtime.session import plan_of, run_spec
from gkd_dsl.runtime.stages import Run

LANGUAGE = Pair((4, 24, 4), (2, 16, 4), "masked_lm")
KEPT = "kept({count}, source = rows{more})"


def spec(count=None, body="", more=""):
    """A teacher and a student that keeps `count` of 41 ids, counted in a file where low words are frequent."""
    (world() / "frequent.txt").write_text(
        "".join(" ".join(f"w{k}" for k in range(12 - n % 12)) + "\n" for n in range(60))
    )
    text = LANGUAGE.spec(body).replace("lines.txt", "frequent.txt")
    if count is None:
        return text
    line = next(line for line in text.splitlines() if line.startswith("student"))
    return text.replace(line, f"{line} {{ vocabulary = {KEPT.format(count=count, more=more)} }}")


def checked(text):
    found = check_text(text, "x.gkd", root=world())
    assert [f"{d.code} {d.message}" for d in (*found.diagnostics, *found.later) if d.code != "W0701"] == []
    return found


def step_of(text, name=None, seed=0):
    stages = compile_plan(checked(text).graph).stages
    plan = next(stage for stage in stages if name in (None, stage.name))
    models = {}
    for node in sorted(plan.models, key=lambda node: node.name != "t"):
        own = load(node.info, dtype=torch.float64, seed=seed + (node.name == "t"), models=models, root=world())
        models[node.name] = own
    return Step(plan, models)


def logits_of(step, batch, name):
    return step.models[name](input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_every_valid_token_counts_and_no_label_does():
    def oracle(students, teachers, blocks, batch):
        soft = [
            225.0 * row_kl(t.logits[place] / 15.0, s.logits[place] / 15.0)
            for s, t in zip(students, teachers, strict=True)
            for place in range(len(s.logits))
        ]
        squares = [
            ((s.logits[place] - t.logits[place]) ** 2).mean()
            for s, t in zip(students, teachers, strict=True)
            for place in range(len(s.logits))
        ]
        return {"soft": sum(soft) / len(soft), "logits": sum(squares) / len(squares)}

    text = LANGUAGE.spec(*use("glmd", args="mse_weight = 0.5"))
    step = step_of(text)
    assert "labels" not in plans(text)["m_glmd.pretrain"].columns
    agree(step, batch_of(task="masked_lm"), oracle, {"m_glmd/soft": 1.0, "m_glmd/logits": 0.5})


def test_the_task_is_soft_labels_at_temperature_one():
    text = (
        'gkd 1\nimport "gkd:glmd" use glmd_task\n' + Pair().spec("use glmd_task(t -> s) as m\nrun m").partition("\n")[2]
    )
    step, batch = step_of(text), batch_of()
    s, t = (logits_of(step, batch, name) for name in "st")
    close(step(batch)[0], F.cross_entropy(s, F.softmax(t, -1)), "soft labels")


def test_what_is_kept_is_compared_and_renormalised():
    step = step_of(spec(14, "\n".join(use("glmd", args='align = "kept", mse_weight = 0.5'))))
    batch = batch_of(task="masked_lm")
    found = attached(step.models["s"])
    assert len(found.kept) == 14
    s, t = (logits_of(step, batch, name) for name in "st")
    assert (s.shape[-1], t.shape[-1]) == (14, VOCABULARY)
    _, values = step(batch)
    soft, squares = [], []
    for row, mask in enumerate(batch["attention_mask"]):
        for place in range(int(mask.sum())):
            theirs = torch.stack([t[row, place, token] for token in found.kept.tolist()])
            soft.append(225.0 * row_kl(theirs / 15.0, s[row, place] / 15.0))
            squares.append(((s[row, place] - theirs) ** 2).mean())
    close(values["m_glmd/soft"], sum(soft) / len(soft), "soft")
    close(values["m_glmd/logits"], sum(squares) / len(squares), "squares")


def test_the_most_frequent_words_and_all_special_tokens_are_kept():
    found = attached(step_of(spec(12, "\n".join(use("glmd", args='align = "kept"')))).models["s"])
    # [PAD] [UNK] [CLS] [SEP] [MASK], then w0 ... w6 as they stand in the file.
    assert sorted(found.kept.tolist()) == list(range(12))
    words = attached(
        step_of(spec(12, "\n".join(use("glmd", args='align = "kept"')), ', words = ["w30", "w31"]')).models["s"]
    )
    assert sorted(words.kept.tolist()) == [*range(10), 35, 36]


@pytest.mark.parametrize(("more", "cosine"), [("", False), (", like = t, similarity = cosine", True)])
def test_dropped_ids_are_placed_by_the_model_that_they_are_said_to_be_like(more, cosine):
    text = spec(12, "\n".join(use("glmd", args='align = "kept"')), more)
    step = step_of(text)
    found = attached(step.models["s"])
    own = load(whole(checked(text).models["s"].info), dtype=torch.float64)
    table = (step.models["t"] if more else own).get_input_embeddings().weight.detach().float()
    for token in range(12, VOCABULARY):
        values = [
            float(F.cosine_similarity(table[token], table[other], dim=0) if cosine else table[token] @ table[other])
            for other in range(5, 12)
        ]
        assert int(found.kept[found.rows[token]]) == 5 + values.index(max(values))


@pytest.mark.parametrize("align", ["exact", "kept"])
def test_kept_whole_is_without_it_bit_for_bit(tmp_path, align):
    # Fused with the head, the two are made of other tiles, and equal to rounding only.
    body = "\n".join([*use("glmd", args="{}"), "runtime {{ fuse_logits = off }}"])
    plain = run_spec(checked(spec(None, body.format("T = 15.0"))), name="a", out=tmp_path / "a", measure=False)
    whole = run_spec(
        checked(spec("100%", body.format(f'align = "{align}"'))), name="b", out=tmp_path / "b", measure=False
    )
    one, two = (outcome.result.models["s"].state_dict() for outcome in (plain, whole))
    assert all(torch.equal(two[name], value) for name, value in one.items())


def test_masked_words_are_compared_as_rows():
    step = step_of(
        spec(14, "loss mlm = cross_entropy(s.logits, batch.labels)\nstage main for 3 epochs { minimize mlm }")
    )
    batch = batch_of(task="masked_lm")
    found, s = attached(step.models["s"]), logits_of(step, batch, "s")
    batch["labels"][0, :2] = torch.tensor([40, 29])
    rows = [
        -F.log_softmax(s[row, place], -1)[found.rows[label]]
        for row, places in enumerate(batch["labels"])
        for place, label in enumerate(places.tolist())
        if label != -100
    ]
    close(step(batch)[0], sum(rows) / len(rows), "mlm")


def test_a_metric_reads_rows_too(tmp_path):
    body = (
        "loss mlm = cross_entropy(s.logits, batch.labels)\nmetric right = accuracy(s.logits, batch.labels)\n"
        "stage main for 4 steps {\n  minimize mlm\n  batch_size = 4\n  evaluate right every 2 steps\n}"
    )
    outcome = run_spec(checked(spec(14, body)), name="x", out=tmp_path / "x", measure=False)
    assert 0.0 <= outcome.metrics["main"]["right"] <= 1.0


CHAIN = """import "gkd:glmd" use glmd, glmd_task
teacher c = random_init("{c}")
student h = with_head(s, task = classification, num_labels = 3)
data reviews = csv("rows.csv", text = "text", label = "label")
use glmd(t = t, s = s, source = rows, align = "kept") as first
use glmd_task(t = c, s = h, source = reviews) as last
run first
stage again for 3 steps {{
  source = rows
  batch_size = 4
  minimize first.soft
}}
run last
"""


@pytest.fixture
def chain():
    (world() / "rows.csv").write_text("text,label\n" + "".join(f"text {n} w{n},{n % 3}\n" for n in range(9)))
    (world() / "labelled.csv").write_text("text,label\n" + "".join(f"w{n} w{n % 7},{n % 3}\n" for n in range(36)))
    text = spec(14, CHAIN.format(c=folder("classification", 4, 24, 4, 0.0))).replace(
        'csv("rows.csv"', 'csv("labelled.csv"'
    )
    return checked(text)


class Kill:
    def __init__(self, at):
        self.at, self.seen = at, 0

    def on_stage(self, record):
        pass

    def on_step(self, record):
        self.seen += 1
        if self.seen == self.at:
            raise RuntimeError("killed")

    def on_evaluate(self, record):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("at", [4, 8])
def test_the_map_is_saved_and_a_killed_run_goes_on(chain, tmp_path, at):
    whole = run_spec(chain, name="whole", out=tmp_path / "whole", measure=False)
    with pytest.raises(RuntimeError, match="killed"):
        run_spec(chain, name="cut", out=tmp_path / "cut", listeners=[Kill(at)], measure=False)
    again = run_spec(chain, name="cut", out=tmp_path / "cut", resume=True, measure=False)
    for name in ("s", "h"):
        one, two = (outcome.result.models[name].state_dict() for outcome in (whole, again))
        assert any("id_map" in key for key in one)
        assert all(torch.equal(two[key], value) for key, value in one.items())


def test_the_exports_work_with_the_tokenizer_as_it_was(chain, tmp_path):
    outcome = run_spec(chain, name="x", out=tmp_path / "x", measure=False)
    batch = batch_of(task="masked_lm")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    found = attached(outcome.result.models["s"])
    assert 0 < int(found.rows.max()) < 14
    stands = found.kept[found.rows]
    for name, cls in (("s", AutoModelForMaskedLM), ("h", AutoModelForSequenceClassification)):
        place = outcome.exports[name]
        assert len(AutoTokenizer.from_pretrained(place)) == VOCABULARY
        loaded = cls.from_pretrained(place).eval()
        assert loaded.config.vocab_size == VOCABULARY
        with torch.no_grad():
            mine, theirs = outcome.result.models[name].eval()(**inputs).logits, loaded(**inputs).logits
        torch.testing.assert_close(theirs[..., found.kept] if name == "s" else theirs, mine)
        if name == "s":
            assert all(torch.equal(theirs[..., token], theirs[..., int(stands[token])]) for token in range(VOCABULARY))
        saved = json.loads((place / "kept_vocabulary.json").read_text())
        assert saved["stands_for"] == stands.tolist()
        assert "14 of 41 ids kept" in (place / "README.md").read_text()


def test_it_may_teach_later():
    """A student of the same part learns from it as it is; one of the whole vocabulary over what the teacher keeps."""
    small = folder("masked_lm", 2, 16, 4, 0.0)
    body = (
        f'student u = random_init("{small}")\nstudent v = truncated(s, layers = [0])\n'
        'loss one = kl(u.logits <- s.logits, align = "kept")\nloss two = kl(v.logits <- s.logits)\n'
        "stage main for 3 epochs { minimize one + two }"
    )
    text = spec(14, body).replace("student s", "teacher s").replace("teacher t", "teacher _t")
    step, batch = step_of(text), batch_of(task="masked_lm")
    u, v, s = (logits_of(step, batch, name) for name in "uvs")
    found = attached(step.models["s"])
    assert torch.equal(attached(step.models["v"]).rows, found.rows)
    at = batch["attention_mask"].bool()
    values = step(batch)[1]
    for name, mine in (("one", u[..., found.kept]), ("two", v)):
        expected = F.kl_div(F.log_softmax(mine[at], -1), F.softmax(s[at], -1), reduction="batchmean")
        close(values[name], expected, name)


def test_a_run_makes_the_map_from_what_the_teacher_is_then(chain):
    run = Run(plan_of(chain), root=world())
    assert torch.equal(attached(run.model("s")).rows, attached(run.model("h")).rows)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ('align = "kept"', 'align = "trim"', "E0320"),
        ("kept(14, source", "kept(0, source", "E0403"),
        ("kept(14, source", "kept(42, source", "E0403"),
        ("source = rows)", "source = rows, words = [1])", "E0404"),
    ],
)
def test_mistakes(old, new, code):
    text = spec(14, "\n".join(use("glmd", args='align = "kept"')))
    assert old in text
    found = check_text(text.replace(old, new, 1), "x.gkd", root=world())
    assert [d.code for d in found.diagnostics if d.severity == "error"] == [code]
