"""A folder in which the specs of the documentation check: configs under the names of hub models, small data files."""

from __future__ import annotations

import json
from pathlib import Path

from gkd_dsl.models import stored
from gkd_dsl.models.describe import describe

_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
_QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "num_key_value_heads": 2}


def _bert(layers: int, width: int, heads: int, inner: int, cls: str) -> dict[str, object]:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    return {**_BERT, **sizes, "architectures": [cls]}


def _qwen(layers: int, width: int, heads: int, inner: int) -> dict[str, object]:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    return {**_QWEN, **sizes}


MODELS: dict[str, dict[str, object]] = {
    "bert-base-uncased": _bert(12, 768, 12, 3072, "BertForMaskedLM"),
    "textattack/bert-base-uncased-SST-2": _bert(12, 768, 12, 3072, "BertForSequenceClassification"),
    "huawei-noah/TinyBERT_General_4L_312D": _bert(4, 312, 12, 1200, "BertForPreTraining"),
    "Qwen/Qwen2.5-1.5B": _qwen(28, 1536, 12, 8960),
    "Qwen/Qwen2.5-0.5B": _qwen(24, 896, 14, 4864),
    "teacher": _bert(12, 768, 12, 3072, "BertForSequenceClassification"),
    "student": _bert(4, 312, 12, 1200, "BertForSequenceClassification"),
    "small_teacher": _bert(6, 512, 8, 2048, "BertForSequenceClassification"),
    "student_mlm": _bert(4, 312, 12, 1200, "BertForMaskedLM"),
    "path/to/teacher": _bert(12, 768, 12, 3072, "BertForSequenceClassification"),
    "path/to/student": _bert(6, 768, 12, 3072, "BertForSequenceClassification"),
    "path/to/masked_teacher": _bert(12, 768, 12, 3072, "BertForMaskedLM"),
    "path/to/masked_student": _bert(6, 768, 12, 3072, "BertForMaskedLM"),
}
"""Configs by location; a location that is a folder beside the spec is found before the hub is asked."""

TABLES: dict[str, str] = {
    "reviews.csv": "text,label\n" + "".join(f"text number {i},{i % 2}\n" for i in range(100)),
    "train.csv": "text,label\n" + "".join(f"text number {i},{i % 2}\n" for i in range(100)),
    "test.csv": "text,label\n" + "".join(f"another {i},{i % 2}\n" for i in range(20)),
    "reviews.tsv": "".join(f"{i}\t{i % 2 * 2 - 1}\ttext number {i}\n" for i in range(100)),
    "chats.jsonl": "".join(json.dumps({"question": f"{i}?", "answer": f"{i}."}) + "\n" for i in range(100)),
    "corpus.txt": "".join(f"line number {i} of the text\n" for i in range(100)),
}


def build(root: Path) -> Path:
    """Write the models and tables below a folder, and give it."""
    for name, config in MODELS.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in TABLES.items():
        (root / name).write_text(text)
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    _store(root, "teacher", "outputs/t/main")
    return root


def _store(root: Path, model: str, place: str) -> None:
    """The manifest of a folder with all logits of a model for the rows of `reviews.csv`."""
    folder = root / place
    folder.mkdir(parents=True)
    said = {
        "identity": {"top_k": "all", "held_out rows": 0},
        "model": stored.describe(describe(model, root=root)),
        "parts": {"logits": {"dims": [2], "dtype": "float32"}},
        "shared": [],
        "rows": 100,
        "stored": 100,
    }
    (folder / "manifest.json").write_text(json.dumps(said))
