"""Losses: values per position, never reduced. The step counts and averages them."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

_TEMPERATURE = "temperature: schedule = 1.0 in 0.01 ..= 1000.0"
_ROW = "one softmax row of logits"
_FEATURES = "one vector (mean over its features), or one cell of a map whose last axis is L"


def _divergence(name: str, t2: str, extra: str = "") -> tuple[str, str]:
    """The overloads of a loss on two rows of logits: equal sizes, and cut to a common vocabulary."""
    options = f"{_TEMPERATURE}, t2: bool = {t2}{extra}"
    return (
        f"{name}(student: Float[..., C] <- teacher: Float[..., C], {options}, "
        'align: text = "exact") -> Loss[...] where align == "exact"',
        f"{name}(student: Float[..., C] <- teacher: Float[..., K], {options}, "
        "align: text, vocabulary: int in 1 ..= 100000000) -> Loss[...] "
        'where align == "trim", vocabulary <= C, vocabulary <= K',
    )


def _features(name: str, extra: str = "") -> tuple[str, ...]:
    """The overloads of a loss between features: a map over tokens, a number per sample, a vector."""
    return (
        f"{name}(student: Float[..., L] <- teacher: Float[..., L]{extra}, causal: bool = false) -> Loss[..., L]",
        f"{name}(student: Float[B] <- teacher: Float[B]{extra}, causal: bool = false) -> Loss[B]",
        f"{name}(student: Float[..., H] <- teacher: Float[..., H]{extra}, causal: bool = false) -> Loss[...]",
    )


OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "cross_entropy",
        "loss",
        (
            "cross_entropy(student: Float[..., C], labels: Int[...], "
            "label_smoothing: float = 0.0 in 0.0 ..= 1.0) -> Loss[...]",
        ),
        "Cross entropy with class or token ids; a label of -100 gives 0 and does not count.",
        "-log softmax(student)[label]",
        positions=_ROW,
        next_token=True,
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "squared_error",
        "loss",
        (
            "squared_error(student: Float[B], labels: Tensor[B]) -> Loss[B]",
            "squared_error(student: Float[B, 1], labels: Tensor[B]) -> Loss[B]",
        ),
        'Squared difference of a predicted number from the label, for `task = "regression"`.',
        "(student - label)^2",
        positions="one number per text",
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "soft_cross_entropy",
        "loss",
        _divergence("soft_cross_entropy", "true"),
        "Cross entropy with the teacher's softened distribution; it differs from `kl` by the teacher's entropy.",
        "T^2 * -sum_c softmax(teacher / T)_c log softmax(student / T)_c",
        "Hinton et al., 2015, arXiv 1503.02531",
        positions=_ROW,
        next_token=True,
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "kl",
        "loss",
        _divergence("kl", "true"),
        "Kullback-Leibler divergence of the student from the teacher, the usual soft-label loss; T^2 by default.",
        "T^2 * sum_c p_c (log p_c - log q_c), p = softmax(teacher / T), q = softmax(student / T)",
        "Hinton et al., 2015, arXiv 1503.02531",
        positions=_ROW,
        next_token=True,
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "reverse_kl",
        "loss",
        _divergence("reverse_kl", "true"),
        "Divergence with the sides exchanged: the student seeks a mode of the teacher; T^2 by default.",
        "T^2 * sum_c q_c (log q_c - log p_c), p = softmax(teacher / T), q = softmax(student / T)",
        "Gu et al., MiniLLM, ICLR 2024, arXiv 2306.08543",
        positions=_ROW,
        next_token=True,
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "jsd",
        "loss",
        _divergence("jsd", "false", ", beta: schedule = 0.5 in 0.0 ..= 1.0"),
        "Generalized Jensen-Shannon divergence; beta = 0 is `kl` and beta = 1 is `reverse_kl` (not the limits, "
        "which are 0). No T^2 by default.",
        "beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q, p the teacher's, q the student's softmax",
        "Agarwal et al., ICLR 2024, arXiv 2306.13649",
        positions=_ROW,
        next_token=True,
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "tvd",
        "loss",
        _divergence("tvd", "false"),
        "Total variation distance, between 0 and 1. No T^2 by default.",
        "0.5 * sum_c |p_c - q_c|, p = softmax(teacher / T), q = softmax(student / T)",
        "Wen et al., ACL 2023, arXiv 2307.15190",
        positions=_ROW,
        next_token=True,
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "mse",
        "loss",
        _features("mse"),
        "Squared difference: mean over the features of a vector, or cell by cell of a map over tokens.",
        "mean_h (student_h - teacher_h)^2",
        "Jiao et al., TinyBERT, Findings of EMNLP 2020, arXiv 1909.10351",
        positions=_FEATURES,
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "normalized_mse",
        "loss",
        ("normalized_mse(student: Float[..., H] <- teacher: Float[..., H]) -> Loss[...]",),
        "Squared difference of the vectors scaled to length 1, mean over the features.",
        "mean_h (student_h / |student| - teacher_h / |teacher|)^2",
        "Sun et al., PKD, EMNLP 2019, arXiv 1908.09355",
        positions="one vector",
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "cosine_distance",
        "loss",
        ("cosine_distance(student: Float[..., H] <- teacher: Float[..., H]) -> Loss[...]",),
        "One minus the cosine of the angle between the vectors; 1 where one of them is zero.",
        "1 - student . teacher / (|student| |teacher|)",
        "Sanh et al., DistilBERT, 2019, arXiv 1910.01108",
        positions="one vector",
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "smooth_l1",
        "loss",
        _features("smooth_l1", ", beta: float = 1.0 in 0.000001 ..= 1000000.0"),
        "Squared below `beta`, absolute above it, with slope 1 there; mean over the features.",
        "0.5 d^2 / beta where |d| < beta, |d| - 0.5 beta elsewhere; d = student - teacher",
        "Girshick, ICCV 2015, arXiv 1504.08083",
        positions=_FEATURES,
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "huber",
        "loss",
        _features("huber", ", delta: float = 1.0 in 0.000001 ..= 1000000.0"),
        "Squared below `delta`, absolute above it, with slope `delta` there; mean over the features.",
        "0.5 d^2 where |d| < delta, delta (|d| - 0.5 delta) elsewhere; d = student - teacher",
        "Huber, Annals of Mathematical Statistics 35, 1964",
        positions=_FEATURES,
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "attention_kl",
        "loss",
        (
            "attention_kl(student: Float[B, A, L, L] <- teacher: Float[B, A, L, L], "
            "temperature: schedule = 1.0 in 0.01 ..= 1000.0, causal: bool = false) -> Loss[B, A, L]",
        ),
        "Divergence of attention rows, from scores: softmax over the valid keys (with `causal`, up to the query).",
        "sum_k p_k (log p_k - log q_k), p = softmax_k(teacher / T), q = softmax_k(student / T)",
        "Wang et al., MiniLM, NeurIPS 2020, arXiv 2002.10957",
        positions="one query token of one head",
        masked=True,
        carries_dims=True,
    ),
    OpSpec(
        "mean",
        "loss",
        ("mean(x: Float[B]) -> Loss[B]", "mean(x: Float[B, L]) -> Loss[B, L]"),
        "A tensor of values per sample or per token, taken as a loss.",
        "x",
        positions="one value of x",
        masked=True,
        carries_dims=True,
    ),
)
