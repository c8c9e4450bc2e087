"""Names and shapes of parameters against transformers' own models on the meta device."""

import math

import pytest
import torch

from gkd_dsl.graph.nodes import OptimSpec, PolicyNode, ProjectNode
from gkd_dsl.graph.plan import PolicyPlan
from gkd_dsl.models.describe import describe
from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.resolve import part_modules
from gkd_dsl.planning.parameters import parameters, part, policy, projection
from gkd_dsl.runtime.models.load import build, part_parameters
from gkd_dsl.runtime.policy import make_policies

CASES = [(family, task, {}) for family, table in FAMILIES.items() for task in table.classes]
CASES += [(f, t, {"tie_word_embeddings": False}) for f, t, _ in CASES if t in ("masked_lm", "causal_lm")]
CASES += [(f, "causal_lm", {"tie_word_embeddings": True}) for f in ("llama", "mistral", "qwen2", "qwen3")]
CASES += [
    ("llama", "causal_lm", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "encoder", {"head_dim": 8, "num_key_value_heads": 1}),
    ("qwen3", "causal_lm", {"attention_bias": True, "head_dim": 10}),
    ("mistral", "classification", {"num_key_value_heads": 4}),
    ("gpt2", "causal_lm", {"n_inner": None, "n_positions": 17}),
    ("mobilebert", "masked_lm", {"key_query_shared_bottleneck": False}),
    ("mobilebert", "classification", {"use_bottleneck_attention": True, "classifier_activation": False}),
    ("mobilebert", "encoder", {"use_bottleneck": False, "trigram_input": False, "num_feedforward_networks": 1}),
]


def meta(info):
    with torch.device("meta"):
        return build(info)


@pytest.mark.parametrize(("family", "task", "changes"), CASES)
def test_names_and_shapes_are_those_of_the_model(family, task, changes, save):
    info = describe(save(family, **changes), task=task, num_labels=5 if task == "classification" else None)
    model = meta(info)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = parameters(info)
    assert dict(found.shapes) == expected
    assert found.exact
    assert found.count == sum(math.prod(shape) for shape in expected.values())
    for name in ("embed", "layer.1", "body", *(["head"] if task != "encoder" else [])):
        counted = sum(p.numel() for _, p in part_parameters(model, part_modules(info, name)))
        assert part(info, name).count == counted, name


PUBLISHED = {
    "Llama-3.1-8B": ("llama", 4096, 32, 32, 14336, 128256, False, 8_030_261_248),
    "Llama-3.1-70B": ("llama", 8192, 80, 64, 28672, 128256, False, 70_553_706_496),
    "Llama-3.1-405B": ("llama", 16384, 126, 128, 53248, 128256, False, 405_853_388_800),
    "Qwen3-1.7B": ("qwen3", 2048, 28, 16, 6144, 151936, True, 1_720_574_976),
    "Qwen3-8B": ("qwen3", 4096, 36, 32, 12288, 151936, False, 8_190_735_360),
    "Qwen3-32B": ("qwen3", 5120, 64, 64, 25600, 151936, False, 32_762_123_264),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_large_models_have_as_many_parameters_as_is_published(name, save):
    family, width, layers, heads, inner, words, tied, count = PUBLISHED[name]
    place = save(
        family, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        head_dim=128, intermediate_size=inner, vocab_size=words, tie_word_embeddings=tied,
    )  # fmt: skip
    assert parameters(describe(place, task="causal_lm")).count == count


def test_a_family_without_a_table_is_an_approximation(save):
    info = describe(
        save("opt", hidden_size=8, vocab_size=11, num_hidden_layers=2, num_attention_heads=2), task="encoder"
    )
    found = parameters(info)
    assert not found.exact
    assert found.count == 11 * 8 + 2 * 12 * 64
    assert part(info, "layer.0").count == found.count


@pytest.mark.parametrize("hidden", [0, 7])
def test_projections_and_policies(hidden):
    assert projection(ProjectNode("project/W", "W", 4, 3)) == 15
    assert projection(ProjectNode("project/W", "W", 4, 3, bias=False)) == 12
    node = PolicyNode("policy/pi", "pi", 3, 5, hidden, OptimSpec())
    made = make_policies([PolicyPlan("op/policy", node, "r")], torch.device("cpu"))["pi"]
    assert policy(node) == sum(p.numel() for p in made.selector.parameters())
