"""What is known of a model before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gkd_dsl.types import Dim

Task = Literal["encoder", "classification", "masked_lm", "causal_lm"]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer: `fingerprint` is equal for two that give the same ids for the same text."""

    fingerprint: str
    size: int
    file: str


@dataclass(frozen=True)
class Kept:
    """The part of a vocabulary that a model keeps.

    count       how many ids, of `full`: special tokens, those that `words` are made of, then the most frequent
    source      the data source whose tokens are counted: its name, kind and arguments
    similarity  how a dropped id finds the kept one that stands for it, by the embeddings of the model called `like`
                (by the model's own where it is None); `like_info` is what is known of it
    """

    count: int
    full: int
    source: str
    kind: str
    args: tuple[tuple[str, Any], ...]
    words: tuple[str, ...] = ()
    similarity: Literal["inner", "cosine"] = "inner"
    like: str | None = None
    like_info: ModelInfo | None = None


@dataclass(frozen=True)
class Lora:
    """Adapters of low rank beside some linear maps of a model: W + scale B A (arXiv 2106.09685).

    r        the rank; B starts as zeros, so that the model starts as its base
    alpha    `scale` is alpha / r, with `rslora` alpha / sqrt(r) (arXiv 2312.03732)
    dropout  of what A is given, in training alone
    targets  modules inside the blocks: their names, or ends of their paths
    export   `merged`: a plain model with W + scale B A; `adapter`: what is trained alone, as peft reads it
    dora     the length of each row of a weight is trained apart (arXiv 2402.09353)
    """

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    export: Literal["merged", "adapter"] = "merged"
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)


@dataclass(frozen=True)
class Quantised:
    """How the linear weights of a model are quantised when they are loaded.

    library  `bitsandbytes`, `torchao`, or what the config of a model that was saved quantised names
    scheme   the class of torchao that does it; for bitsandbytes the bits say all
    bits     of a weight; 0 where that is not known
    args     by the library's own names
    """

    library: str
    bits: int = 0
    scheme: str | None = None
    args: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        given = ", ".join(f"{name} = {value}" for name, value in self.args)
        return f"{self.library} {self.scheme or ''}".strip() + (f" ({given})" if given else "")


@dataclass(frozen=True)
class Build:
    """How the runtime makes the model.

    `kind`: `hf` loads the weights at `path`; `truncated` copies `base` (another model of the spec)
    with only the blocks of `layers`; `headed` copies its body and puts a new head on; `random` makes it from the
    config with random weights. `overrides` are config fields that differ from the file's. `origin` is what is known
    of `base`. With `kept` the model made so is then cut to a part of its vocabulary. `adapter` is the folder of a PEFT
    adapter that is merged into the weights; `lora` are adapters that are trained, beside frozen weights. With
    `quantised` weights are quantised as they are read. `stored` has no weights: its outputs are in a folder.
    """

    kind: Literal["hf", "truncated", "headed", "random", "stored"]
    path: str | None
    base: str | None = None
    layers: tuple[int, ...] | None = None
    overrides: tuple[tuple[str, Any], ...] = ()
    origin: ModelInfo | None = None
    kept: Kept | None = None
    adapter: str | None = None
    lora: Lora | None = None
    quantised: Quantised | None = None
    stored: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """A model as its config describes it.

    location     as written by the user ("bert-base-uncased", "./teacher", "package:name")
    path         the folder with `config.json`; None for a formal model inside a method
    family       key of the family table ("bert", "llama", ...), None for an unknown `model_type`
    architecture the transformers class ("BertForSequenceClassification")
    task         which head: `encoder` has no logits
    sizes        H V N A KV D F C; only those that exist (no C without a classification head, ...)
    size_fields  the config field of each size, for messages ("H" -> "hidden_size")
    has_pooler   whether `pooled` exists
    config       the parsed config.json with overrides applied
    """

    location: str
    path: str | None
    family: str | None
    architecture: str
    task: Task
    sizes: tuple[tuple[str, int], ...]
    size_fields: tuple[tuple[str, str], ...]
    build: Build
    vocabulary: Vocabulary | None = None
    has_pooler: bool = False
    formal: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def size(self, name: str) -> int | None:
        """The size called `name` (H, V, N, ...); None where the model has none."""
        return dict(self.sizes).get(name)

    def dim(self, name: str, model: str) -> Dim:
        """The axis `model.name` with its size (None for a formal model) and where it comes from."""
        size = self.size(name)
        source = dict(self.size_fields).get(name)
        origin = f'config `{source}` of "{self.location}"' if source else None
        return Dim(f"{model}.{name}", size, origin)

    @property
    def kept(self) -> Kept | None:
        """The part of the vocabulary that it keeps, itself or by what its weights are copied from."""
        if self.build.kept is not None or self.build.origin is None:
            return self.build.kept
        return self.build.origin.kept

    @property
    def quantised(self) -> Quantised | None:
        """How its weights are quantised: by the spec, or as they were saved."""
        if self.build.quantised is not None or self.build.kind != "hf":
            return self.build.quantised
        saved = self.config.get("quantization_config")
        if not isinstance(saved, Mapping):
            return None
        bits = 4 if saved.get("load_in_4bit") else 8 if saved.get("load_in_8bit") else saved.get("bits", 0)
        return Quantised(str(saved.get("quant_method", "unknown")), bits if isinstance(bits, int) else 0)

    @property
    def causal(self) -> bool:
        """Whether position i of its logits predicts token i + 1."""
        return self.task == "causal_lm"

    @property
    def left_to_right(self) -> bool:
        """Whether a token sees those before it and itself alone: the last one then stands for a text, not the first."""
        from gkd_dsl.models.families import FAMILIES

        family = FAMILIES.get(self.family or "")
        return self.causal or (family is not None and family.decoder)
