"""Tiny models of many families as configs in a temporary folder, and typed specs over pairs of them."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

_KEPT = tempfile.TemporaryDirectory(prefix="gkd-zoo-")
ROOT = Path(_KEPT.name)
ENCODERS, DECODERS = ("bert", "roberta", "distilbert"), ("gpt2", "llama", "qwen2", "qwen3")
_NAMES = {
    "bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "gpt2": "GPT2", "llama": "Llama",
    "qwen2": "Qwen2", "qwen3": "Qwen3",
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A model by its sizes."""

    family: str
    task: str
    N: int
    A: int
    KV: int
    D: int
    H: int
    V: int = 23
    C: int = 2
    words: str = "w"

    @property
    def q(self) -> int:
        return self.A * self.D

    @property
    def kv(self) -> int:
        return self.KV * self.D

    @property
    def folder(self) -> str:
        return _folder(self)

    def config(self) -> dict:
        head = {"classification": "ForSequenceClassification", "masked_lm": "ForMaskedLM", "causal_lm": "ForCausalLM"}[
            self.task
        ]
        if self.family == "gpt2" and self.task == "causal_lm":
            head = "LMHeadModel"
        common = {
            "architectures": [_NAMES[self.family] + head], "model_type": self.family, "vocab_size": self.V,
            "initializer_range": 0.3, "pad_token_id": 0, "id2label": {str(n): f"L{n}" for n in range(self.C)},
            "label2id": {f"L{n}": n for n in range(self.C)},
        }  # fmt: skip
        if self.family == "distilbert":
            return common | {
                "dim": self.H,
                "n_layers": self.N,
                "n_heads": self.A,
                "hidden_dim": 12,
                "max_position_embeddings": 32,
            }
        if self.family == "gpt2":
            ends = {"bos_token_id": 1, "eos_token_id": 2}
            return (
                common
                | ends
                | {"n_embd": self.H, "n_layer": self.N, "n_head": self.A, "n_inner": 12, "n_positions": 32}
            )
        sizes = {
            "hidden_size": self.H, "num_hidden_layers": self.N, "num_attention_heads": self.A,
            "intermediate_size": 12, "max_position_embeddings": 32,
        }  # fmt: skip
        if self.family in ENCODERS:
            return common | sizes
        sizes |= {"num_key_value_heads": self.KV, "bos_token_id": 1, "eos_token_id": 2}
        return common | sizes | ({"head_dim": self.D} if self.family == "qwen3" else {})


@cache
def _folder(model: Tiny) -> str:
    name = f"m{len(list(ROOT.iterdir()))}"
    place = ROOT / name
    place.mkdir()
    (place / "config.json").write_text(json.dumps(model.config()))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{model.words}{n}" for n in range(model.V - 5))]
    (place / "vocab.txt").write_text("\n".join(words) + "\n")
    return name


@cache
def rows() -> None:
    (ROOT / "rows.csv").write_text("text,label\na b,0\nb c,1\n")
    (ROOT / "lines.txt").write_text("a b\nb c\n")


@st.composite
def tinies(draw, family: str, task: str, classes: int) -> Tiny:
    heads = draw(st.sampled_from([1, 2, 4]))
    kv = (
        draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
        if family in ("llama", "qwen2", "qwen3")
        else heads
    )
    width = draw(st.sampled_from([4, 6]))
    hidden = draw(st.sampled_from([8, 12])) if family == "qwen3" else heads * width
    return Tiny(family, task, draw(st.integers(1, 3)), heads, kv, width, hidden, C=classes)


@st.composite
def pairs(draw) -> tuple[Tiny, Tiny]:
    """(teacher, student): both encoders or both decoders, with one head."""
    families, language = draw(st.sampled_from([(ENCODERS, "masked_lm"), (DECODERS, "causal_lm")]))
    task, classes = draw(st.sampled_from(["classification", language])), draw(st.integers(2, 4))
    t, s = (draw(tinies(draw(st.sampled_from(families)), task, classes)) for _ in range(2))
    return t, s


@dataclass(frozen=True)
class Loss:
    """A loss expression with the projections that it declares (lines)."""

    text: str
    projections: tuple[str, ...] = ()


_SCALE = st.integers(1, 40).map(lambda n: n / 10)


def _state(draw, name: str, model: Tiny, layer: str | None = None) -> str:
    if layer is not None:
        return f"{name}.layer[{layer}].{draw(st.sampled_from(['out', 'in', 'mlp', 'attn.out']))}"
    index = draw(st.integers(-model.N, model.N - 1))
    return draw(
        st.sampled_from([
            f"{name}.embed", f"{name}.final", f"{name}.hidden[{draw(st.integers(0, model.N))}]",
            f"{name}.layer[{index}].out", f"{name}.layer[{index}].mlp", f"{name}.layer[{index}].attn.out",
        ])
    )  # fmt: skip


