"""Which tokens of a text matter, by a map of scores: indices that both sides of a loss are read at."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "salient_tokens",
        "tensor",
        (
            "salient_tokens(scores: Float[B, A, L, L], count: int in 1 ..= 1000000, causal: bool = false) "
            "-> Int[B, count]",
        ),
        "The tokens that a map gives the most weight, best first: the softmax of its rows, summed over heads and "
        "queries. -1 where a text has fewer.",
        "top_k sum_h sum_q softmax_k(scores[h, q])_k",
        "Liu et al., MGSKD, ACL 2022",
        masked=True,
    ),
    OpSpec(
        "related_tokens",
        "tensor",
        (
            "related_tokens(scores: Float[B, A, L, L], anchors: Int[B, n], count: int in 1 ..= 1000000, "
            "causal: bool = false) -> Int[B, n, count]",
        ),
        "For each anchor the other tokens with the greatest scores, summed over heads, best first. -1 where a text "
        "has fewer, and for an anchor of -1.",
        "top_k sum_h scores[h, anchor, k], k != anchor",
        "Liu et al., MGSKD, ACL 2022",
        masked=True,
    ),
)
