"""Batches of masked and causal models."""

import numpy as np
import pytest
import torch
from loader_help import WORDS, loader_for, word_tokenizer
from tokenizers import processors

from gkd_dsl.runtime.data.collate import masking_for
from gkd_dsl.runtime.data.errors import DataError

SPECIAL = {0, 1, 2, 3, 4}


@pytest.fixture
def long_texts(tmp_path):
    lines = [" ".join(WORDS[(line + 3 * place) % 60] for place in range(5 + line % 50)) for line in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def masked_loader(folder, **rest):
    rest = {"held_out": 0.1, "batch_size": 16, **rest}
    return loader_for(word_tokenizer(), folder, "text", task="masked_lm", path="a.txt", **rest)


def test_masking_rates_and_labels():
    """10 000 tokens against the rates of BERT: 15 % chosen; of these 80 % masked, 10 % random, 10 % left."""
    masking = masking_for(word_tokenizer(), 0.15, 0)
    ids = np.resize(np.arange(5, 65), 100)
    chosen = masked = changed = kept = 0
    for row in range(400):
        new, labels = masking.apply(ids, 0, row)
        hit = labels != -100
        assert (labels[hit] == ids[hit]).all()
        assert (new[~hit] == ids[~hit]).all()
        chosen += hit.sum()
        masked += (new[hit] == 4).sum()
        kept += (new[hit] == ids[hit]).sum()
        changed += ((new[hit] != ids[hit]) & (new[hit] != 4)).sum()
        assert not SPECIAL - {4} & set(new.tolist())
    # Five standard deviations of the binomials, over 40 000 tokens and about 6 000 of them chosen.
    assert abs(chosen / 40_000 - 0.15) < 0.009
    assert abs(masked / chosen - 0.8) < 0.026
    # A random token is the old one in 1 of 60 cases.
    assert abs(kept / chosen - (0.1 + 0.1 / 60)) < 0.02
    assert abs(changed / chosen - 0.1 * 59 / 60) < 0.02


def test_special_tokens_are_never_masked():
    masking = masking_for(word_tokenizer(), 0.99, 0)
    ids = np.array([1, 5, 3, 6, 2, 0, 4] * 20)
    special = np.isin(ids, list(SPECIAL))
    new, labels = masking.apply(ids, 0, 0)
    assert (labels[special] == -100).all()
    assert (new[special] == ids[special]).all()
    assert (labels[~special] != -100).any()


def test_masks_are_functions_of_seed_epoch_and_row(long_texts):
    one, two = masked_loader(long_texts), masked_loader(long_texts)
    for a, b in zip(one.epoch(3, 2), list(two.epoch(3))[2:], strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])
    first, second = next(one.epoch(0)), next(one.epoch(1))
    assert not torch.equal(first["labels"][:, :5], second["labels"][:, :5])
    other = masked_loader(long_texts, seed=9)
    assert not np.array_equal(other.order(0), one.order(0))


def test_a_row_is_masked_alike_in_every_batch(long_texts):
    """Neither the neighbours of a row nor the padding change what is masked."""
    small, large = masked_loader(long_texts, batch_size=1), masked_loader(long_texts, batch_size=32)

    def rows(loader):
        found = []
        for batch in loader.epoch(0):
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
                assert (labels[mask == 0] == -100).all()
                found.append((ids[mask.bool()].tolist(), labels[mask.bool()].tolist()))
        return found

    assert rows(small) == rows(large)


def test_held_out_masks_never_change(long_texts):
    loader = masked_loader(long_texts)
    before = list(loader.held_out())
    list(loader.epoch(0))
    for a, b in zip(before, loader.held_out(), strict=True):
        assert torch.equal(a["labels"], b["labels"])
        assert torch.equal(a["input_ids"], b["input_ids"])


def test_the_share_of_masked_tokens_is_an_argument(long_texts):
    batch = next(masked_loader(long_texts, mask_probability=0.6).epoch(0))
    words = ~torch.isin(batch["input_ids"], torch.tensor([0, 1, 2]))
    assert abs((batch["labels"] != -100).sum() / words.sum() - 0.6) < 0.15
    none = next(masked_loader(long_texts, mask_probability=0.0).epoch(0))
    assert (none["labels"] == -100).all()


def causal_loader(folder, kind="jsonl", side="right", **args):
    args = {"path": "a.jsonl", "held_out": 0.0, "shuffle": False, "batch_size": 2, **args}
    return loader_for(word_tokenizer(causal=True, side=side), folder, kind, task="causal_lm", **args)


