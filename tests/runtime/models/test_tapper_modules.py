"""Raw module taps, weights, and what goes wrong."""

import json

import pytest
import torch
from tiny_models import CONFIGS, FAMILY_NAMES, build
from transformers import AlbertConfig, AlbertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from gkd_dsl.models.describe import describe
from gkd_dsl.models.errors import ModelError, TapError
from gkd_dsl.models.resolve import has_rest, part_modules, resolve_tap
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models.load import load, part_parameters
from gkd_dsl.runtime.models.tapper import Tapper


def module(name, side="out"):
    return TapPath("module", part=side, name=name)


@pytest.mark.parametrize("name", ["bert.encoder.layer.1.intermediate", "encoder.layer.1.intermediate"])
def test_a_module_by_its_path_in_the_model_or_in_its_body(make, batch, name):
    tiny = make("bert", "classification")
    seen = {}
    tiny.blocks[1].intermediate.register_forward_hook(
        lambda module, args, output: seen.update(given=args[0], output=output)
    )
    with torch.no_grad():
        taps = tiny.tapper.run(batch(), [module(name), module(name, "in")])
    assert taps[module(name)] is seen["output"]
    assert taps[module(name, "in")] is seen["given"]


def test_element_zero_of_tuples_and_keyword_inputs(make, batch):
    tiny = make("llama")
    with torch.no_grad():
        taps = tiny.tapper.run(
            batch(),
            [
                module("layers.1.self_attn"),
                module("layers.1.self_attn", "in"),
                TapPath("layer", 1, "attn.out"),
                module("layers.1.input_layernorm"),
            ],
        )
    assert torch.equal(taps[module("layers.1.self_attn")], taps[TapPath("layer", 1, "attn.out")])
    assert torch.equal(taps[module("layers.1.self_attn", "in")], taps[module("layers.1.input_layernorm")])


def test_a_module_in_the_head_runs_the_head(make, batch):
    tiny = make("distilbert", "classification")
    with torch.no_grad():
        taps = tiny.tapper.run(batch(), [module("pre_classifier"), TapPath("logits")])
        alone = tiny.tapper.run(batch(), [module("pre_classifier")])
    assert taps[module("pre_classifier")].shape == (3, 20)
    assert torch.equal(alone[module("pre_classifier")], taps[module("pre_classifier")])


def test_an_unknown_module_offers_near_misses(make, batch):
    tiny = make("bert", "classification")
    with pytest.raises(TapError) as error:
        tiny.tapper.run(batch(), [module("bert.encoder.layer.1.intermediat")])
    assert error.value.near[0] == "bert.encoder.layer.1.intermediate"
    assert "BertForSequenceClassification" in error.value.reason


def test_a_module_called_twice_has_no_value(make, batch):
    tiny = make("bert")
    tiny.blocks[1].output = tiny.blocks[0].output
    tapper = Tapper(tiny.model, tiny.info)
    with pytest.raises(TapError, match="called more than once"):
        tapper.run(batch(), [module("encoder.layer.0.output")])


def test_a_module_that_gives_no_tensor(make, batch):
    tiny = make("bert")
    tiny.model.pooler.register_forward_hook(lambda *_: "text")
    with pytest.raises(TapError, match="deals in a str"):
        tiny.tapper.run(batch(), [module("pooler")])


def test_weights_need_no_forward(make):
    tiny = make("bert", "classification")
    words = TapPath("weight", name="bert.embeddings.word_embeddings.weight")
    short = TapPath("weight", name="embeddings.word_embeddings.weight")
    taps = tiny.tapper.run({}, [words, short])
    assert taps[words] is taps[short] is tiny.model.bert.embeddings.word_embeddings.weight
    with pytest.raises(TapError) as error:
        tiny.tapper.run({}, [TapPath("weight", name="classifier.wieght")])
    assert error.value.near[0] == "classifier.weight"


def test_taps_that_a_model_lacks(make, batch):
    tiny = make("gpt2")
    for path in (TapPath("logits"), TapPath("pooled")):
        with pytest.raises(TapError) as error:
            tiny.tapper.run(batch(), [path])
        assert error.value.kind == "unavailable"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_declared_shapes_agree_with_those_of_a_batch(folder, batch, family):
    tiny = build(folder, family, "classification")
    inputs = batch()
    names = [
        name for name, m in tiny.model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.LayerNorm, Conv1D))
    ]
    assert len(names) >= 2
    for name in [*names[:6], names[-1]]:
        for side in ("in", "out"):
            with torch.no_grad():
                shape = tiny.tapper.run(inputs, [module(name, side)])[module(name, side)].shape
            declared = resolve_tap(tiny.info, "s", [("module", (name,)), (side, None)]).type.dims
            known = [{"B": 3, "L": 7}.get(dim.name, dim.size) for dim in declared]
            assert len(known) == len(shape)
            assert all(size in (None, found) for size, found in zip(known, shape, strict=True))


def _names(tiny, part):
    return {name for name, _ in part_parameters(tiny.model, part_modules(tiny.info, part))}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("task", ["classification", "masked_lm", "causal_lm"])
def test_parts_split_a_model(folder, family, task):
    try:
        tiny = build(folder, family, task)
    except ModelError:
        assert (family, task) in {(f, "masked_lm") for f in CONFIGS} | {
            ("distilbert", "causal_lm"),
            ("mobilebert", "causal_lm"),
        }
        return
    names = {part: _names(tiny, part) for part in ("body", "embed", "head", "layer.0", "layer.2", "rest")}
    blocks = set().union(*(_names(tiny, f"layer.{i}") for i in range(tiny.info.size("N"))))
    assert names["embed"] | blocks | names["rest"] == names["body"]
    assert not names["rest"] & (names["embed"] | blocks)
    assert bool(names.pop("rest")) == has_rest(tiny.info)
    everything = {name for name, _ in tiny.model.named_parameters()}
    assert names["body"] | names["head"] == everything
    assert names["embed"] | names["layer.0"] | names["layer.2"] < names["body"]
    assert not names["layer.0"] & names["layer.2"]
    assert all(names.values())
    # a language model may share its output weight with the embeddings
    assert not names["head"] & names["layer.0"]
    if task == "classification":
        assert not names["head"] & names["body"]


def test_a_family_without_a_table(tmp_path, batch):
    config = AlbertConfig(
        vocab_size=37,
        embedding_size=8,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=4,
    )
    AlbertForSequenceClassification(config).save_pretrained(tmp_path)
    info = describe(str(tmp_path))
    assert info.family is None
    assert info.task == "classification"
    assert dict(info.sizes) == {"H": 12, "V": 37, "N": 2, "A": 2, "KV": 2, "D": 6, "F": 16, "C": 4}
    with pytest.raises(TapError) as error:
        resolve_tap(info, "s", [("hidden", (1,))])
    assert error.value.kind == "unavailable"
    assert "albert" in error.value.hint
    assert error.value.taps_here == ["logits", "weight", "module"]
    model = load(info)
    inputs = batch()
    with torch.no_grad():
        taps = Tapper(model, info).run(inputs, [TapPath("logits"), module("albert.pooler")])
        assert torch.equal(taps[TapPath("logits")], model(**inputs).logits)
    assert taps[module("albert.pooler")].shape == (3, 12)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "albert"
