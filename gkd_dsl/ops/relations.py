"""Relations between the tokens of a text, or between layers: maps [.., L, L] or [.., n, n] made of features."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

_MAPS = (
    ("B, L, L", "B, L", ", causal: bool = false"),
    ("B, A, L, L", "B, A, L", ", causal: bool = false"),
    ("B, L, n, n", "B, L, n", ""),
    ("B, n, n", "B, n", ""),
)
"""What a map relates, what one row of it stands for, and what else the loss between two such maps takes."""


def _row_loss(axes: str, rows: str, more: str, denominator: str) -> str:
    """The overload of a loss between two maps whose values are its rows, or its cells."""
    given = ' = "rows"' if denominator == "rows" else ""
    return (
        f"relation_kl(student: Float[{axes}] <- teacher: Float[{axes}], "
        "temperature: schedule = 1.0 in 0.01 ..= 1000.0, diagonal: bool = false"
        f"{more}, denominator: text{given}) -> Loss[{rows if denominator == 'rows' else axes}] "
        f'where denominator == "{denominator}"'
    )


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
    OpSpec(
        "cosine_relation",
        "tensor",
        (
            "cosine_relation(x: Float[B, L, H]) -> Float[B, L, L]",
            "cosine_relation(x: Float[B, A, L, D]) -> Float[B, A, L, L]",
        ),
        "Cosines of the angles between the vectors of all tokens of a text.",
        "x_a . x_b / (|x_a| |x_b|)",
        "Park et al., CKD, EMNLP 2021, arXiv 2109.08359",
        masked=True,
    ),
    OpSpec(
        "layer_relation",
        "tensor",
        ("layer_relation(x: Float[..., H, n]) -> Float[..., n, n]",),
        "Cosines between the vectors that stacked layers have at one place: `layer_relation(stack(a, b, c))`.",
        "x_i . x_j / (|x_i| |x_j|), i and j layers",
        "Park et al., CKD, EMNLP 2021, arXiv 2109.08359",
    ),
    OpSpec(
        "relation_kl",
        "loss",
        tuple(_row_loss(*a_map, denominator) for denominator in ("rows", "pairs") for a_map in _MAPS),
        "Divergence of the rows of two maps of relations: softmax over the others that count, each row's own cell left "
        'out unless `diagonal`. Each row counts once; with denominator = "pairs" each cell does, its own included.',
        "sum_k p_k (log p_k - log q_k), p = softmax_k(teacher / T), q = softmax_k(student / T), k not the row itself",
        "Park et al., CKD, EMNLP 2021, arXiv 2109.08359",
        positions="one row of a map, or with pairs one cell",
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "sample_relation_kl",
        "loss",
        (
            "sample_relation_kl(student: Float[B, H] <- teacher: Float[B, K], "
            "temperature: schedule = 1.0 in 0.01 ..= 1000.0) -> Loss[B]",
        ),
        "Divergence of the relations of a sample with the others of the micro-batch, softmax of cosines; widths may "
        "differ, and a sample alone has none.",
        "sum_b p_b (log p_b - log q_b), p = softmax_(b != a)(cos(t_a, t_b) / T), q the student's",
        positions="one sample",
        masked=True,
        carries_dims=True,
        across_samples=True,
    ),
)