@pytest.mark.parametrize("side", ["right", "left"])
def test_causal_labels_are_the_ids_without_padding(tmp_path, side):
    (tmp_path / "a.txt").write_text("w0 w1 w2\nw3\n")
    batch = next(causal_loader(tmp_path, "text", side, path="a.txt").epoch(0))
    # <s> w0 w1 w2 </s> and <s> w3 </s>; </s> is added, the shift is left to the step.
    full, short = [1, 4, 5, 6, 2], [1, 7, 2]
    assert batch["input_ids"].tolist() == [full, [*short, 0, 0] if side == "right" else [0, 0, *short]]
    assert batch["labels"].tolist() == [full, [*short, -100, -100] if side == "right" else [-100, -100, *short]]
    assert "token_type_ids" not in batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_the_completion_is_learned(tmp_path, side):
    (tmp_path / "a.jsonl").write_text('{"q": "w0 w1", "a": "w2 w3"}\n{"q": "w4", "a": "w5"}\n')
    batch = next(causal_loader(tmp_path, side=side, prompt="q", completion="a").epoch(0))
    gap = [-100, -100]
    second = [[1, 8, 9, 2, 0, 0], [-100, -100, 9, 2, *gap]]
    if side == "left":
        second = [[0, 0, 1, 8, 9, 2], [*gap, -100, -100, 9, 2]]
    assert batch["input_ids"].tolist() == [[1, 4, 5, 6, 7, 2], second[0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6, 7, 2], second[1]]


def test_a_prompt_goes_on_where_the_tokenizer_ends_every_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "w0 w1", "a": "w2 w3"}\n{"q": "w4", "a": "w5"}\n')
    tokenizer = word_tokenizer(causal=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    args = {"path": "a.jsonl", "prompt": "q", "completion": "a", "held_out": 0.0, "shuffle": False, "batch_size": 2}
    batch = next(loader_for(tokenizer, tmp_path, "jsonl", task="causal_lm", **args).epoch(0))
    assert batch["input_ids"].tolist() == [[1, 4, 5, 6, 7, 2], [1, 8, 9, 2, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6, 7, 2], [-100, -100, 9, 2, -100, -100]]


def test_the_end_is_added_before_the_cut_and_may_be_left_away(tmp_path):
    (tmp_path / "a.txt").write_text("w0 w1 w2\nw3\n")
    cut = next(causal_loader(tmp_path, "text", path="a.txt", max_length=4).epoch(0))
    assert cut["input_ids"].tolist() == [[1, 4, 5, 6], [1, 7, 2, 0]]
    bare = next(causal_loader(tmp_path, "text", path="a.txt", add_eos=False).epoch(0))
    assert bare["input_ids"].tolist() == [[1, 4, 5, 6], [1, 7, 0, 0]]


def test_rows_whose_prompt_fills_the_length_are_left_out(tmp_path):
    long = " ".join(WORDS[:9])
    lines = [f'{{"q": "{long}", "a": "w5"}}', '{"q": "w4", "a": "w5"}', '{"q": "w6", "a": "w7"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    loader = causal_loader(tmp_path, prompt="q", completion="a", max_length=6)
    assert loader.sizes.left_out == {"with nothing to learn": 1}
    assert loader.sizes.train == 2
    half = causal_loader(tmp_path, prompt="q", completion="a", max_length=6, held_out=0.5, batch_size=1)
    assert half.sizes.held_out == 1
    (batch,) = half.held_out()
    word = {"w5": 9, "w7": 11}[half.held_out_sentences()[0]]
    assert batch["input_ids"][0, 2].item() == word


def test_a_tokenizer_without_padding_token(tmp_path):
    (tmp_path / "a.txt").write_text("w0 w1 w2\nw3\n")
    tokenizer = word_tokenizer(causal=True)
    tokenizer.pad_token = None
    loader = loader_for(
        tokenizer, tmp_path, "text", task="causal_lm", path="a.txt", held_out=0.0, shuffle=False, batch_size=2
    )
    batch = next(loader.epoch(0))
    assert batch["input_ids"][1].tolist() == [1, 7, 2, 2, 2]
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0]
    assert batch["labels"][1].tolist() == [1, 7, 2, -100, -100]


def test_labels_give_the_loss_that_transformers_gives(tmp_path):
    """The labels of a batch, put into a transformers model, count the tokens of the completions only."""
    from transformers import GPT2Config, GPT2LMHeadModel

    (tmp_path / "a.jsonl").write_text('{"q": "w0 w1", "a": "w2 w3"}\n{"q": "w4", "a": "w5"}\n')
    batch = next(causal_loader(tmp_path, prompt="q", completion="a").epoch(0))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    with torch.no_grad():
        out = model(**batch)
        scores = torch.log_softmax(out.logits, -1)
    wanted = [(0, 2, 6), (0, 3, 7), (0, 4, 2), (1, 1, 9), (1, 2, 2)]
    by_hand = -sum(scores[row, place, token] for row, place, token in wanted) / len(wanted)
    torch.testing.assert_close(out.loss, by_hand)


def test_a_tokenizer_of_special_tokens_alone_leaves_nothing_to_mask():
    class Special:
        all_special_ids = (0, 1, 2)
        mask_token_id = 2

        def __len__(self):
            return 3

    with pytest.raises(DataError, match="all 3 tokens of the tokenizer are special"):
        masking_for(Special(), 0.15, 0)
