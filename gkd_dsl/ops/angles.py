"""Angles between triples of vectors: at a token, over layers, over the samples of a micro-batch."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

_ERROR = ' where error == "squared" or error == "smooth_l1"'
_HEADS = "heads: int = 1 in 1 ..= 1000000"


OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "token_angle",
        "loss",
        (
            "token_angle(student: Float[B, L, H] <- teacher: Float[B, L, K], window: int = none in 3 ..= 1000000, "
            'error: text = "squared", denominator: text = "pairs") -> Loss[B, L]'
            f'{_ERROR}, window % 2 == 1, denominator == "pairs" or denominator == "window"',
        ),
        "Difference of the angles that two other tokens of a text make at a token, mean over all such pairs that "
        "count, or over the pairs of a window around it; widths may differ. In bounded memory, by chunks.",
        "mean_(a != b) (cos_s(a, j, b) - cos_t(a, j, b))^2, cos(a, j, b) of x_j - x_a and x_j - x_b; "
        'denominator = "window" divides by window^2',
        "Park et al., CKD, EMNLP 2021, arXiv 2109.08359",
        positions="one token, the vertex of its angles",
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "layer_angle",
        "loss",
        (
            "layer_angle(student: Float[..., H, n] <- teacher: Float[..., K, n], "
            f'error: text = "squared") -> Loss[...]{_ERROR}, n >= 3',
        ),
        "Difference of the angles between three stacked layers at one place, mean over all triples; widths may "
        "differ: `layer_angle(stack(a, b, c) <- stack(d, e, f))`.",
        "mean over distinct i, j, k of (cos_s(i, j, k) - cos_t(i, j, k))^2, cos(i, j, k) of x_j - x_i and x_j - x_k",
        "Park et al., CKD, EMNLP 2021, arXiv 2109.08359",
        positions="one place, its triples of layers together",
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "sample_angle",
        "loss",
        (
            f"sample_angle(student: Float[B, H] <- teacher: Float[B, K], {_HEADS}, "
            f'error: text = "smooth_l1") -> Loss[B]{_ERROR}, H % heads == 0, K % heads == 0',
        ),
        "Difference of the angles that two other samples of the micro-batch make at a sample, in each head, mean over "
        "heads and pairs; 0 with fewer than three samples. In bounded memory, by chunks.",
        "mean over heads and a != b of smooth_l1(cos_s(a, i, b) - cos_t(a, i, b)), cos(a, i, b) of x_i - x_a and "
        "x_i - x_b",
        "Liu et al., MGSKD, ACL 2022",
        positions="one sample, the vertex of its angles",
        masked=True,
        carries_dims=True,
        across_samples=True,
    ),
    OpSpec(
        "anchor_angle",
        "loss",
        (
            "anchor_angle(student: Float[B, L, H] <- teacher: Float[B, L, K], anchors: Int[B, n], "
            f'neighbours: Int[B, n, m], error: text = "smooth_l1") -> Loss[B]{_ERROR}',
        ),
        "Difference of the angles that chosen tokens make at chosen tokens, mean over the pairs of all anchors of a "
        "text; both sides are read at the same tokens. An index of -1 is none.",
        "mean over anchors i and neighbours a != b of i of smooth_l1(cos_s(a, i, b) - cos_t(a, i, b))",
        "Liu et al., MGSKD, ACL 2022",
        positions="one text",
        masked=True,
        carries_dims=True,
    ),
)
