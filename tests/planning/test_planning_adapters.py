"""Parameters with adapters, and what is trained of them, against models into which the library has put them."""

import math
from dataclasses import replace

import pytest

from gkd_dsl.models.describe import describe
from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.info import Lora
from gkd_dsl.models.lora import LINEAR, TARGETS, selected_modules, target_names
from gkd_dsl.planning.parameters import parameters, part, trained
from gkd_dsl.runtime.models.adapters import trainable, with_lora
from gkd_dsl.runtime.models.load import build, part_parameters

CASES = [(family, task, {}) for family, table in FAMILIES.items() for task in table.classes]
CASES += [
    ("llama", "causal_lm", {"architectures": ["LlamaForCausalLM"]}),
    ("llama", "causal_lm", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", "classification", {"head_dim": 10}),
    ("bert", "classification", {"architectures": ["BertForMaskedLM"]}),
    ("bert", "classification", {"architectures": ["BertForPreTraining"]}),
    ("bert", "masked_lm", {"tie_word_embeddings": False}),
    ("gpt2", "causal_lm", {"tie_word_embeddings": False}),
    ("mobilebert", "masked_lm", {"key_query_shared_bottleneck": False}),
]


def adapted(place, task, targets, **more):
    info = describe(place, task=task, num_labels=5 if task == "classification" else None)
    return replace(info, build=replace(info.build, lora=Lora(3, 6.0, 0.0, targets, **more)))


@pytest.mark.parametrize(("family", "task", "changes"), CASES)
@pytest.mark.parametrize("every", [False, True])
def test_names_shapes_and_what_is_trained_are_those_of_the_model(family, task, changes, every, save):
    targets = tuple(name for name in target_names(family) if "." not in name) if every else TARGETS[family]
    info = adapted(save(family, **changes), task, targets, dora=every)
    model = with_lora(build(info), info)
    assert dict(parameters(info).shapes) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in (None, "embed", "layer.1", "body", *(["head"] if task != "encoder" else [])):
        named = list(model.named_parameters()) if name is None else part_parameters(model, selected_modules(info, name))
        expected = {n: tuple(p.shape) for n, p in trainable(model, named)}
        assert dict(trained(info, name).shapes) == expected, name
        assert trained(info, name).count == sum(math.prod(shape) for shape in expected.values())
    gradients = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients == set(dict(trained(info, None).shapes))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_maps_of_a_block_are_those_of_its_class(family, save):
    info = describe(save(family), task="encoder")
    model = build(info)
    block = model.base_model.get_submodule(f"{FAMILIES[family].blocks}.1")
    found = {name for name, module in block.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    numbered = {path.replace(".i.", f".{k}.") for path in LINEAR[family] for k in range(2)}
    # The shared bottleneck of keys and queries is there where the config says so.
    assert found == numbered & found
    assert {path for path in numbered if ".1." not in path} - found <= {"bottleneck.attention.dense"}


def test_without_adapters_it_is_the_part(save):
    info = describe(save("bert"), task="classification", num_labels=5)
    for name in (None, "embed", "layer.1", "body", "head"):
        assert trained(info, name) == part(info, name)


def test_a_family_without_a_table_is_an_approximation(save):
    place = save("opt", hidden_size=8, vocab_size=11, num_hidden_layers=2, num_attention_heads=2)
    info = adapted(place, "encoder", ("q_proj", "v_proj"))
    assert trained(info, None).count == 2 * 2 * (3 * 8 + 8 * 3)
    assert not trained(info, None).exact
