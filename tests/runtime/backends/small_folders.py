"""Folders of two small BERT models with a word tokenizer, and a table of rows."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

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
        made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, "[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        special = dict(zip(("pad", "unk", "cls", "sep", "mask"), WORDS, strict=False))
        BertTokenizerFast(
            tokenizer_object=made, **{f"{key}_token": word for key, word in special.items()}
        ).save_pretrained(folder / name)
    lines = [
        f"{' '.join(f'w{(row * 7 + place * 3) % 40}' for place in range(3 + row % 5))},{'abc'[row % 3]}"
        for row in range(rows)
    ]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return json.dumps(lines)
