"""What `gkd check` says of models whose outputs cannot be stored, and padding on the left."""

import pytest
import torch
from stored_world import (
    CACHED,
    CLASSIFY,
    LANGUAGE,
    V,
    cache,
    classifiers,
    decoders,
    placed,
    run,
    spec,
    tokenizer,
)
from transformers import GPT2Config, GPT2LMHeadModel

from gkd_dsl.meaning.check import check_path
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.run_folder import RunFolder

FEW = ("placement = cached", 'cache = "few"', "top_k = 3")


def said(path):
    return [(d.code, d.message) for d in check_path(path).diagnostics.errors]


@pytest.mark.parametrize("op", ["kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy"])
def test_divergences_do_with_the_largest_logits(tmp_path, op):
    folder = decoders(tmp_path)
    assert said(spec(folder, LANGUAGE, placed(*FEW), LOSS=op)) == []
    found = said(spec(folder, LANGUAGE, placed(*FEW, "tail = renormalise"), LOSS=op))
    finite = op not in ("reverse_kl", "jsd")
    assert found == ([] if finite else [("E0430", f"the outputs of `t` cannot be stored: `{op}` is not finite with "
                                                  "`tail = renormalise`")])  # fmt: skip


def test_what_reads_all_logits_does_not(tmp_path):
    folder = decoders(tmp_path)
    text = LANGUAGE.replace("LOSS(s.logits <- t.logits, temperature = 2.0)", "mse(s.logits <- t.logits)")
    ((code, message),) = said(spec(folder, text, placed(*FEW)))
    assert code == "E0430"
    assert "`mse` reads all logits of `t`, and of these the 3 largest are stored" in message
    assert said(spec(folder, text, placed("placement = cached", 'cache = "all"', "top_k = 0"))) == []
    assert said(spec(folder, text, CACHED)) == []


def test_a_metric_reads_all_logits_too(tmp_path):
    folder = classifiers(tmp_path)
    ((code, message),) = said(
        spec(folder, CLASSIFY, placed("placement = cached", 'cache = "x"', "top_k = 2"), OBJECTIVE="soft")
    )
    assert code == "E0430"
    assert "the metric `agree` reads all logits of `t`" in message


def test_texts_that_are_masked_anew(tmp_path):
    folder = classifiers(tmp_path)
    text = CLASSIFY.replace('hf("t")', 'hf("t", task = masked_lm)')
    text = text.replace('random_init("s")', 'random_init("s", task = masked_lm)').replace(', label = "label"', "")
    text = text.replace("  evaluate agree\n", "")
    ((code, message),) = said(spec(folder, text, CACHED, OBJECTIVE="hid"))
    assert code == "E0430"
    assert "stage `main` masks its texts anew in each epoch" in message


def test_a_pass_over_other_samples(tmp_path):
    folder = classifiers(tmp_path)
    text = CLASSIFY.replace(
        "loss soft", "pass other = t(roll(batch))\nloss crossed = kl(s.logits <- other.logits)\nloss soft"
    )
    ((code, message),) = said(spec(folder, text, CACHED, OBJECTIVE="soft + crossed"))
    assert (code, message) == (
        "E0430",
        "the outputs of `t` cannot be stored: stage `main` runs `t` on more than its texts",
    )
    # `cache = auto` runs it each time.
    path = spec(folder, text, placed("cache = auto"), OBJECTIVE="soft + crossed")
    live = run(spec(folder, text, OBJECTIVE="soft + crossed", name="live.gkd")).steps
    assert run(path, RunFolder.create("x", out=folder / "run")).steps == live


def pad_left(folder):
    for name in ("t", "s"):
        tokenizer(side="left").save_pretrained(folder / name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_on_the_left_of_decoders(tmp_path, kind):
    folder = decoders(tmp_path)
    if kind == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=V, n_positions=40, n_embd=24, n_layer=3, n_head=2, initializer_range=0.3)
        GPT2LMHeadModel(config).save_pretrained(folder / "t")
    pad_left(folder)
    live = run(spec(folder, LANGUAGE, LOSS="kl")).steps
    path = spec(folder, LANGUAGE, CACHED, LOSS="kl")
    cache(path)
    found = run(path).steps
    assert len(found) == len(live)
    for mine, theirs in zip(found, live, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_padding_on_the_left_of_others_is_refused(tmp_path):
    folder = classifiers(tmp_path)
    pad_left(folder)
    with pytest.raises(RunError, match="padded on the left"):
        cache(spec(folder, CLASSIFY, CACHED, OBJECTIVE="soft"))
