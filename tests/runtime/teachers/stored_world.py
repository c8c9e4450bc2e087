"""A folder with a saved teacher, a student's config, a tokenizer of words, a table and a spec over them."""

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gkd_dsl.meaning.check import check_path
from gkd_dsl.runtime.session import plan_of
from gkd_dsl.runtime.stages import Run
from gkd_dsl.runtime.teachers.fill import fill

ALL = "soft + hid + att"
"""The objective of all losses of the specs."""
WORDS = [f"w{number}" for number in range(40)]
V = len(WORDS) + 5


def tokenizer(words=WORDS, side="right"):
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    vocabulary = {token: place for place, token in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        mask_token="[MASK]", eos_token="[SEP]", model_max_length=32, padding_side=side,
    )  # fmt: skip


def bert(layers, width, **more):
    return BertConfig(
        vocab_size=V, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, num_labels=3,
        intermediate_size=2 * width, max_position_embeddings=40, initializer_range=0.3, **more,
    )  # fmt: skip


def llama(layers, width):
    return LlamaConfig(
        vocab_size=V, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=2 * width, max_position_embeddings=40, initializer_range=0.3, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def classifiers(folder, rows=20):
    torch.manual_seed(0)
    BertForSequenceClassification(bert(3, 24)).save_pretrained(folder / "t")
    return _world(folder, bert(2, 16), rows)


def decoders(folder, rows=12):
    torch.manual_seed(0)
    LlamaForCausalLM(llama(3, 24)).save_pretrained(folder / "t")
    return _world(folder, llama(2, 16), rows)


def _world(folder, student, rows):
    student.save_pretrained(folder / "s")
    kind = "BertForSequenceClassification" if student.model_type == "bert" else "LlamaForCausalLM"
    config = json.loads((folder / "s" / "config.json").read_text())
    (folder / "s" / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
    for name in ("t", "s"):
        tokenizer().save_pretrained(folder / name)
    table(folder, rows)
    return folder


def table(folder, rows, seed=0):
    drawn = random.Random(seed)
    lines = [f"{' '.join(drawn.choices(WORDS, k=drawn.randint(2, 12)))},{drawn.randint(0, 2)}" for _ in range(rows)]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n")


CLASSIFY = """gkd 1
teacher t = hf("t")
student s = random_init("s")
project W = linear(s.H -> t.H)
data d = csv("rows.csv", text = "text", label = "label", held_out = 20%)
loss soft = kl(s.logits <- t.logits, temperature = 2.0)
loss hid = mse(s.hidden[1] |> W <- t.hidden[2])
loss att = attention_kl(s.layer[0].attn.scores <- t.layer[1].attn.scores)
metric agree = agreement(s.logits <- t.logits)
stage main for 3 epochs {
  batch_size = 4
  evaluate agree
  minimize OBJECTIVE
}
runtime {
  device = cpu
  PLACEMENT
}
"""
LANGUAGE = """gkd 1
teacher t = hf("t")
student s = random_init("s")
data d = csv("rows.csv", text = "text")
loss soft = LOSS(s.logits <- t.logits, temperature = 2.0)
stage main for 2 epochs {
  batch_size = 4
  minimize soft
}
runtime {
  device = cpu
  PLACEMENT
}
"""


def placed(*settings):
    return "teacher t {\n" + "".join(f"    {setting}\n" for setting in settings) + "  }"


CACHED = placed("placement = cached", 'cache = "kept"')


def spec(folder, text, placement="", name="spec.gkd", **words):
    for word, value in words.items():
        text = text.replace(word, value)
    path = folder / name
    path.write_text(text.replace("PLACEMENT", placement))
    return path


def plan(path):
    checked = check_path(path)
    assert checked.ok, [d.message for d in checked.diagnostics]
    return plan_of(checked)


class Losses:
    """Every step's loss and terms, and the metrics of every evaluation."""

    def __init__(self):
        self.steps, self.metrics = [], []

    def on_stage(self, record):
        pass

    def on_step(self, record):
        self.steps.append({"loss": record.loss, **record.terms})

    def on_evaluate(self, record):
        self.metrics.append(dict(record.metrics))

    def close(self):
        pass


def run(path, folder=None, resume=False, listeners=()):
    found = Losses()
    made = Run(plan(path), root=path.parent, folder=folder, listeners=[found, *listeners])
    made.run(resume=resume)
    return found


def cache(path, **options):
    return fill(plan(path), root=path.parent, **options)
