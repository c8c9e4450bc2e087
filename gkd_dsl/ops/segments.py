"""Spans of neighbouring tokens, each at its first token, so that masks and losses over tokens speak of spans."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

_SHARE = "share: float = 0.4 in 0.0 ..= 1.0"

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "segment_starts",
        "mask",
        (f"segment_starts(x: Tensor[B, L], {_SHARE}) -> Bool[B, L]",),
        "The first token of each of `share` times n near-equal spans of a text, n its tokens where x is not 0; at "
        "least one span.",
        "token r of n starts span floor(r m / n) where that of r - 1 is another, m = max(1, round(share n))",
        "Liu et al., MGSKD, ACL 2022",
    ),
    OpSpec(
        "random_segment_starts",
        "mask",
        (f"random_segment_starts(x: Tensor[B, L], {_SHARE}) -> Bool[B, L]",),
        "As `segment_starts`, the spans cut at places drawn anew at each step.",
        "the first token and m - 1 others, each choice of them as likely, m = max(1, round(share n))",
        "Liu et al., MGSKD, ACL 2022",
        random=True,
    ),
    OpSpec(
        "segment_mean",
        "tensor",
        ("segment_mean(x: Float[B, L, H], starts: Bool[B, L]) -> Float[B, L, H]",),
        "The mean over the valid tokens of each span, at the token that starts it; 0 elsewhere.",
        "y_l = mean of x_l to x_(k - 1), k the next start; 0 where l starts no span",
        "Liu et al., MGSKD, ACL 2022",
        masked=True,
    ),
)
