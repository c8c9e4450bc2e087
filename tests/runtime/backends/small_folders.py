"""Folders of two small BERT models, or of two small Llama models, with a word tokenizer, and a table of rows."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(40)))


def write(folder, rows=40):
    for number, (name, layers, width) in enumerate((("t", 3, 24), ("s", 2, 16))):
        torch.manual_seed(number)
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=2 * width, max_position_embeddings=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_labels=3, initializer_range=0.3,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(folder / name)
        special = dict(zip(("pad", "unk", "cls", "sep", "mask"), WORDS, strict=False))
        BertTokenizerFast(
            tokenizer_object=words(), **{f"{key}_token": word for key, word in special.items()}
        ).save_pretrained(folder / name)
    return table(folder, rows)


def write_decoders(folder, rows=20):
    for number, (name, layers, width) in enumerate((("t", 3, 24), ("s", 2, 16))):
        torch.manual_seed(number)
        config = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=2 * width, max_position_embeddings=32, initializer_range=0.3,
            tie_word_embeddings=False, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        PreTrainedTokenizerFast(
            tokenizer_object=words(), pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
        ).save_pretrained(folder / name)
    return table(folder, rows)


def words():
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def table(folder, rows):
    lines = [
        f"{' '.join(f'w{(row * 7 + place * 3) % 40}' for place in range(3 + row % 5))},{'abc'[row % 3]}"
        for row in range(rows)
    ]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return json.dumps(lines)
