"""Metrics: measured over a whole held-out set, never trained."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "accuracy",
        "metric",
        ("accuracy(student: Float[..., C], labels: Int[...]) -> float",),
        "Share of positions whose largest logit is that of the label; -100 does not count.",
        "mean(argmax student == label)",
        next_token=True,
        masked=True,
    ),
    OpSpec(
        "agreement",
        "metric",
        ("agreement(student: Float[..., C] <- teacher: Float[..., C]) -> float",),
        "Share of positions where student and teacher give the same answer.",
        "mean(argmax student == argmax teacher)",
        next_token=True,
        masked=True,
    ),
    OpSpec(
        "mean_loss",
        "metric",
        ("mean_loss(x: Loss[...], causal: bool = false) -> float",),
        "A loss over the whole set: sum over its counted positions by their number.",
        "sum(values) / count",
        masked=True,
        carries_dims=True,
        greater_is_better=False,
    ),
    OpSpec(
        "perplexity",
        "metric",
        ("perplexity(x: Loss[...]) -> float",),
        "Exponential of a cross entropy over the whole set.",
        "exp(sum(values) / count)",
        masked=True,
        carries_dims=True,
        greater_is_better=False,
    ),
    OpSpec(
        "f1",
        "metric",
        (
            'f1(student: Float[..., C], labels: Int[...], average: text = "binary", positive: int = 1 '
            'in 0 ..= 1000000) -> float where average == "binary" or average == "macro" or average == "micro"',
        ),
        "Harmonic mean of precision and recall: of one class, or of all classes (`macro`, `micro`).",
        "2 tp / (2 tp + fp + fn)",
        masked=True,
    ),
    OpSpec(
        "matthews",
        "metric",
        ("matthews(student: Float[..., C], labels: Int[...]) -> float",),
        "Matthews correlation of predicted and true classes, for two classes or more.",
        "cov(y, z) / sqrt(cov(y, y) cov(z, z)) over one-hot classes",
        "Gorodkin, Computational Biology and Chemistry 28, 2004",
        masked=True,
    ),
    OpSpec(
        "pearson",
        "metric",
        (
            "pearson(student: Float[B], labels: Tensor[B]) -> float",
            "pearson(student: Float[B, 1], labels: Tensor[B]) -> float",
        ),
        "Linear correlation of predicted numbers with the labels, or of any two series.",
        "cov(x, y) / (std x std y)",
        masked=True,
    ),
    OpSpec(
        "spearman",
        "metric",
        (
            "spearman(student: Float[B], labels: Tensor[B]) -> float",
            "spearman(student: Float[B, 1], labels: Tensor[B]) -> float",
        ),
        "Rank correlation of predicted numbers with the labels, or of any two series.",
        "pearson of the ranks (ties share their mean rank)",
        masked=True,
    ),
    OpSpec(
        "r2",
        "metric",
        (
            "r2(student: Float[B], labels: Tensor[B]) -> float",
            "r2(student: Float[B, 1], labels: Tensor[B]) -> float",
        ),
        "Share of the labels' variance that the predicted numbers explain.",
        "1 - sum (y - x)^2 / sum (y - mean y)^2",
        masked=True,
    ),
    OpSpec(
        "similarity_spearman",
        "metric",
        ("similarity_spearman(student: Float[B, H] <- teacher: Float[B, K]) -> float",),
        "How alike two spaces order all pairs of texts: rank correlation of their pairwise cosine similarities.",
        "spearman(cos(x_i, x_j), cos(y_i, y_j)) over all i < j of the held-out set",
        "Reimers and Gurevych, Sentence-BERT, EMNLP 2019, arXiv 1908.10084",
        masked=True,
    ),
)
