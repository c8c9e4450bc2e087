"""`placement = gemini`: the taps of a teacher in memory, bit for bit, of which each process holds its part."""

import json

import pytest
import torch
from chunk_taps import FAMILIES, KINDS
from forked import GEMINI
from ranks import HERE, started
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

pytestmark = pytest.mark.gemini
COUNTS = (1, 2)


def write(folder):
    """A model a family: a classifier, a language model with a head of its own, one whose head is its embeddings."""
    more = {"vocab_size": 45, "initializer_range": 0.3, "pad_token_id": 0}
    made = {
        "bert": BertForSequenceClassification(
            BertConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, num_labels=3, intermediate_size=48,
                       max_position_embeddings=40, **more)
        ),
        "llama": LlamaForCausalLM(
            LlamaConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
                        intermediate_size=48, max_position_embeddings=40, tie_word_embeddings=False, **more)
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_positions=40, n_embd=24, n_layer=3, n_head=2, **more)),
    }  # fmt: skip
    for number, (name, model) in enumerate(made.items()):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process of one and of two saw."""
    folder = tmp_path_factory.mktemp("chunks")
    write(folder)
    seen = {}
    for count in COUNTS:
        processes = started(count, HERE / "chunk_taps.py", folder / str(count), folder, modules=GEMINI)
        assert [process.wait(300) for process in processes] == [0] * count
        seen[count] = [json.loads((folder / f"{count}.{rank}").read_text()) for rank in range(count)]
    return seen


@pytest.mark.parametrize("way", ["files", "whole", "half", "device"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", COUNTS)
def test_taps_are_those_of_the_model_in_bf16(found, count, family, way):
    for seen in found[count]:
        one = seen[f"{family}/{way}"]
        assert one["same"] == dict.fromkeys(KINDS, True)
        assert one["stopped"]
        # To the rounding of bf16 those of the fp32 model: 2^-8 a rounding, some dozens of them.
        assert max(one["off"].values()) < 0.1
        assert one["let go"]
        assert one["buffers"] in ([], ["torch.float32"])


@pytest.mark.parametrize("way", ["files", "whole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_holds_its_part(found, family, way):
    """Half of it in each of two processes, before and after; in between its part and some chunks."""
    chunks = found[1][0][f"{family}/{way}"]["chunks"]
    assert chunks >= 4
    for count in COUNTS:
        for seen in found[count]:
            one = seen[f"{family}/{way}"]
            first, *between, last = one["held"]
            assert first == last
            assert one["gathered"] == one["on the device"] == 0
            # The last chunk is not full.
            assert one["whole"] / count <= first < one["whole"] / count * (1 + 2 / chunks)
            assert len(between) == 2 + 3
            assert max(between) < first + 0.6 * one["whole"]
            # A whole chunk takes more than the parts of it.
            assert (max(between) > first) == (count > 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_share_is_whole_in_every_process(found, family):
    """`shard_param_frac = 0.5`: half of the chunks, as far as there are whole ones; they stay between forwards."""
    for count in COUNTS:
        for seen in found[count]:
            one = seen[f"{family}/half"]
            chunks, chunk = one["chunks"], seen[f"{family}/files"]["held"][0] * count / one["chunks"]
            assert one["gathered"] == chunks // 2
            first, *_, last = one["held"]
            assert first == last == chunk * (chunks // 2 + (chunks - chunks // 2) / count)
            assert one["on the device"] == chunks


@pytest.mark.parametrize("family", FAMILIES)
def test_a_share_of_the_parts_stays_on_the_device(found, family):
    """`offload_param_frac = 0.5`."""
    for count in COUNTS:
        for seen in found[count]:
            one = seen[f"{family}/device"]
            assert one["held"][0] == one["held"][-1] == seen[f"{family}/files"]["held"][0]
            assert one["gathered"] == 0
            assert one["on the device"] == one["chunks"] // 2
