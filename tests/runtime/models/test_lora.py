"""Models with LoRA adapters against W + alpha / r B A, written by hand."""

import json
import sys
from dataclasses import replace

import peft
import pytest
import torch
from tiny_models import CASES, CONFIGS, FAMILY_NAMES, batch_of
from torch.func import functional_call
from transformers import AutoModel, AutoModelForSequenceClassification

from gkd_dsl.models.describe import describe, random_init, truncated, with_head
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.info import Lora
from gkd_dsl.models.lora import TARGETS, full_modules
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models import adapters
from gkd_dsl.runtime.models.checkpointing import set_checkpointing
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.models.tapper import Tapper

VARIANTS = [{}, {"rslora": True}, {"dora": True}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    for family, config in CONFIGS.items():
        (folder / family).mkdir()
        (folder / family / "config.json").write_text(json.dumps(config))
    return folder


def plain(place, family, task):
    return random_init(describe(str(place / family)), task=task, num_labels=3 if task == "classification" else None)


def adapted(info, *, r=2, alpha=6.0, dropout=0.0, targets=None, **more):
    lora = Lora(r, alpha, dropout, targets or TARGETS[info.family], **more)
    return replace(info, build=replace(info.build, lora=lora))


def stirred(model):
    """With numbers in B, so that the adapter changes something."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(base, model, lora, transposed):
    """The weights of the base as leaves, and those with W + s B A in their place, from leaves A, B (and m)."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in base.named_parameters()}
    found = dict(leaves)
    own = dict(model.named_parameters())
    for name in [name for name in own if ".lora_A." in name]:
        stem = name.partition(".lora_A.")[0]
        a, b = (own[f"{stem}.lora_{x}.default.weight"].detach().clone().requires_grad_() for x in "AB")
        leaves |= {f"{stem}.lora_A.default.weight": a, f"{stem}.lora_B.default.weight": b}
        scale = lora.alpha / (lora.r**0.5 if lora.rslora else lora.r)
        weight = leaves[f"{stem}.weight"]
        rows = (weight.T if transposed else weight) + scale * b @ a
        if lora.dora:
            m = own[f"{stem}.lora_magnitude_vector.default.weight"].detach().clone().requires_grad_()
            leaves[f"{stem}.lora_magnitude_vector.default.weight"] = m
            rows = m[:, None] * rows / rows.detach().pow(2).sum(1, keepdim=True).sqrt()
        found[f"{stem}.weight"] = rows.T if transposed else rows
    return leaves, found


@pytest.mark.parametrize(("family", "task"), CASES)
def test_it_starts_as_its_base(family, task, place):
    info = plain(place, family, task)
    base, model = load(info, seed=3), load(adapted(info), seed=3)
    assert torch.equal(base(**batch_of())[0], model(**batch_of())[0])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    whole = full_modules(adapted(info))
    assert all(".lora_" in name or any(name.startswith(f"{m}.") for m in whole) for name in trained)
    assert any(".lora_" in name for name in trained)


@pytest.mark.parametrize("more", VARIANTS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "mobilebert"])
def test_the_loss_and_its_gradients_are_those_by_hand(family, more, place):
    info = adapted(plain(place, family, "classification"), **more)
    # In double precision: what MobileBERT computes is large.
    base = load(plain(place, family, "classification"), seed=3).double()
    model = stirred(load(info, seed=3)).double()
    batch, labels = batch_of(), torch.tensor([2, 0, 1])
    leaves, weights = by_hand(base, model, info.build.lora, family == "gpt2")
    wanted = torch.nn.functional.cross_entropy(functional_call(base, weights, (), batch)["logits"], labels)
    wanted.backward()
    loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    assert loss.item() != pytest.approx(torch.nn.functional.cross_entropy(base(**batch).logits, labels).item())
    seen = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        if parameter.grad is None:
            assert leaves[name].grad is None
            continue
        torch.testing.assert_close(parameter.grad, leaves[name].grad, atol=1e-9, rtol=1e-7)
        seen += 1
    assert seen >= 2 * 3


def test_its_first_values_are_those_of_the_seed(place, tmp_path):
    """On saved weights too; the numbers of whoever loads it are left alone, and A is not what a new head starts from."""
    load(plain(place, "bert", "encoder"), seed=7).save_pretrained(tmp_path)
    info = adapted(describe(str(tmp_path), task="encoder"))
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    name = "encoder.layer.0.attention.self.query.lora_A.default.weight"
    first, again, other = (load(info, seed=seed).get_parameter(name) for seed in (3, 3, 5))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dropout_is_for_training_alone(place):
    info = plain(place, "llama", "encoder")
    model = stirred(load(adapted(info, dropout=0.5), seed=3))
    without = stirred(load(adapted(info), seed=3))
    found = model(**batch_of())[0]
    assert torch.equal(found, without(**batch_of())[0])
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(**batch_of())[0], found)
    assert torch.equal(model.eval()(**batch_of())[0], found)


