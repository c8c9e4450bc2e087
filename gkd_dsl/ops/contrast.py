"""Contrastive losses: a sample against the other samples of its micro-batch."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "contrastive",
        "loss",
        (
            'contrastive(student: Float[B, H] <- teacher: Float[B, H], negatives: text = "teacher") -> Loss[B] '
            'where negatives == "teacher" or negatives == "student"',
            'contrastive(student: Float[B, L, H] <- teacher: Float[B, L, H], negatives: text = "teacher") '
            '-> Loss[B, L] where negatives == "teacher" or negatives == "student"',
        ),
        "Contrastive loss of cosines (COS-NCE): near the teacher's own vector, far from those of the other samples of "
        "the micro-batch, at one position; a sample alone has no negatives.",
        "g(s_a, t_a) + mean_(b != a) (2 - g(s_a, t_b)) / 2, g = 1 - cos; g(t_a, s_b) for student negatives",
        "Fu et al., LRC-BERT, AAAI 2021, arXiv 2012.07335",
        positions="one vector",
        masked=True,
        carries_dims=True,
        across_samples=True,
    ),
)