def _mapped(draw, t: Tiny, s: Tiny, body: str) -> str:
    """`body` with i and j over a layer map."""
    maps = ["all_pairs(s.layer, t.layer)", f"[[{s.N - 1}, {t.N - 1}], [0, 0]]"]
    if s.N <= t.N:
        maps += ["uniform(s.layer, t.layer)", "first(s.layer, t.layer)", "last(s.layer, t.layer, include_last = true)"]
    if t.N % s.N == 0:
        maps += ["skip(s.layer, t.layer, include_last = true)", "stride(s.layer, t.layer)"]
    return f"{draw(st.sampled_from(['sum', 'mean']))}({body} for (i, j) in {draw(st.sampled_from(maps))})"


@st.composite
def losses(draw, t: Tiny, s: Tiny, number: int) -> Loss:
    """A well-typed loss between the two."""
    tokens = s.task != "classification"
    kinds = ["state", "state", "mapped", "logits", "relation", "gram", "row"]
    kinds += ["labels"] + ["attention"] * 2 * (s.A == t.A)
    kind = draw(st.sampled_from(kinds))
    mask = draw(st.sampled_from(["", ", mask = batch.labels != -100"])) if tokens else ""
    if kind == "labels":
        return Loss("cross_entropy(s.logits, batch.labels)")
    if kind == "logits":
        name = draw(st.sampled_from(["kl", "reverse_kl", "soft_cross_entropy", "jsd", "tvd"]))
        return Loss(f"{name}(s.logits <- t.logits, temperature = {draw(_SCALE)}{mask})")
    if kind == "attention":
        part = draw(st.sampled_from(["scores", "probs"]))
        name = draw(st.sampled_from(["attention_kl", "mse"])) if part == "scores" else "mse"
        if draw(st.booleans()):
            return Loss(_mapped(draw, t, s, f"{name}(s.layer[i].attn.{part} <- t.layer[j].attn.{part})"))
        return Loss(f"{name}(s.layer[-1].attn.{part} <- t.layer[{draw(st.integers(0, t.N - 1))}].attn.{part})")
    if kind == "relation":
        part = draw(st.sampled_from("qkv"))
        sizes = (s.q, t.q) if part == "q" else (s.kv, t.kv)
        heads = draw(st.sampled_from([h for h in range(1, 5) if sizes[0] % h == 0 and sizes[1] % h == 0]))
        one, two = (f"self_relation({name}.layer[-1].attn.{part}, heads = {heads})" for name in "st")
        return Loss(f"{draw(st.sampled_from(['attention_kl', 'mse']))}({one} <- {two})")
    if kind == "gram":
        return Loss(f"mse(gram({_state(draw, 's', s)}) <- gram({_state(draw, 't', t)}))")
    name = draw(st.sampled_from(["mse", "cosine_distance", "normalized_mse", "smooth_l1", "huber"]))
    pipe, lines = "", ()
    if s.H != t.H or draw(st.booleans()):
        bias = draw(st.sampled_from(["true", "false"]))
        pipe, lines = f" |> P{number}", (f"project P{number} = linear(s.H -> t.H, bias = {bias})",)
    if kind == "mapped":
        return Loss(
            _mapped(draw, t, s, f"{name}({_state(draw, 's', s, 'i')}{pipe} <- {_state(draw, 't', t, 'j')})"), lines
        )
    if kind == "row":
        how = draw(st.sampled_from(["cls", "pool"]))
        return Loss(f"{name}({how}({_state(draw, 's', s)}){pipe} <- {how}({_state(draw, 't', t)}))", lines)
    return Loss(f"{name}({_state(draw, 's', s)}{pipe} <- {_state(draw, 't', t)}{mask})", lines)


WEIGHTS = st.one_of(
    _SCALE.map(str),
    st.tuples(_SCALE, _SCALE).map(lambda ab: f"ramp({ab[0]} -> {ab[1]}, until = 50%)"),
    st.tuples(_SCALE, _SCALE).map(lambda ab: f"cosine({ab[0]} -> {ab[1]}, until = 80%)"),
)


@dataclass(frozen=True)
class Spec:
    """A spec over a pair, with a weight for each loss."""

    t: Tiny
    s: Tiny
    losses: tuple[Loss, ...]
    weights: tuple[str, ...]

    def text(self, only: int | None = None) -> str:
        rows()
        chosen = range(len(self.losses)) if only is None else [only]
        lines = [f'teacher t = random_init("{self.t.folder}")', f'student s = random_init("{self.s.folder}")']
        lines += [
            'data d = csv("rows.csv", text = "text", label = "label")'
            if self.s.task == "classification"
            else 'data d = text("lines.txt")'
        ]
        for n in chosen:
            lines += [*self.losses[n].projections, f"loss l{n} = {self.losses[n].text}"]
        total = " + ".join(f"l{n}" if only is not None else f"{self.weights[n]} * l{n}" for n in chosen)
        return "\n".join(["gkd 1", *lines, f"stage main for 10 steps {{\n  minimize {total}\n}}"]) + "\n"

    def changed(self, **sizes) -> Spec:
        """The same spec over a student of other sizes."""
        return replace(self, s=replace(self.s, **sizes))


@st.composite
def specs(draw) -> Spec:
    t, s = draw(pairs())
    count = draw(st.integers(1, 3))
    found = tuple(draw(losses(t, s, n)) for n in range(count))
    return Spec(t, s, found, tuple(draw(WEIGHTS) for _ in range(count)))
