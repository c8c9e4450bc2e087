"""Masks: Bool tensors made of batch columns. They say which positions of a loss count.

The text of a signature cannot use the words `and`, `or` and `not` as names; there they end in `_`.
"""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "valid_tokens",
        "mask",
        ("valid_tokens(x: Tensor[B, L]) -> Bool[B, L]",),
        "Where a column such as `attention_mask` is not 0.",
        "x != 0",
    ),
    OpSpec(
        "and",
        "mask",
        ("and_(a: Bool[...], b: Bool[...]) -> Bool[...]", "and_(a: Bool[B, L], b: Bool[B]) -> Bool[B, L]"),
        "Where both hold.",
        "a and b",
    ),
    OpSpec("or", "mask", ("or_(a: Bool[...], b: Bool[...]) -> Bool[...]",), "Where one of them holds.", "a or b"),
    OpSpec("not", "mask", ("not_(x: Bool[...]) -> Bool[...]",), "Where it does not hold.", "not x"),
    OpSpec(
        "equal",
        "mask",
        (
            "equal(a: Tensor[...], b: Tensor[...]) -> Bool[...]",
            "equal(a: Tensor[...], b: float) -> Bool[...]",
        ),
        "Where a tensor equals a number or another tensor.",
        "a == b",
    ),
    OpSpec(
        "not_equal",
        "mask",
        (
            "not_equal(a: Tensor[...], b: Tensor[...]) -> Bool[...]",
            "not_equal(a: Tensor[...], b: float) -> Bool[...]",
        ),
        "Where a tensor differs from a number or another tensor.",
        "a != b",
    ),
    OpSpec(
        "next_token",
        "mask",
        ("next_token(x: Bool[B, L]) -> Bool[B, L]", "next_token(x: Int[B, L]) -> Int[B, L]"),
        "Shift left by one token; the last position becomes False, or -100 in a column of ids.",
        "y_l = x_(l + 1)",
    ),
)