@pytest.mark.parametrize("more", VARIANTS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_merged_it_is_a_plain_model(family, more, place):
    info = adapted(plain(place, family, "classification"), **more)
    model = stirred(load(info, seed=3))
    before, state = model(**batch_of()).logits, {k: v.clone() for k, v in model.state_dict().items()}
    fresh = load(plain(place, family, "classification"), seed=4)
    with adapters.merged(model):
        assert model.state_dict().keys() == fresh.state_dict().keys()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(**batch_of()).logits, before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fresh(**batch_of()).logits, before, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(**batch_of()).logits, before)


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_taps_are_those_of_the_plain_model_also_under_checkpointing(family, place):
    info = adapted(plain(place, family, "classification"))
    model = stirred(load(info, seed=3))
    fresh = load(plain(place, family, "classification"), seed=4)
    with adapters.merged(model):
        fresh.load_state_dict(model.state_dict())
    paths = [TapPath("hidden", 1), TapPath("logits"), *(TapPath("layer", 1, f"attn.{x}") for x in ("scores", "q", "v"))]
    wanted = Tapper(fresh, info).run(batch_of(), paths)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for on in (False, True):
        set_checkpointing(model.train(), on)
        found = Tapper(model, info).run(batch_of(), paths)
        for path in paths:
            torch.testing.assert_close(found[path], wanted[path], atol=1e-5, rtol=1e-4)
        model.zero_grad(set_to_none=True)
        sum(value.square().clamp(max=4.0).mean() for value in found.values()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".lora_A." in name for name in gradients[0])
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-6) for n in gradients[0])


@pytest.mark.parametrize("more", VARIANTS)
@pytest.mark.parametrize(
    ("family", "name"),
    [("bert", "encoder.layer.0.attention.self.query.weight"), ("gpt2", "h.0.attn.c_attn.weight")],
)
def test_a_weight_is_the_one_that_is_used(family, name, more, place):
    info = adapted(plain(place, family, "encoder"), **more)
    model = stirred(load(info, seed=3))
    path = TapPath("weight", None, None, name)
    found = Tapper(model, info).run({}, [path])[path]
    with adapters.merged(model):
        torch.testing.assert_close(found, model.get_parameter(name))
    found.square().sum().backward()
    # Of DoRA the length is a constant of the gradient.
    leaves, weights = by_hand(load(plain(place, family, "encoder"), seed=3), model, info.build.lora, family == "gpt2")
    weights[name].square().sum().backward()
    seen = [(own, leaves[n].grad) for n, p in model.named_parameters() if (own := p.grad) is not None]
    assert len(seen) == 2 + info.build.lora.dora
    for own, theirs in seen:
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)
    bias = TapPath("weight", None, None, name.replace(".weight", ".bias"))
    assert torch.equal(Tapper(model, info).run({}, [bias])[bias], model.get_parameter(bias.name))


def test_a_copy_of_a_model_with_adapters_starts_from_what_they_made_of_it(place):
    base = adapted(plain(place, "bert", "masked_lm"))
    model = stirred(load(base, seed=3))
    short = load(truncated(base, "m", layers=[0, 2]), models={"m": model})
    assert not adapters.adapted(short)
    with adapters.merged(model):
        expected = {n: v.clone() for n, v in model.state_dict().items()}
    found = short.state_dict()
    for mine, theirs in ((0, 0), (1, 2)):
        name = "bert.encoder.layer.{}.attention.self.query.weight"
        assert torch.equal(found[name.format(mine)], expected[name.format(theirs)])
    headed = load(with_head(base, "m", task="classification", num_labels=2), models={"m": model})
    name = "bert.encoder.layer.1.attention.self.value.weight"
    assert torch.equal(headed.state_dict()[name], expected[name])


@pytest.mark.parametrize("make", ["truncated", "headed"])
def test_models_made_here_have_adapters_too(make, place):
    base = plain(place, "bert", "masked_lm")
    model = load(base, seed=3)
    info = {
        "truncated": lambda: truncated(base, "m", layers=[1]),
        "headed": lambda: with_head(base, "m", task="classification", num_labels=2),
    }[make]()
    below = load(info, models={"m": model}, seed=5)
    found = load(adapted(info), models={"m": model}, seed=5)
    assert torch.equal(found(**batch_of())[0], below(**batch_of())[0])
    assert len(adapters._layers(found)) == 2 * info.size("N")


