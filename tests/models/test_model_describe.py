import pytest

from gkd_dsl.models.describe import describe, formal, random_init, truncated
from gkd_dsl.models.errors import ModelError

SIZES = {
    "bert": {"H": 20, "V": 37, "N": 3, "A": 4, "KV": 4, "D": 5, "F": 28},
    "roberta": {"H": 20, "V": 37, "N": 3, "A": 4, "KV": 4, "D": 5, "F": 28},
    "distilbert": {"H": 20, "V": 37, "N": 3, "A": 4, "KV": 4, "D": 5, "F": 28},
    "gpt2": {"H": 20, "V": 37, "N": 3, "A": 4, "KV": 4, "D": 5, "F": 28},
    "llama": {"H": 24, "V": 37, "N": 3, "A": 4, "KV": 2, "D": 6, "F": 28},
    "mistral": {"H": 24, "V": 37, "N": 3, "A": 4, "KV": 2, "D": 10, "F": 28},
    "qwen2": {"H": 24, "V": 37, "N": 3, "A": 4, "KV": 2, "D": 6, "F": 28},
    "qwen3": {"H": 24, "V": 37, "N": 3, "A": 4, "KV": 1, "D": 8, "F": 28},
}


def failure(call, *args, **kwargs):
    with pytest.raises(ModelError) as error:
        call(*args, **kwargs)
    return error.value


@pytest.mark.parametrize("family", SIZES)
def test_sizes(save, family):
    info = describe(save(family))
    assert dict(info.sizes) == SIZES[family]
    assert (info.family, info.task, info.vocabulary) == (family, "encoder", None)
    assert info.build.kind == "hf"
    dim = info.dim("H", "s")
    assert dim.name == "s.H"
    assert dict(info.size_fields)["H"] in dim.origin


def test_what_a_config_leaves_out_is_the_default_of_its_class(save):
    assert describe(save("bert", hidden_size=..., num_attention_heads=...)).size("H") == 768
    assert describe(save("gpt2", n_inner=...)).size("F") == 80
    assert describe(save("gpt2", n_inner=None)).size("F") == 80
    assert describe(save("llama", num_key_value_heads=...)).size("KV") == 4
    assert describe(save("mistral", num_key_value_heads=..., num_attention_heads=16, hidden_size=64)).size("KV") == 8
    assert describe(save("qwen3", head_dim=...)).size("D") == 128


def test_other_spellings(save):
    info = describe(save("distilbert", dim=..., hidden_size=32, n_layers=..., num_hidden_layers=2))
    assert (info.size("H"), info.size("N")) == (32, 2)
    assert dict(info.size_fields)["H"] == "hidden_size"
    changed = random_init(info, overrides={"dim": 40, "num_hidden_layers": 5})
    assert (changed.size("H"), changed.size("N")) == (40, 5)


@pytest.mark.parametrize(
    ("saved", "task"),
    [
        ("BertModel", "encoder"),
        ("BertForSequenceClassification", "classification"),
        ("BertForMaskedLM", "masked_lm"),
        ("BertForPreTraining", "masked_lm"),
        ("BertLMHeadModel", "causal_lm"),
    ],
)
def test_the_task_is_that_of_the_saved_class(save, saved, task):
    info = describe(save("bert", architectures=[saved]))
    assert info.task == task
    assert info.causal == (task == "causal_lm")
    assert info.has_pooler == (task in ("encoder", "classification"))
    assert (info.size("C") == 2) == (task == "classification")


def test_labels(save):
    classifier = {"architectures": ["RobertaForSequenceClassification"]}
    assert describe(save("roberta", **classifier)).size("C") == 2
    assert describe(save("roberta", num_labels=6, **classifier)).size("C") == 6
    named = describe(save("roberta", id2label={"0": "bad", "1": "fine", "2": "good"}, **classifier))
    assert named.size("C") == 3
    assert describe(named.path, num_labels=3).config["id2label"]["0"] == "bad"
    other = describe(named.path, num_labels=5)
    assert other.size("C") == 5
    assert other.config["id2label"]["4"] == "LABEL_4"
    assert dict(other.build.overrides) == {"num_labels": 5}


def test_labels_ask_for_a_classifier(save):
    info = describe(save("bert"), num_labels=4)
    assert (info.task, info.architecture, info.size("C")) == ("classification", "BertForSequenceClassification", 4)
    assert describe(save("llama", architectures=["LlamaForCausalLM"]), num_labels=4).task == "classification"


def test_task_and_label_errors(save):
    folder = save("bert")
    assert failure(describe, folder, task="clasification").near == ["classification"]
    assert "num_labels is for a classifier" in failure(describe, folder, task="masked_lm", num_labels=2).reason
    for count in (0, -1, 2.5, True):
        assert "whole number from 1" in failure(describe, folder, num_labels=count).reason
    assert "no masked_lm head" in failure(describe, save("llama"), task="masked_lm").reason
    error = failure(describe, save("bert", "qa", architectures=["BertForQuestionAnswering"]))
    assert "BertForQuestionAnswering" in error.reason
    assert 'task = "encoder"' in error.hint
    assert describe(save("bert", "qa", architectures=["BertForQuestionAnswering"]), task="encoder").task == "encoder"


