"""Scores and probabilities come from the tapped layers alone; the output is as before."""

import copy

import pytest
import torch
from tiny_models import FAMILY_NAMES, at_tokens

from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models import attention
from gkd_dsl.runtime.models.attention import attend

SCORES, PROBS = TapPath("layer", 1, "attn.scores"), TapPath("layer", 1, "attn.probs")


@pytest.fixture
def sdpa_calls(monkeypatch):
    calls = []
    original = attention.sdpa_attention_forward

    def spy(module, *args, **kwargs):
        calls.append(module)
        return original(module, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    return calls


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_other_layers_keep_sdpa(make, batch, sdpa_calls, family):
    tiny = make(family)
    tiny.tapper.run(batch(), [SCORES, TapPath("hidden", 3)])
    assert sdpa_calls == [tiny.attentions[0], tiny.attentions[2]]


def test_a_layer_that_was_tapped_has_sdpa_again(make, batch, sdpa_calls):
    tiny = make("bert")
    tiny.tapper.run(batch(), [SCORES, TapPath("hidden", 3)])
    sdpa_calls.clear()
    tiny.tapper.run(batch(), [TapPath("layer", 0, "attn.scores"), TapPath("hidden", 3)])
    assert sdpa_calls == [tiny.attentions[1], tiny.attentions[2]]


def test_without_score_taps_our_function_is_not_there(make, batch, sdpa_calls):
    tiny = make("bert")
    tiny.tapper.run(batch(), [TapPath("layer", 1, "attn.q"), TapPath("hidden", 3)])
    assert sdpa_calls == []


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_output_is_as_without_the_taps(make, batch, close, family, side):
    tiny = make(family)
    inputs = batch(side)
    scored = [TapPath("layer", i, "attn.scores") for i in range(3)]
    with torch.no_grad():
        plain = tiny.tapper.run(inputs, [TapPath("hidden", 3)])[TapPath("hidden", 3)]
        tapped = tiny.tapper.run(inputs, [*scored, TapPath("hidden", 3)])[TapPath("hidden", 3)]
    close(tapped, plain)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_dropout_in_training_is_that_of_eager(make, batch, close, family):
    decoders = ("llama", "mistral", "qwen2", "qwen3")
    tiny = make(family, **({"attention_dropout": 0.3} if family in decoders else {}))
    eager = copy.deepcopy(tiny.model)
    eager.set_attn_implementation("eager")
    for model in (tiny.model, eager):
        model.train()
    paths = [TapPath("layer", i, "attn.probs") for i in range(3)] + [TapPath("hidden", 2)]
    inputs = batch()
    torch.manual_seed(5)
    taps = tiny.tapper.run(inputs, paths)
    torch.manual_seed(5)
    output = eager(**inputs, output_hidden_states=True)
    close(taps[TapPath("hidden", 2)], output.hidden_states[2], inputs["attention_mask"])
    # it did drop something
    tiny.model.eval()
    assert not torch.equal(tiny.tapper.run(inputs, paths[3:])[paths[3]], taps[paths[3]])


@pytest.mark.parametrize("family", ["bert", "llama", "mistral"])
def test_an_eager_model_stays_eager(make, batch, close, family, sdpa_calls):
    tiny = make(family)
    inputs = batch()
    with torch.no_grad():
        before = tiny.tapper.run(inputs, [SCORES, PROBS])
        tiny.model.set_attn_implementation("eager")
        sdpa_calls.clear()
        after = tiny.tapper.run(inputs, [SCORES, PROBS])
    assert sdpa_calls == []
    assert tiny.model.config._attn_implementation == "eager"
    close(after[SCORES], before[SCORES], inputs["attention_mask"], (2, 3))
    close(after[PROBS], before[PROBS], inputs["attention_mask"], (2,))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_bf16_autocast(make, batch, family):
    tiny = make(family)
    inputs = batch()
    mask = inputs["attention_mask"]
    with torch.no_grad():
        exact = tiny.tapper.run(inputs, [SCORES, PROBS])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = tiny.tapper.run(inputs, [SCORES, PROBS])
    assert rounded[PROBS].dtype == torch.float32
    sums = at_tokens(rounded[PROBS], mask, 2).sum(-1)
    torch.testing.assert_close(sums, mask[:, None, :].expand_as(sums).float())
    difference = at_tokens(rounded[PROBS] - exact[PROBS], mask, 2)
    assert 0 < difference.abs().max() < 0.15


def test_every_tapped_row_of_padding_keys_is_zero(make, batch):
    tiny = make("bert")
    inputs = batch()
    with torch.no_grad():
        probs = tiny.tapper.run(inputs, [PROBS])[PROBS]
    assert probs[1, :, :, 4:].abs().max() == 0


def test_attend_by_hand():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 4, 6, generator=generator) for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 4, 4, generator=generator) > 0.3
    mask[0, 0, 1] = False
    seen = {}
    module = torch.nn.Module().eval()
    output, _ = attend(module, q, k, v, mask, scaling=0.5, softcap=2.0, record=seen.__setitem__)
    for b in range(2):
        for head in range(4):
            for i in range(4):
                row = torch.stack([q[b, head, i] @ k[b, head // 2, j] * 0.5 for j in range(4)])
                row = 2.0 * torch.tanh(row / 2.0)
                torch.testing.assert_close(seen["scores"][b, head, i], row)
                keep = mask[b, 0, i]
                weights = torch.zeros(4)
                if keep.any():
                    weights[keep] = torch.softmax(row[keep], 0)
                torch.testing.assert_close(seen["probs"][b, head, i], weights)
                torch.testing.assert_close(output[b, i, head], weights @ v[b, head // 2])


def test_attend_is_causal_without_a_mask():
    module = torch.nn.Module().eval()
    q = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    seen = {}
    output, _ = attend(module, q, q, q, None, is_causal=True, record=seen.__setitem__)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.testing.assert_close(output.transpose(1, 2), expected)
    assert seen["probs"].triu(1).abs().max() == 0
    assert seen["scores"].triu(1).abs().max() > 0
