"""Models with a saved adapter of peft: the weights that the library merges, and words where it is not there."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from gkd_dsl.meaning.check import check_text
from gkd_dsl.models.errors import ModelError
from gkd_dsl.runtime.models.adapters import with_adapter
from gkd_dsl.runtime.models.load import load

SPEC = """gkd 1
teacher t = hf("t") {
  adapter = ADAPTER
}
"""


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "t")
    (tmp_path / "lora").mkdir()
    settings = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": None,
        "base_model_name_or_path": "t", "bias": "none", "inference_mode": True,
    }  # fmt: skip
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for layer in range(2):
        for name in ("query", "value"):
            place = f"base_model.model.encoder.layer.{layer}.attention.self.{name}"
            tensors |= {f"{place}.lora_A.weight": torch.randn(2, 8), f"{place}.lora_B.weight": torch.randn(8, 2)}
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    return tmp_path


def checked(folder, adapter='peft("lora")'):
    return check_text(SPEC.replace("ADAPTER", adapter), root=folder)


def by_hand(folder):
    """W + (alpha / r) B A, arXiv 2106.09685, section 4.1."""
    wanted = load_file(folder / "t" / "model.safetensors")
    lora = load_file(folder / "lora" / "adapter_model.safetensors")
    for name in [name for name in lora if name.endswith("lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        product = lora[f"{stem}.lora_B.weight"] @ lora[name]
        wanted[stem.removeprefix("base_model.model.") + ".weight"] += 3.0 * product
    return wanted


def same(model, wanted):
    found = model.state_dict()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in wanted.items())
    assert type(model) is BertModel


def info_of(folder):
    found = checked(folder)
    assert found.diagnostics.ok or {d.code for d in found.diagnostics.errors} == {"E0418"}
    assert len(found.later) == 0
    return found.models["t"].info


class Wrapped:
    """What the two functions of peft that are called do, by hand."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder

    @classmethod
    def from_pretrained(cls, model, folder):
        return cls(model, folder)

    def merge_and_unload(self):
        self.model.load_state_dict(by_hand(Path(self.folder).parent))
        return self.model


def asked(folder, monkeypatch, library):
    plain = load(replace(info_of(folder), build=replace(info_of(folder).build, adapter=None)))
    monkeypatch.setitem(sys.modules, "peft", types.SimpleNamespace(PeftModel=library))
    return with_adapter(plain, info_of(folder).build.adapter, "t")


def test_the_library_is_asked_for_the_merged_model(folder, monkeypatch):
    same(asked(folder, monkeypatch, Wrapped), by_hand(folder))


@pytest.mark.filterwarnings("ignore")
def test_the_merged_weights_are_those_by_hand(folder):
    same(load(info_of(folder)), by_hand(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_merged_weights_are_rounded_once(folder, saved):
    """Held in bf16 they are the nearest numbers to W + (alpha / r) B A, not to a rounded W plus that."""
    file = folder / "t" / "model.safetensors"
    save_file({name: value.to(saved) for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    model, wanted = load(info_of(folder), half=torch.bfloat16), by_hand(folder)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim > 1 else torch.float32)
        assert torch.equal(parameter.bfloat16(), wanted[name].bfloat16()), name


def test_without_the_library_it_says_what_to_install(folder, monkeypatch):
    info = info_of(folder)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert [d.code for d in checked(folder).diagnostics.errors] == ["E0435"]
    with pytest.raises(ModelError, match="peft is not installed") as caught:
        load(info)
    assert caught.value.hint == 'pip install "gkd-dsl[peft]"'


def test_an_adapter_that_does_not_fit(folder, monkeypatch):
    class Other(Wrapped):
        def merge_and_unload(self):
            raise RuntimeError("size mismatch for query\nmore")

    with pytest.raises(ModelError, match='does not fit "t": size mismatch for query'):
        asked(folder, monkeypatch, Other)


@pytest.mark.parametrize(
    ("adapter", "code"), [('peft("nowhere")', "E0501"), ("peft(3)", "E0508"), ('peft("lora", r = 2)', "E0508")]
)
def test_what_the_check_says(folder, adapter, code):
    assert code in {d.code for d in checked(folder, adapter).diagnostics.errors}


def test_only_saved_weights_have_one(folder):
    text = SPEC.replace('hf("t")', 'random_init("t")').replace("ADAPTER", 'peft("lora")')
    assert "E0508" in {d.code for d in check_text(text, root=folder).diagnostics.errors}


def test_no_other_kind(folder):
    found = checked(folder, "prefix(8)")
    assert [d.code for d in found.diagnostics.errors] == ["E0508"]
    assert len(found.later) == 0
