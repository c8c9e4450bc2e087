"""Models that nothing trains, held in bf16: what they give beside the same models in fp32, both under autocast."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, FAMILY_NAMES, batch_of, build

from gkd_dsl.models.describe import describe
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models.halved import halved, saved_in
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.models.tapper import Tapper

EPS = 2.0**-8


def taps_of(info):
    found = [TapPath("hidden", 0), TapPath("hidden", 1), TapPath("hidden", info.size("N")), TapPath("final")]
    found += [TapPath("layer", 0, part) for part in ("out", "attn.scores", "attn.probs", "attn.q", "mlp")]
    if info.task != "encoder":
        found.append(TapPath("logits"))
    return found


def run(model, info, half=True):
    tapper = Tapper(model, info)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        return tapper.run(batch_of(), taps_of(info))


def saved(folder, to, family, task, representable):
    model = build(folder, family, task, seed=3, initializer_range=0.2).model
    if representable:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(to)
    return describe(str(to), task=task)


CASES = [(family, task) for family in FAMILY_NAMES for task in FAMILIES[family].classes]


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_model_of_bf16_numbers_gives_the_same_bits(family, task, folder, tmp_path):
    info = saved(folder, tmp_path, family, task, representable=True)
    found, expected = run(load(info, half=torch.bfloat16), info), run(load(info), info)
    for path, value in expected.items():
        assert found[path].dtype == value.dtype, path
        assert torch.equal(found[path], value), path


@pytest.mark.parametrize(("family", "task"), CASES)
def test_another_is_as_near_as_its_products_in_bf16(family, task, folder, tmp_path):
    info = saved(folder, tmp_path, family, task, representable=False)
    exact = run(load(info), info, half=False)
    found, before = run(load(info, half=torch.bfloat16), info), run(load(info), info)
    mask = batch_of()["attention_mask"].bool()
    for path, value in exact.items():
        if value.ndim == 3:
            value, found[path], before[path] = (x[mask] for x in (value, found[path], before[path]))
        rounding = (before[path].float() - value).norm() + EPS * value.norm()
        assert (found[path].float() - value).norm() <= 1.5 * rounding, path


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_matrices_take_two_bytes_and_vectors_four(family, folder, tmp_path):
    info = saved(folder, tmp_path, family, "encoder", representable=False)
    model, whole = load(info, half=torch.bfloat16), load(info)
    assert halved(model) == torch.bfloat16
    assert halved(whole) is None
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim > 1 else torch.float32), name
        assert torch.equal(parameter.float(), whole.get_parameter(name).bfloat16().float()), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, whole.get_buffer(name)), name


def test_loading_makes_no_copy_in_fp32(folder, tmp_path, monkeypatch):
    info = saved(folder, tmp_path, "llama", "causal_lm", representable=False)
    asked = []
    inner = transformers.LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "from_pretrained",
        lambda *args, **more: asked.append(more["dtype"]) or inner(*args, **more),
    )  # fmt: skip
    load(info, half=torch.bfloat16)
    assert asked == [torch.bfloat16]


def test_what_is_saved_in_bf16(folder, tmp_path):
    info = saved(folder, tmp_path / "a", "bert", "encoder", representable=False)
    assert not saved_in(info, torch.bfloat16)
    load(info).to(torch.bfloat16).save_pretrained(tmp_path / "b")
    assert saved_in(describe(str(tmp_path / "b")), torch.bfloat16)
    assert not saved_in(describe(str(tmp_path / "b")), torch.float16)
    # Norms in fp32 beside matrices in bf16: what is copied from the rounded ones would not be exact.
    file = tmp_path / "b" / "model.safetensors"
    weights = {name: value.float() if value.ndim == 1 else value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert not saved_in(describe(str(tmp_path / "b")), torch.bfloat16)
    assert not saved_in(build(folder, "bert").info, torch.bfloat16)
