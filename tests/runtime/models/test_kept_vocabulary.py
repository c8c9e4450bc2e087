"""A part of a vocabulary: what is kept, what stands for the rest, and models that are cut and made whole again."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import CASES, batch_of, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from gkd_dsl.models.describe import keeping, with_head
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.info import Kept
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models import load as loading
from gkd_dsl.runtime.models import vocabulary
from gkd_dsl.runtime.models.load import build as built
from gkd_dsl.runtime.models.load import load_with_report
from gkd_dsl.runtime.models.tapper import Tapper
from gkd_dsl.runtime.models.vocabulary import attached, choose, counts, cut, expanded, nearest, saved_map

SPECIAL = (0, 1, 2)


def kept_info(info, count):
    return keeping(info, Kept(count, 37, "lines", "text", ()))


def cut_model(tiny, chosen, cosine=False):
    """A copy of a tiny model that keeps the chosen ids."""
    info = kept_info(tiny.info, len(chosen))
    found = nearest(chosen, tiny.model.get_input_embeddings().weight, SPECIAL, cosine=cosine)
    return cut(tiny.model, built(info), found).eval(), info, found


def some_ids(count, seed=0):
    more = torch.randperm(34, generator=torch.Generator().manual_seed(seed))[: count - 3] + 3
    return sorted([*SPECIAL, *more.tolist()])


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("full", [50, 2500])
def test_each_dropped_id_goes_to_the_most_similar_kept_one(cosine, full):
    generator = np.random.default_rng(1)
    table = generator.normal(size=(full, 6)).astype(np.float32) * generator.uniform(0.2, 5, size=(full, 1)).astype(
        np.float32
    )
    chosen = sorted({0, 1, 2, *generator.choice(np.arange(3, full), size=full // 3, replace=False).tolist()})
    found = nearest(chosen, torch.from_numpy(table), SPECIAL, cosine=cosine)
    assert sorted(found.kept.tolist()) == chosen
    measured = table / np.linalg.norm(table, axis=1, keepdims=True) if cosine else table
    open_to = [token for token in chosen if token not in SPECIAL]
    for token in range(full):
        stands = int(found.kept[found.rows[token]])
        if token in chosen:
            assert stands == token
        else:
            values = [float(np.dot(measured[token].astype(np.float64), measured[other])) for other in open_to]
            assert float(np.dot(measured[token], measured[stands])) == pytest.approx(max(values), abs=1e-4)
            assert stands not in SPECIAL
    assert all(found.kept[token] == token for token in chosen if token < len(chosen)), "low ids stay where they are"


def test_a_vocabulary_kept_whole_is_as_it_was():
    found = nearest(range(20), torch.randn(20, 4), SPECIAL)
    assert found.kept.tolist() == found.rows.tolist() == list(range(20))


def test_special_tokens_then_words_then_the_most_frequent():
    frequency = np.array([0, 0, 9, 5, 7, 5, 0, 8])
    assert choose(frequency, 4, [0, 6]) == [0, 2, 6, 7]
    assert choose(frequency, 6, [0, 6]) == [0, 2, 3, 4, 6, 7], "of two that are equally frequent the lower"
    assert choose(frequency, 8, []) == list(range(8))
    with pytest.raises(ModelError, match="special tokens and words are 3"):
        choose(frequency, 2, [0, 1, 2])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("family", "task"), [case for case in CASES if case[1] != "encoder"])
def test_the_model_cut_is_the_model_whose_rows_are_shared(folder, family, task, side):
    """The oracle: the whole model, with the rows of every dropped id overwritten by those that stand for it."""
    tiny = build(folder, family, task)
    model, info, found = cut_model(tiny, some_ids(15))
    assert model.config.vocab_size == info.size("V") == 15
    assert model.get_input_embeddings().weight.shape[0] == 15
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in tiny.model.parameters())
    stands = found.kept[found.rows]
    shared = copy.deepcopy(tiny.model)
    with torch.no_grad():
        table = shared.get_input_embeddings().weight
        table.copy_(table[stands])
        head = shared.get_output_embeddings() if task != "classification" else None
        if head is not None and head.weight is not table:
            head.weight.copy_(head.weight[stands])
        if head is not None and getattr(head, "bias", None) is not None:
            head.bias.copy_(head.bias[stands])
        if family == "mobilebert" and task == "masked_lm":
            dense = shared.cls.predictions.dense.weight
            dense.copy_(dense[:, stands])
    inputs = batch_of(side)
    with torch.no_grad():
        mine, theirs = model(**inputs).logits, shared(**inputs).logits
        again = expanded(model)(**inputs).logits
    if task == "classification":
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(again, mine)
        return
    assert mine.shape[-1] == 15
    torch.testing.assert_close(mine, theirs[..., found.kept])
    torch.testing.assert_close(again, theirs)
    for token in range(37):
        assert torch.equal(again[..., token], again[..., int(stands[token])]), "a dropped id has its row's logit"


def test_a_dropped_id_reads_as_the_one_that_stands_for_it(folder):
    tiny = build(folder, "bert", "masked_lm")
    model, _, found = cut_model(tiny, some_ids(12))
    inputs = batch_of()
    other = {**inputs, "input_ids": found.kept[found.rows][inputs["input_ids"]]}
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**other).logits)


def test_all_kept_is_the_model_bit_for_bit(folder):
    for family in ("bert", "roberta", "gpt2"):
        tiny = build(folder, family)
        model, _, _ = cut_model(tiny, range(37))
        inputs = batch_of()
        with torch.no_grad():
            assert torch.equal(model(**inputs).last_hidden_state, tiny.model(**inputs).last_hidden_state)


def test_padding_beyond_the_rows_that_are_kept(folder, tmp_path):
    """GPT-2 and Qwen pad with their last id, which is no row of the smaller table."""
    tiny = build(folder, "qwen2", "causal_lm", pad_token_id=36)
    model, _, found = cut_model(tiny, [*some_ids(9), 36])
    assert model.config.pad_token_id == 36
    assert expanded(model).config.pad_token_id == 36
    inputs = batch_of()
    inputs["input_ids"] = torch.where(inputs["attention_mask"] == 0, 36, inputs["input_ids"])
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
    assert int(found.kept[found.rows[36]]) == 36


def test_its_new_weights_are_those_of_the_seed(folder, monkeypatch):
    monkeypatch.setattr(loading, "load_tokenizer", lambda info: None)
    monkeypatch.setattr(vocabulary, "id_map", lambda kept, words, table, root: nearest(some_ids(12), table, SPECIAL))
    tiny = build(folder, "bert", "masked_lm")
    name = "bert.encoder.layer.1.output.dense.weight"
    models = [loading.load(kept_info(tiny.info, 12), seed=seed).get_parameter(name) for seed in (1, 2)]
    whole = [loading.load(tiny.info, seed=seed).get_parameter(name) for seed in (1, 2)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(models, whole, strict=True))
    assert not torch.equal(*models)


def test_a_decoder_that_classifies_knows_its_padding(folder, monkeypatch):
    """Its config names none: it is the end of text, as in the whole model."""
    monkeypatch.setattr(loading, "load_tokenizer", lambda info: None)
    monkeypatch.setattr(vocabulary, "id_map", lambda kept, words, table, root: nearest(some_ids(12), table, SPECIAL))
    info = build(folder, "llama", "classification").info
    info = replace(info, config={name: value for name, value in info.config.items() if name != "pad_token_id"})
    whole, model = (loading.load(each) for each in (info, kept_info(info, 12)))
    assert model.config.pad_token_id == whole.config.pad_token_id == 2
    assert model(**batch_of()).logits.shape == (3, 3)


def test_all_rows_are_counted_and_none_that_is_held_out(tmp_path, monkeypatch):
    """More rows than are counted at once."""
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.txt").write_text("".join(f"w{row % 3} w{row % 7}\n" for row in range(2500)))
    table = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *(f"w{number}" for number in range(7))))}
    made = Tokenizer(WordLevel(table, "[UNK]"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    expected = [0] * 11
    for row in range(2500):
        for number in (row % 3, row % 7):
            expected[2 + number] += 1
    all_of, part = (Kept(5, 11, "rows", "text", (("held_out", h), ("path", "rows.txt"))) for h in (0.0, 0.2))
    assert counts(all_of, tokenizer, tmp_path).tolist() == expected
    assert counts(part, tokenizer, tmp_path).sum() == 2 * 2000


def test_a_new_head_on_it_and_copies_of_it_keep_the_map(folder):
    tiny = build(folder, "bert", "masked_lm")
    model, info, found = cut_model(tiny, some_ids(12))
    headed = with_head(info, "lm", num_labels=2)
    assert headed.kept == info.kept
    classifier, _ = load_with_report(headed, models={"lm": model})
    assert torch.equal(attached(classifier).rows, found.rows)
    inputs = batch_of()
    for copied in (classifier, copy.deepcopy(classifier)):
        assert copied(**inputs).logits.shape == (3, 2)
    taps = [TapPath("weight", name="kept_ids"), TapPath("weight", name="id_map")]
    read = Tapper(model, info).run(inputs, taps)
    assert torch.equal(read[taps[0]], found.kept)
    assert torch.equal(read[taps[1]], found.rows)
    assert saved_map(model)["kept"] == sorted(found.kept.tolist())
    with pytest.raises(ModelError, match="keeps a part of its vocabulary already"):
        kept_info(info, 5)