@pytest.mark.parametrize("value", [0, -3, "x", 2.5, True])
def test_sizes_are_positive_whole_numbers(save, value):
    error = failure(describe, save("bert", num_hidden_layers=value))
    assert "config `num_hidden_layers`" in error.reason


def test_an_encoder_family_as_a_causal_model(save):
    assert describe(save("bert"), task="causal_lm").config["is_decoder"] is True
    assert "is_decoder" not in describe(save("bert"), task="masked_lm").config


def test_overrides(save):
    info = describe(save("bert"), overrides={"hidden_dropout_prob": 0.3})
    assert info.config["hidden_dropout_prob"] == 0.3
    assert dict(info.build.overrides) == {"hidden_dropout_prob": 0.3}
    error = failure(describe, info.path, overrides={"hiden_dropout_prob": 0.3})
    assert error.near[0] == "hidden_dropout_prob"
    assert "has no field" in failure(describe, info.path, overrides={"zzz": 1}).reason
    assert "not a text" in failure(describe, info.path, overrides={"hidden_size": "12"}).reason
    assert "true or false" in failure(describe, info.path, overrides={"is_decoder": 1}).reason
    assert "whole number" in failure(describe, info.path, overrides={"hidden_size": 12.5}).reason


def test_fields_that_do_not_fit(save):
    bert = describe(save("bert"))
    error = failure(random_init, bert, overrides={"hidden_size": 22})
    assert "22" in error.reason
    assert "divisible" in error.reason
    assert error.hint == "20 or 24 is"
    llama = describe(save("llama"))
    assert "num_key_value_heads = 3" in failure(random_init, llama, overrides={"num_key_value_heads": 3}).reason
    assert "odd" in failure(random_init, llama, overrides={"hidden_size": 20}).reason


def test_random(save):
    base = describe(save("qwen2"))
    info = random_init(base, overrides={"num_hidden_layers": 5, "hidden_size": 32})
    assert (info.size("N"), info.size("H"), info.size("D")) == (5, 32, 8)
    assert info.build.kind == "random"
    assert info.build.path == base.path
    assert base.size("N") == 3
    assert random_init(save("bert"), num_labels=2).task == "classification"
    labelled = random_init(describe(save("bert"), num_labels=7))
    assert (labelled.task, labelled.size("C")) == ("classification", 7)
    assert random_init(describe(save("bert"), num_labels=7), task="encoder").size("C") is None


def test_a_list_with_an_entry_a_layer_follows_the_depth(save):
    base = describe(save("qwen3", layer_types=["full_attention", "sliding_attention", "full_attention"]))
    deeper = random_init(base, overrides={"num_hidden_layers": 5})
    assert deeper.config["layer_types"] == ["full_attention", "sliding_attention", *["full_attention"] * 3]
    assert truncated(base, "t", layers=[1]).config["layer_types"] == ["sliding_attention"]


def test_truncated(save):
    base = describe(save("bert"), num_labels=4)
    info = truncated(base, "t", layers=[0, -1])
    assert info.size("N") == 2
    assert (info.task, info.size("C")) == ("classification", 4)
    assert (info.build.kind, info.build.base, info.build.layers) == ("truncated", "t", (0, 2))
    assert truncated(base, "t", layers=[1], task="encoder").size("C") is None
    assert truncated(base, "t", layers=[1], num_labels=9).size("C") == 9
    assert truncated(describe(save("bert")), "t", layers=[1], num_labels=2).architecture.endswith("Classification")
    again = truncated(info, "u", layers=[1])
    assert (again.size("N"), again.build.base) == (1, "u")
    assert "keeps no layer" in failure(truncated, base, "t", layers=[]).reason
    error = failure(truncated, base, "t", layers=[0, 3])
    assert "no layer 3" in error.reason
    assert "0 to 2" in error.hint
    assert "without a table" in failure(truncated, describe(save("albert")), "t", layers=[0]).reason


def test_formal():
    info = formal("s")
    assert info.formal
    assert info.path is None
    assert info.size("H") is None
    assert info.dim("H", "s").name == "s.H"
    assert truncated(info, "s", layers=[0]).formal
    assert random_init(info).formal


def test_an_unknown_family_has_the_usual_sizes(save):
    info = describe(save("newmodel", hidden_size=12, num_hidden_layers=2, num_attention_heads=3, vocab_size=9))
    assert info.family is None
    assert dict(info.sizes) == {"H": 12, "V": 9, "N": 2, "A": 3, "KV": 3, "D": 4}
    causal = describe(save("newmodel", d_model=8, architectures=["NewModelForCausalLM"]))
    assert (causal.task, dict(causal.sizes)) == ("causal_lm", {"H": 8})


def test_infos_are_values(save):
    folder = save("bert")
    assert describe(folder) == describe(folder)
    assert hash(describe(folder)) == hash(describe(folder))
    overridden = describe(folder, overrides={"hidden_act": "relu"})
    assert overridden != describe(folder)
    hash(random_init(describe(save("llama")), overrides={"rope_scaling": {"rope_type": "linear", "factor": 2.0}}))


def test_heads_that_share_a_key_stay_together(save):
    info = describe(save("llama", num_attention_heads=4, num_key_value_heads=2))
    assert truncated(info, "t", heads=2).size("KV") == 1
    with pytest.raises(ModelError, match="share a key"):
        truncated(info, "t", heads=3)
