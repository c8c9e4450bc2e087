"""MobileBERT's bottlenecks: sizes, the inverted bottleneck of its teacher, and what a saved config may say."""

import json

import pytest
import torch
import transformers

from gkd_dsl.models.describe import describe, random_init, truncated
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models.load import config_of, load
from gkd_dsl.runtime.models.tapper import Tapper

# IB-BERT of the paper, made small: the inside is wider than the residual stream, one feed-forward network, no
# bottleneck shared by query and key, norms in place of NoNorm, GELU in place of ReLU.
INVERTED = {
    "intra_bottleneck_size": 40, "key_query_shared_bottleneck": False, "use_bottleneck_attention": True,
    "num_feedforward_networks": 1, "normalization_type": "layer_norm", "hidden_act": "gelu",
}  # fmt: skip


@pytest.mark.parametrize("task", ["encoder", "masked_lm", "classification"])
def test_the_inverted_bottleneck_teacher_is_a_config_of_the_same_class(make, batch, close, task):
    teacher, student = make("mobilebert", task, **INVERTED), make("mobilebert", task)
    inputs, mask = batch(), batch()["attention_mask"]
    assert [teacher.info.size(name) for name in "HNAID"] == [20, 3, 4, 40, 10]
    assert [student.info.size(name) for name in "HNAID"] == [20, 3, 4, 12, 3]
    for tiny in (teacher, student):
        paths = [TapPath("hidden", k) for k in range(4)] + [TapPath("layer", i, "attn.probs") for i in range(3)]
        with torch.no_grad():
            taps = tiny.tapper.run(inputs, paths)
            tiny.model.set_attn_implementation("eager")
            read = tiny.model(**inputs, output_hidden_states=True, output_attentions=True)
        for k in range(4):
            close(taps[TapPath("hidden", k)], read.hidden_states[k], mask)
        for i in range(3):
            close(taps[TapPath("layer", i, "attn.probs")], read.attentions[i], mask, (2,))


def test_without_bottleneck_the_inside_is_as_wide_as_the_stream(make, batch):
    tiny = make("mobilebert", use_bottleneck=False)
    assert (tiny.info.size("I"), tiny.info.size("D")) == (None, 5)
    path = TapPath("layer", 1, "mlp")
    assert tiny.tapper.run(batch(), [path])[path].shape == (3, 7, 20)


def test_what_the_config_class_computes_is_not_read_from_a_file(tmp_path):
    """A saved config says `true_hidden_size`; another bottleneck asked for in the spec must not meet the old one."""
    model = transformers.MobileBertModel(
        transformers.MobileBertConfig(
            vocab_size=37, hidden_size=20, embedding_size=8, intra_bottleneck_size=12, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=28,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["true_hidden_size"] == 12
    loaded = load(describe(str(tmp_path)))
    assert torch.equal(
        loaded.encoder.layer[0].attention.self.query.weight, model.encoder.layer[0].attention.self.query.weight
    )
    info = random_init(describe(str(tmp_path)), overrides={"intra_bottleneck_size": 16})
    assert config_of(info).true_hidden_size == 16
    assert load(info).encoder.layer[0].attention.self.query.weight.shape == (16, 16)
    with pytest.raises(ModelError, match="no field true_hidden_size"):
        random_init(describe(str(tmp_path)), overrides={"true_hidden_size": 16})


def test_a_bottleneck_that_the_heads_do_not_divide(folder, tmp_path):
    config = json.loads((folder / "mobilebert" / "config.json").read_text()) | {"intra_bottleneck_size": 14}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"intra_bottleneck_size = 14 .*not divisible by num_attention_heads = 4"):
        describe(str(tmp_path))


def test_a_truncated_mobilebert_keeps_its_blocks(make, batch):
    tiny = make("mobilebert")
    info = truncated(tiny.info, "t", layers=[0, 2])
    cut = load(info, models={"t": tiny.model})
    first = TapPath("hidden", 1)
    inputs = batch()
    assert torch.equal(Tapper(cut, info).run(inputs, [first])[first], tiny.tapper.run(inputs, [first])[first])
    mine, theirs = cut.encoder.layer[1].state_dict(), tiny.model.encoder.layer[2].state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
