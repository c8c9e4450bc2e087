"""`gradient(loss, at = tap)` in a step: the gradient of a reduced loss at a tensor, as a tensor."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from gkd_dsl.graph.plan import Apply, StagePlan
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.program import Env, plain
from gkd_dsl.schedules import Clock


class Gradients:
    """The gradients that a stage takes inside its forward.

    leaves   for each forward, the taps that a gradient is taken at
    atoms    the keys of the losses that gradients are taken of
    sums     those losses in this step, reduced; the step fills it
    """

    def __init__(self, plan: StagePlan) -> None:
        self._steps = [item for item in plan.program if isinstance(item, Apply) and item.op == "gradient"]
        self._discarded = {tap.key for forward in plan.forwards if forward.discard for tap in forward.taps}
        self._objective = {key for loss in (*plan.losses, *plan.monitored) for _, key in loss.parts}
        self.atoms = {key for step in self._steps for slot, key in step.inputs if slot != "at"}
        self.sums: dict[str, Tensor] = {}
        at = {dict(step.inputs)["at"] for step in self._steps}
        self.leaves: dict[str, frozenset[TapPath]] = {
            forward.key: frozenset(tap.path for tap in forward.taps if tap.key in at) for forward in plan.forwards
        }

    def take(self, step: Apply, env: Env, clock: Clock) -> Tensor:
        """The gradient of one micro-batch's share of a loss, without a gradient of its own: the shape of the tap.

        No parameter's gradient is touched. A position whose gradient is not finite gets 0.

        Raises RunError where the loss does not depend on the tap.
        """
        slots = dict(step.inputs)
        at = env[slots.pop("at")]
        coefficients = cast("tuple[float, ...]", dict(step.attrs)["coefficients"])
        total: Tensor | None = None
        for number, weight in enumerate(coefficients):
            amount = float(plain(weight, clock))
            if amount != 0.0:
                part = amount * self.sums[slots[str(number)]]
                total = part if total is None else total + part
        found = torch.zeros_like(at)
        if total is not None:
            last = step is self._steps[-1] or step.key == self._steps[-1].key
            keep = not last or dict(step.inputs)["at"] not in self._discarded
            found = self._of(total, at, keep, step)
        if step.key == self._steps[-1].key:
            # What only gradients read keeps a forward's tensors alive.
            for key in self.atoms - self._objective:
                self.sums.pop(key, None)
        finite = torch.isfinite(found).all(-1, keepdim=True)
        return torch.where(finite, found, torch.zeros_like(found))

    def _of(self, total: Tensor, at: Tensor, keep: bool, step: Apply) -> Tensor:
        found: Tensor | None = None
        if total.requires_grad and at.requires_grad:
            (found,) = torch.autograd.grad(total, [at], retain_graph=keep, allow_unused=True)
        if found is None:
            tap = dict(step.inputs)["at"].replace("/", ".")
            raise RunError(CANNOT_RUN, f"the loss of `gradient(...)` does not depend on `{tap}`")
        return found.detach()
