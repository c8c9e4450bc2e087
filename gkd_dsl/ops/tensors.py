"""Operators from tensors to tensors: distributions, norms, shapes, arithmetic."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

_TEMPERATURE = "temperature: schedule = 1.0 in 0.01 ..= 1000.0"


def _unary(name: str, doc: str, formula: str) -> OpSpec:
    return OpSpec(name, "tensor", (f"{name}(x: Float[...]) -> Float[...]",), doc, formula)


def _binary(name: str, doc: str, formula: str) -> OpSpec:
    return OpSpec(
        name,
        "tensor",
        (
            f"{name}(a: Float[...], b: Float[...]) -> Float[...]",
            f"{name}(a: Float[...], b: schedule) -> Float[...]",
            f"{name}(a: schedule, b: Float[...]) -> Float[...]",
        ),
        doc,
        formula,
    )


def _compare(name: str, doc: str, formula: str) -> OpSpec:
    return OpSpec(
        name,
        "tensor",
        (
            f"{name}(a: Tensor[...], b: Tensor[...]) -> Bool[...]",
            f"{name}(a: Tensor[...], b: schedule) -> Bool[...]",
            f"{name}(a: schedule, b: Tensor[...]) -> Bool[...]",
        ),
        doc,
        formula,
    )


OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "softmax",
        "tensor",
        (f"softmax(x: Float[..., C], {_TEMPERATURE}) -> Float[..., C]",),
        "Softmax over the last axis.",
        "exp(x_c / T) / sum_k exp(x_k / T)",
    ),
    OpSpec(
        "softmin",
        "tensor",
        (f"softmin(x: Float[..., C], {_TEMPERATURE}) -> Float[..., C]",),
        "Softmax of -x over the last axis: the smallest value gets the largest weight.",
        "exp(-x_c / T) / sum_k exp(-x_k / T)",
    ),
    OpSpec(
        "log_softmax",
        "tensor",
        (f"log_softmax(x: Float[..., C], {_TEMPERATURE}) -> Float[..., C]",),
        "Logarithm of the softmax over the last axis.",
        "x_c / T - log sum_k exp(x_k / T)",
    ),
    OpSpec(
        "entropy",
        "tensor",
        (f"entropy(x: Float[..., C], {_TEMPERATURE}) -> Float[...]",),
        "Entropy, in nats, of the distribution that logits stand for.",
        "-sum_c p_c log p_c, p = softmax(x / T)",
    ),
    OpSpec(
        "l2norm",
        "tensor",
        ("l2norm(x: Float[..., H]) -> Float[..., H]",),
        "Scale the vectors of the last axis to length 1; a zero vector stays zero.",
        "x / max(|x|, 1e-12)",
    ),
    OpSpec(
        "layernorm",
        "tensor",
        ("layernorm(x: Float[..., H], eps: float = 0.00001 in 0.0 ..= 1.0) -> Float[..., H]",),
        "Layer normalisation over the last axis without learned scale or shift.",
        "(x - mean x) / sqrt(var x + eps)",
        "Ba et al., 2016, arXiv 1607.06450",
    ),
    OpSpec(
        "pool",
        "tensor",
        ("pool(x: Float[B, L, H]) -> Float[B, H]",),
        "Mean over the valid tokens of each text (sentence pooling).",
        "sum_l valid_l x_l / sum_l valid_l",
        "Reimers and Gurevych, Sentence-BERT, EMNLP 2019, arXiv 1908.10084",
        masked=True,
    ),
    OpSpec(
        "cls",
        "tensor",
        ("cls(x: Float[B, L, H], last: bool = false) -> Float[B, H]",),
        "The token that stands for a text, at any padding side: the first valid one, the `[CLS]` of an encoder; of a "
        "model whose tokens see only what comes before them the last one, `last = true`, without being asked.",
        "x_l, l the first token with valid_l (the last)",
        masked=True,
    ),
    OpSpec(
        "stack",
        "tensor",
        ("stack(xs: Floats[...]) -> Float[..., n] where n == count(xs)",),
        "Put equal tensors side by side along a new last axis; `index` or `x[i]` takes one out.",
        "y[..., i] = xs_i[...]",
    ),
    OpSpec(
        "concat",
        "tensor",
        ("concat(xs: Floats[..., each]) -> Float[..., total] where total == sum(each)",),
        "Join tensors along their last axis.",
        "y = [xs_0, xs_1, ...]",
    ),
    OpSpec(
        "index",
        "tensor",
        ("index(x: Float[..., n], i: int in -1000000 ..= 1000000) -> Float[...] where i < n, i + n >= 0",),
        "One entry of the last axis; a negative index counts from its end.",
        "x[..., i]",
    ),
    OpSpec(
        "merge_heads",
        "tensor",
        ("merge_heads(x: Float[B, A, L, D]) -> Float[B, L, H] where H == A * D",),
        "Put the heads of a token side by side.",
        "[B, A, L, D] -> [B, L, A D]",
    ),
    OpSpec(
        "split_heads",
        "tensor",
        (
            "split_heads(x: Float[B, L, H], heads: int in 1 ..= 1000000) -> Float[B, heads, L, D] "
            "where H % heads == 0, D == H / heads",
        ),
        "Cut the features of a token into heads.",
        "[B, L, H] -> [B, heads, L, H / heads]",
    ),
    OpSpec(
        "detach",
        "tensor",
        ("detach(x: Tensor[...]) -> Tensor[...]",),
        "The same values, with no gradient through them.",
        "x",
    ),
    OpSpec(
        "project",
        "tensor",
        ("project(x: Float[..., I], block: Float[O, I]) -> Float[..., O]",),
        "A declared linear block on the last axis; `block` has the type of its weight.",
        "W x + b",
    ),
    OpSpec(
        "select",
        "tensor",
        (
            "select(cond: Bool[...], a: Float[...], b: Float[...]) -> Float[...]",
            "select(cond: Bool[...], a: Float[...], b: schedule) -> Float[...]",
            "select(cond: Bool[...], a: schedule, b: Float[...]) -> Float[...]",
            "select(cond: Bool[...], a: schedule, b: schedule) -> Float[...]",
        ),
        "`a` where the condition holds, `b` elsewhere; no gradient to the side that is not taken.",
        "a if cond else b",
    ),
    OpSpec(
        "per_sample",
        "tensor",
        ("per_sample(x: Loss[B, ...], causal: bool = false) -> Float[B]",),
        "The mean of a loss over the positions that count in each sample; 0 for a sample without any.",
        "sum_l valid_l x_l / max(1, sum_l valid_l)",
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "rank_bin",
        "tensor",
        ("rank_bin(x: Float[B], bins: int in 1 ..= 1000000) -> Int[B]",),
        "Which of `bins` equal parts of the micro-batch a sample falls in, from the smallest values on; equal values "
        "keep their order.",
        "floor(bins * rank(x_b) / B), rank from 0",
        across_samples=True,
    ),
    _binary("add", "Sum.", "a + b"),
    _binary("sub", "Difference.", "a - b"),
    _binary("mul", "Product.", "a b"),
    _binary("div", "Quotient.", "a / b"),
    _binary("pow", "Power.", "a^b"),
    _unary("neg", "Negative.", "-x"),
    _unary("log", "Natural logarithm; -inf at 0.", "log x"),
    _unary("exp", "Exponential.", "exp x"),
    _unary("abs", "Absolute value.", "|x|"),
    _unary("tanh", "Hyperbolic tangent.", "tanh x"),
    _unary("sqrt", "Square root; its gradient at 0 is 0.", "sqrt x"),
    _compare("less", "Where a is less than b.", "a < b"),
    _compare("less_equal", "Where a is at most b.", "a <= b"),
    _compare("greater", "Where a is greater than b.", "a > b"),
    _compare("greater_equal", "Where a is at least b.", "a >= b"),
)
