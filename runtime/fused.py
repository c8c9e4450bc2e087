"""Losses over the logits of language models, run with the heads: from a plan's `Fused` to one pass over tiles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gkd_dsl.graph.passes.fuse import fuse, fusions
from gkd_dsl.graph.passes.sparse import TOP_K
from gkd_dsl.graph.plan import Apply, Counted, Fused, HeadPlan, StagePlan
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.models.tapper import readable
from gkd_dsl.runtime.ops.common import mask_for
from gkd_dsl.runtime.ops.divergences import check_labels
from gkd_dsl.runtime.ops.fused_head import Head, Teacher, fused_losses
from gkd_dsl.runtime.ops.fused_rows import RowLoss
from gkd_dsl.runtime.ops.fused_sparse import Stored
from gkd_dsl.runtime.program import Env, plain
from gkd_dsl.runtime.rows import current
from gkd_dsl.schedules import Clock

Heads = Callable[[str, str], nn.Module | None]
"""The module of a model by both names; None where it is not at hand."""


@dataclass
class FusedPart:
    """What the fused losses of a step need to know, and what they give.

    amounts       what multiplies each loss in the objective, by key
    denominators  how many of its positions count in the whole step
    sums          each loss divided by its denominator, without gradient; filled by the pass
    totals        the parts of the objective with their gradients, one for each pass
    """

    amounts: Mapping[str, float]
    denominators: Mapping[str, int]
    sums: dict[str, Tensor] = field(default_factory=dict)
    totals: list[Tensor] = field(default_factory=list)


class FusedLosses:
    """Runs `Fused` instructions with the heads that `heads` finds. `counted` are the losses of the plan by key.

    `stored` are the models whose logits are read, or written, by a store: of these no head is run.
    """

    def __init__(self, heads: Heads, counted: Mapping[str, Counted], stored: Collection[str] = ()) -> None:
        self._heads = heads
        self._counted = counted
        self._stored = stored
        self._copies: dict[str, str] = {}

    def there(self, head: HeadPlan) -> bool:
        """Whether the head is a plain linear map in memory: no adapter, no quantised weight, no hook of others."""
        module = self._heads(head.model, head.module)
        if type(module) is not nn.Linear or hasattr(module.weight, "__tensor_flatten__"):
            return False
        return not module._forward_hooks and not module._forward_pre_hooks

    def plan(self, plan: StagePlan) -> StagePlan:
        """The plan as it is run: with what can be fused.

        Raises RunError where `fuse_logits = on` and a head is not at hand.
        """
        if plan.fuse_logits == "on":
            found = {group.student.logits: group for group in fusions(plan, self.there)}
            for group in fusions(plan, lambda head: head.model not in self._stored):
                heads = (group.student, *group.teachers)
                if found.get(group.student.logits) != group:
                    missing = next((head.model for head in heads if not self.there(head)), group.student.model)
                    message = f"`fuse_logits = on`, and the head of `{missing}` is no plain linear map in memory"
                    raise RunError(CANNOT_RUN, message, "write `fuse_logits = auto`")
        self._copies = {
            step.key: dict(step.inputs)["x"] for step in plan.program if isinstance(step, Apply) and step.op == "detach"
        }
        return fuse(plan, self.there)

    def _itself(self, key: str) -> str:
        """What a detached copy is a copy of: the same logits, whose classes are all there where a model gave them."""
        while key in self._copies:
            key = self._copies[key]
        return key

    def run(self, step: Fused, env: Env, clock: Clock, part: FusedPart) -> None:
        """One pass over the positions that count in any of the losses."""
        hidden = env[step.student.hidden.key]
        head = self._head(step.student)
        weights = {term.key: self._weights(term, env, hidden, head.weight.shape[0]) for term in step.terms}
        counts = torch.stack([mask for mask, _ in weights.values()]).any(0).flatten()
        # On a GPU this is what a step waits for, once.
        picked = counts.nonzero().squeeze(-1)
        rows = None if len(picked) == len(counts) else picked
        teachers, owners = self._teachers(step, env, rows)
        losses = []
        for term in step.terms:
            key = _whole_teacher(term)
            attrs = {name: plain(value, clock) for name, value in term.attrs if name not in ("dims", "causal")}
            losses.append(
                RowLoss(
                    term.op.removeprefix(TOP_K),
                    part.amounts.get(term.key, 0.0) / max(1, part.denominators[term.key]),
                    _picked(weights[term.key][1], rows),
                    None if key is None else owners[key],
                    attrs,
                    _picked(env[dict(term.inputs)["labels"]], rows) if term.op == "cross_entropy" else None,
                    # What an operator has made of logits may exclude classes.
                    exact=key is None or not self._itself(key).startswith("op/"),
                    stored=_stored(term, attrs, env, rows) if term.op.startswith(TOP_K) else None,
                )
            )
        total, sums = fused_losses(_picked(hidden, rows), head, teachers, losses)
        share = current()
        if share is not None and share.idle:
            total, sums = total * 0.0, sums * 0.0
        part.totals.append(total)
        for term, value in zip(step.terms, sums, strict=True):
            part.sums[term.key] = value / max(1, part.denominators[term.key])

    def _teachers(self, step: Fused, env: Env, rows: Tensor | None) -> tuple[list[Teacher], dict[str, int]]:
        """What the losses compare with, and which of them each key of logits is."""
        names = {name: head for head in step.teachers for name in head.names}
        keys = [key for term in step.terms if (key := _whole_teacher(term)) is not None]
        owners = {key: names[key].logits if key in names else self._itself(key) for key in keys}
        # Of logits that are given, a copy that is alive; what it is a copy of may be gone.
        alive = {owner: key for key, owner in owners.items()}
        order = list(dict.fromkeys(owners.values()))
        heads = {head.logits: head for head in step.teachers}
        found = [
            self._teacher(heads[key], env, rows)
            if key in heads
            else Teacher(logits=env[alive[key]].flatten(0, 1), rows=rows)
            for key in order
        ]
        return found, {key: order.index(owner) for key, owner in owners.items()}

    def _weights(self, term: Apply, env: Env, hidden: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Where the positions of a loss count, Bool[B, L], and what each value is multiplied with."""
        counted = self._counted[term.key]
        shape = hidden.shape[:2]
        mask = mask_for(shape, ("B", "L"), env[counted.valid] if counted.valid else None, False, hidden.device)
        mask = torch.ones(shape, dtype=torch.bool, device=hidden.device) if mask is None else mask.expand(shape)
        strange = None
        if term.op == "cross_entropy":
            labels = env[dict(term.inputs)["labels"]]
            mask = mask & (labels != -100)
            if _can_look(labels):
                check_labels(labels[mask], classes)
            else:
                # To look would be to wait: a label outside the vocabulary makes the loss NaN, which ends the run.
                strange = mask & ((labels < 0) | (labels >= classes))
        value = mask.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        if counted.token_weight:
            value = torch.where(mask, env[counted.token_weight].to(value.dtype), 0.0)
        if counted.sample_weight:
            value = torch.where(mask, value * env[counted.sample_weight].to(value.dtype).unsqueeze(-1), 0.0)
        return mask, value if strange is None else value.masked_fill(strange, float("nan"))

    def _head(self, head: HeadPlan) -> Head:
        module = self._heads(head.model, head.module)
        assert isinstance(module, nn.Linear)
        bias = readable(module.bias) if module.bias is not None else None
        return Head(readable(module.weight), bias, head.scale, head.softcap, head.divide)

    def _teacher(self, head: HeadPlan, env: Env, rows: Tensor | None) -> Teacher:
        return Teacher(_picked(env[head.hidden.key].detach(), rows), self._head(head))


def _whole_teacher(term: Apply) -> str | None:
    """The key of the teacher's logits that a loss reads, where it reads all."""
    return None if term.op.startswith(TOP_K) else dict(term.inputs).get("teacher")


def _stored(term: Apply, attrs: dict[str, Any], env: Env, rows: Tensor | None) -> Stored:
    """What a loss reads of a teacher's largest logits; takes of `attrs` what says how they are kept."""
    slots = dict(term.inputs)
    values, ids, tail = (_picked(env[slots[slot]], rows) for slot in ("teacher", "ids", "tail"))
    return Stored(values, ids, tail, tuple(attrs.pop("temperatures")), attrs.pop("treatment"))


def _can_look(labels: Tensor) -> bool:
    """Whether reading labels waits for nothing."""
    return labels.device.type == "cpu"


def _picked(x: Tensor, rows: Tensor | None) -> Tensor:
    """[B, L, ...] -> [n, ...]: the positions of `rows`, or all."""
    flat = x.flatten(0, 1)
    return flat if rows is None else flat.index_select(0, rows)
