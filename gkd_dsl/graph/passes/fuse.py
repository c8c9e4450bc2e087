"""Fuse: which losses read the same logits.

The step computes each of them on the whole logits; the groups say which could share one pass over the vocabulary.
`gkd explain` shows them.
"""

from __future__ import annotations

from gkd_dsl.graph.plan import Apply, Instruction

_OVER_LOGITS = ("kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy", "cross_entropy")


def logit_groups(program: tuple[Instruction, ...]) -> tuple[tuple[str, ...], ...]:
    """Groups of two losses or more over the same student logits, by their keys."""
    groups: dict[str, list[str]] = {}
    for step in program:
        if isinstance(step, Apply) and step.op in _OVER_LOGITS:
            groups.setdefault(dict(step.inputs)["student"], []).append(step.key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)