def test_a_pooler_and_a_head_train_whole_where_they_are_new(place, tmp_path):
    def trained(architecture, task, family="bert"):
        config = {**CONFIGS[family], "architectures": [architecture]}
        (tmp_path / architecture).mkdir(exist_ok=True)
        (tmp_path / architecture / "config.json").write_text(json.dumps(config))
        return full_modules(describe(str(tmp_path / architecture), task=task))

    assert trained("BertForMaskedLM", "classification") == ("classifier", "bert.pooler")
    assert trained("BertForPreTraining", "classification") == ("classifier",)
    assert trained("BertForSequenceClassification", "classification") == ("classifier",)
    assert trained("BertForMaskedLM", "masked_lm") == ()
    assert trained("BertModel", "masked_lm") == ("cls",)
    assert trained("BertModel", "encoder") == ()
    assert trained("BertForMaskedLM", "encoder") == ("pooler",)
    assert trained("LlamaForCausalLM", "causal_lm", "llama") == ()
    assert trained("LlamaModel", "causal_lm", "llama") == ("lm_head",)
    assert trained("LlamaForCausalLM", "classification", "llama") == ("score",)


def test_a_new_pooler_trains_and_one_that_was_saved_does_not(place, tmp_path):
    for task, pooler in (("masked_lm", True), ("classification", False)):
        load(plain(place, "bert", task), seed=7).save_pretrained(tmp_path / task)
        model = load(adapted(describe(str(tmp_path / task), task="classification", num_labels=3)))
        whole = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
        new = {f"bert.pooler.dense.{part}" for part in ("weight", "bias")} if pooler else set()
        assert whole == new | {"classifier.weight", "classifier.bias"}


def test_a_family_without_a_table(tmp_path):
    config = {
        "model_type": "opt", "vocab_size": 37, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "ffn_dim": 16, "word_embed_proj_dim": 8, "max_position_embeddings": 16, "pad_token_id": 0,
        "architectures": ["OPTForCausalLM"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    info = random_init(describe(str(tmp_path)))
    model = load(adapted(info, targets=("q_proj", "fc1")), seed=3)
    assert len(adapters._layers(model)) == 4
    assert torch.equal(model(**batch_of()).logits, load(info, seed=3)(**batch_of()).logits)
    with pytest.raises(ModelError, match="no linear map q_porj") as caught:
        load(adapted(info, targets=("q_porj",)))
    assert caught.value.near[0] == "q_proj"
    labelled = random_init(describe(str(tmp_path)), task="classification", num_labels=3)
    found = load(adapted(replace(labelled, architecture="OPTForSequenceClassification"), targets=("q_proj",)))
    assert [n for n, p in found.named_parameters() if p.requires_grad and ".lora_" not in n] == ["score.weight"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("family", "task"), [(f, t) for f, t in CASES if t in ("classification", "encoder")])
def test_written_alone_it_is_read_by_the_library(family, task, place, tmp_path):
    load(plain(place, family, "encoder"), seed=7).save_pretrained(tmp_path / "base")
    info = adapted(describe(str(tmp_path / "base"), task=task, num_labels=3 if task == "classification" else None))
    model = stirred(load(info, seed=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" not in name:
                parameter.add_(0.3)
    (tmp_path / "alone").mkdir()
    where, told = adapters.write(model, info, tmp_path / "alone")
    loader = AutoModelForSequenceClassification if task == "classification" else AutoModel
    again = peft.PeftModel.from_pretrained(loader.from_pretrained(where, **told), tmp_path / "alone").eval()
    wanted = model(**batch_of())[0]
    again.config.pad_token_id = again.base_model.model.config.pad_token_id = model.config.pad_token_id
    torch.testing.assert_close(again(**batch_of())[0], wanted, atol=1e-5, rtol=1e-4)
    plain_base = loader.from_pretrained(where, **told).eval()
    plain_base.config.pad_token_id = model.config.pad_token_id
    assert not torch.allclose(plain_base(**batch_of())[0], wanted, atol=1e-3)


def test_where_the_base_is(place):
    info = plain(place, "bert", "classification")
    assert adapters.base_of(info) == (str(place / "bert"), None)
    hub = replace(info, location="acme/small@v2", path="/cache/models--acme--small/snapshots/0123")
    assert adapters.base_of(hub) == ("acme/small", "v2")
    assert adapters.base_of(replace(hub, location="acme/small")) == ("acme/small", None)


def test_what_peft_tells_while_it_is_imported_is_not_passed_on(tmp_path, monkeypatch, caplog):
    (tmp_path / "peft.py").write_text("import logging\nlogging.getLogger('bitsandbytes').warning('no kernels')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "peft")
    assert adapters._library("s").__file__ == str(tmp_path / "peft.py")
    assert not caplog.records
