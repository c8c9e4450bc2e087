"""What a forward keeps for its backward, and what it needs meanwhile, block by block.

The counts are of the tensors that autograd saves in transformers' own modules, by storage: the input of each matrix
product, query, key, value and output of attention, what a norm and an activation save, the noise of dropout. Under
autocast to bf16 each matrix product saves a half-precision copy of its input; norms and the residual stream stay fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gkd_dsl.models.info import ModelInfo
from gkd_dsl.planning.parameters import config_value

FULL = 4
"""Bytes of an fp32 number."""

_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
_DROPOUT = ("hidden_dropout_prob", "resid_pdrop", "dropout")


@dataclass(frozen=True)
class Shape:
    """A micro-batch on one device, and how it is computed: `rows` x `length` tokens, `half` for bf16."""

    rows: int
    length: int
    half: bool = False
    cpu: bool = False

    @property
    def tokens(self) -> int:
        """Tokens with their padding."""
        return self.rows * self.length

    @property
    def element(self) -> int:
        """Bytes of what a matrix product gives."""
        return 2 if self.half else FULL


@dataclass(frozen=True)
class Sizes:
    """The widths that count: residual stream, attention over all heads, keys, feed-forward, heads, and how many of it.

    `inner` is the width inside a block where it has one of its own; `parts` are the feed-forward parts of a block.
    """

    H: int
    attention: int
    keys: int
    F: int
    heads: int
    blocks: int
    inner: int
    parts: int
    V: int

    @staticmethod
    @lru_cache(maxsize=64)
    def of(info: ModelInfo) -> Sizes:
        """The sizes of a model; those that it does not say are those of the usual transformer."""
        H = info.size("H") or 1
        A, D = info.size("A") or 1, info.size("D") or H // (info.size("A") or 1)
        parts = int(config_value(info, "num_feedforward_networks") or 1) if info.family == "mobilebert" else 1
        return Sizes(
            H, A * D, (info.size("KV") or A) * D, info.size("F") or 4 * H, A, info.size("N") or 0,
            info.size("I") or H, parts, info.size("V") or 0,
        )  # fmt: skip


def attention_dropout(info: ModelInfo) -> bool:
    """Whether training drops attention probabilities."""
    return any(config_value(info, name) for name in _ATTENTION_DROPOUT)


def hidden_dropout(info: ModelInfo) -> bool:
    """Whether training drops features."""
    return any(config_value(info, name) for name in _DROPOUT)


def kept(info: ModelInfo, shape: Shape, *, scores: bool = False) -> int:
    """Bytes that one block of a forward in training keeps for its backward; `scores`: its attention is tapped."""
    return _features(info, shape) * shape.tokens + _attention(info, shape, scores)


def edge(info: ModelInfo, shape: Shape) -> int:
    """Bytes that the embeddings, the last norm and a language model's head keep, without the logits."""
    size = Sizes.of(info)
    count = 2 if _post_norm(info) else 3
    count += hidden_dropout(info)
    if info.task == "masked_lm" or (info.task == "causal_lm" and _post_norm(info)):
        count += 4
    return count * size.H * FULL * shape.tokens


def transient(info: ModelInfo, shape: Shape, *, scores: bool = False) -> int:
    """Bytes that a block needs while it is computed without a backward: the residual stream and the widest part."""
    size = Sizes.of(info)
    e = shape.element
    stream = 2 * size.H * FULL
    wide = 3 if _gated(info) else 2 if _activation(info) != "gelu_new" else 4
    repeated = 2 * size.attention if size.keys < size.attention else 2 * size.keys
    attend = (size.attention * 2 + size.keys * (2 if size.keys < size.attention else 0) + repeated) * e
    most = max(attend, wide * size.F * e) * shape.tokens
    squares = shape.rows * size.heads * shape.length**2 * FULL
    mask = shape.rows * shape.length**2 * (FULL if not shape.half else 2)
    return stream * shape.tokens + most + mask + (2 * squares if scores else 0)


def backward(info: ModelInfo, shape: Shape, *, scores: bool = False) -> int:
    """Bytes of gradients that a block needs while its backward runs."""
    size = Sizes.of(info)
    squares = 0
    if scores or (shape.cpu and attention_dropout(info)):
        squares = shape.rows * size.heads * shape.length**2 * FULL
    return 2 * size.H * FULL * shape.tokens + max((1 + _gated(info)) * size.F * shape.element * shape.tokens, squares)


def scores_bytes(info: ModelInfo, shape: Shape) -> int:
    """Bytes of a map over all heads and pairs of tokens."""
    return shape.rows * (info.size("A") or 1) * shape.length**2 * shape.element


def _features(info: ModelInfo, shape: Shape) -> int:
    """Bytes a token of one block."""
    size = Sizes.of(info)
    noise = (FULL if shape.cpu else 1) if not shape.half or not shape.cpu else 2
    dropped = {"distilbert": 1}.get(info.family or "", 2) * size.H * noise if hidden_dropout(info) else 0
    if info.family == "mobilebert":
        narrow = size.inner != size.H
        inside = 11 + 2 * (size.parts - 1) if narrow else 8 + 2 * (size.parts - 1)
        e = 3 if shape.half else FULL
        return (2 * size.H * narrow + inside * size.inner + size.parts * size.F) * e
    if _rotary(info):
        extra = 2 * (size.attention + size.keys) if info.family == "qwen3" else 0
        if shape.half:
            return 4 * size.H * FULL + 2 * (5 * size.H + 4 * size.attention + 4 * size.F) + 3 * extra
        return FULL * (6 * size.H + 4 * size.attention + 4 * size.F + extra)
    wide = {"gelu_new": 5, "relu": 1}.get(_activation(info), 2)
    if shape.half:
        # Under autocast what is raised to a power is fp32 on a GPU, and attention with dropout is fp32 on the CPU.
        wide_bytes = 16 if wide == 5 and not shape.cpu else 2 * wide
        asked = 3 * (FULL if shape.cpu and attention_dropout(info) else 2)
        inputs = 3 if info.family == "gpt2" else 5
        return (2 * FULL + 2 * inputs + asked) * size.H + wide_bytes * size.F + dropped
    return FULL * (8 * size.H + wide * size.F) + dropped


def _attention(info: ModelInfo, shape: Shape, scores: bool) -> int:
    """Bytes that attention keeps besides query, key, value and output."""
    size = Sizes.of(info)
    pairs = shape.rows * shape.length**2
    squares = pairs * size.heads * FULL
    dropped = attention_dropout(info)
    noise = squares if shape.cpu else squares // 4
    if scores:
        return 2 * squares + noise if dropped else 2 * squares
    if dropped and shape.cpu:
        return 3 * squares
    return pairs * shape.element + shape.tokens * size.heads * FULL


def _post_norm(info: ModelInfo) -> bool:
    return not _rotary(info) and info.family != "gpt2"


def _rotary(info: ModelInfo) -> bool:
    return info.family in ("llama", "mistral", "qwen2", "qwen3")


def _gated(info: ModelInfo) -> bool:
    return _rotary(info)


def _activation(info: ModelInfo) -> str:
    return str(
        config_value(info, "hidden_act")
        or config_value(info, "activation_function")
        or config_value(info, "activation")
        or "gelu"
    )
