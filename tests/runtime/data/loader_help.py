"""A tiny tokenizer, a stage and files for the tests of the loader."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gkd_dsl.graph.nodes import OptimSpec, SourceSpec, StageNode
from gkd_dsl.runtime.data import make_loader
from gkd_dsl.schedules import Span

WORDS = [f"w{number}" for number in range(60)]


def word_tokenizer(*, causal=False, side="right", length=64):
    """One token a word. `[CLS] a [SEP] b [SEP]` with token types, or `<s> a` for a causal model."""
    special = ["<pad>", "<s>", "</s>", "<unk>"] if causal else ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    vocabulary = {token: place for place, token in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special[3]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if causal:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
            padding_side=side,
            model_max_length=length,
            model_input_names=["input_ids", "attention_mask"],
        )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        padding_side=side,
        model_max_length=length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def stage_of(batch_size=4, max_length=None):
    return StageNode(
        "stage/main",
        "main",
        0,
        Span(1, "epochs"),
        None,
        (),
        (),
        OptimSpec(),
        batch_size=batch_size,
        max_length=max_length,
    )


def loader_for(
    tokenizer, root, kind, *, task="encoder", batch_size=4, seed=0, reads=(), max_length=None, classes=None, **args
):
    spec = SourceSpec("texts", kind, tuple(sorted(args.items())))
    return make_loader(
        stage_of(batch_size, max_length),
        spec,
        tokenizer,
        task=task,
        columns=reads,
        seed=seed,
        root=Path(root),
        classes=classes,
    )


def sentence(number):
    """Between one and eight words, its own for every number below 60."""
    return " ".join(WORDS[(number * 7 + place) % 60] for place in range(1 + number % 8))


def labelled_file(folder, count=30):
    lines = ["text,label", *(f"{sentence(number)},{number % 3}" for number in range(count))]
    path = Path(folder) / "a.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
