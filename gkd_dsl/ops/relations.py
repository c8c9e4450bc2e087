"""Relations between the tokens of a text: maps [.., L, L] made of features."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "gram",
        "tensor",
        ("gram(x: Float[B, L, H]) -> Float[B, L, L]",),
        "Inner products of all tokens of a text, divided by the number of features.",
        "x x^T / H",
        "Huang and Wang, NST, 2017, arXiv 1707.01219",
    ),
    OpSpec(
        "self_relation",
        "tensor",
        (
            "self_relation(x: Float[B, L, H], heads: int in 1 ..= 1000000) -> Float[B, heads, L, L] "
            "where H % heads == 0",
            "self_relation(x: Float[B, A, L, D]) -> Float[B, A, L, L]",
            "self_relation(x: Float[B, A, L, D], heads: int in 1 ..= 1000000) -> Float[B, heads, L, L] "
            "where A * D % heads == 0",
        ),
        "Scores of a tensor with itself, as in attention; `heads` cuts the features of a token anew.",
        "x x^T / sqrt(d) in each head, d the features of a head",
        "Wang et al., MiniLMv2, Findings of ACL 2021, arXiv 2012.15828",
    ),
    OpSpec(
        "relation",
        "tensor",
        (
            "relation(a: Float[B, L, H], b: Float[B, L, H], heads: int in 1 ..= 1000000) -> Float[B, heads, L, L] "
            "where H % heads == 0",
            "relation(a: Float[B, A, L, D], b: Float[B, A, L, D]) -> Float[B, A, L, L]",
            "relation(a: Float[B, A, L, D], b: Float[B, A, L, D], heads: int in 1 ..= 1000000) "
            "-> Float[B, heads, L, L] where A * D % heads == 0",
        ),
        "Scores of one tensor's tokens with another's, as in attention.",
        "a b^T / sqrt(d) in each head, d the features of a head",
        "Wang et al., MiniLMv2, Findings of ACL 2021, arXiv 2012.15828",
    ),
)
