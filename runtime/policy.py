"""Policies: which teacher speaks to which sample, drawn by a small network that is trained by its reward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd_dsl.graph.nodes import PolicyNode
from gkd_dsl.graph.plan import Apply, PolicyPlan
from gkd_dsl.runtime import rows
from gkd_dsl.runtime.errors import CHECKPOINT, NOT_FINITE, RunError
from gkd_dsl.runtime.optim import LearningRate, make_optimizer
from gkd_dsl.runtime.program import Env, generator
from gkd_dsl.schedules import Clock


class Selector(nn.Module):
    """A logit for each action: A x_k + b with one A and b for all, or two layers with a tanh between them.

    [B, K, D] -> [B, K], in fp32.
    """

    def __init__(self, features: int, hidden: int = 0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if hidden:
                self.layers = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 1))
            else:
                self.layers = nn.Sequential(nn.Linear(features, 1))

    def forward(self, states: Tensor) -> Tensor:
        """The logits."""
        return self.layers(states).squeeze(-1)


def surrogate(logits: Tensor, actions: Tensor, advantage: float) -> Tensor:
    """-advantage * mean_b sum_k log pi(a_bk): its gradient is REINFORCE's estimate, with the sign of a loss.

    [B, K] and 0/1 of [B, K] -> []. Williams, Simple statistical gradient-following algorithms, 1992.
    """
    log_pi = -F.binary_cross_entropy_with_logits(logits, actions, reduction="none")
    return -advantage * log_pi.sum(-1).mean()


class Policy:
    """A selector with its optimiser, the running mean of its rewards, and the choices whose reward is still to come.

    The reward of a step's choices is what the student's loss says one step later, after it has learned from them.
    Without a reward yet there is no mean to compare with: the first one only starts it.
    """

    def __init__(self, node: PolicyNode, device: torch.device, seed: int = 0) -> None:
        self.node = node
        self.selector = Selector(node.features, node.hidden, seed).to(device)
        self._named = list(self.selector.named_parameters())
        self._optimizer = make_optimizer(node.optim, self._named)
        self._baseline: Tensor | None = None
        self._pending: tuple[Tensor, Tensor] | None = None
        self._drawn: list[tuple[Tensor, Tensor]] = []

    @property
    def baseline(self) -> float | None:
        """The running mean of the rewards; None before the first."""
        return None if self._baseline is None else float(self._baseline)

    @property
    def pending(self) -> tuple[Tensor, Tensor] | None:
        """States [B, K, D] and actions [B, K] of the latest step, over all of its micro-batches."""
        return self._pending

    def draw(self, step: Apply, env: Env, clock: Clock, *, keep: bool = True) -> Tensor:
        """The choices 0/1 for each sample and action, Float[B, K], without gradient.

        The same step draws the same again. With `keep` they wait for their reward, unless gradients are off.
        """
        found = [env[key].detach().float() for slot, key in step.inputs if slot.isdigit()]
        # Chosen for all rows on every process, so that all learn the same of them.
        states = rows.whole(torch.stack(found, dim=1))
        with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
            chance = self.selector(states).sigmoid()
        drawn = torch.rand(chance.shape, generator=generator(step.key, clock)).to(chance.device)
        actions = (drawn < chance).float()
        if keep and torch.is_grad_enabled():
            self._drawn.append((states, actions))
        return rows.own(actions)

    def start(self) -> None:
        """Begin a step: choices of one that was given up are forgotten."""
        self._drawn = []

    def learn(self, reward: float, clock: Clock) -> None:
        """End a step: `reward` is for the choices of the step before; those of this one are pending from now on.

        Raises RunError where the reward is not finite.
        """
        if not math.isfinite(reward):
            message = f"the reward of policy `{self.node.name}` is {reward} in step {clock.step + 1}"
            raise RunError(NOT_FINITE, message)
        before, self._pending = self._pending, self._taken()
        if before is None:
            return
        if self._baseline is None:
            self._baseline = torch.tensor(reward, dtype=torch.float64)
            return
        advantage = reward - float(self._baseline)
        self._baseline = self.node.baseline * self._baseline + (1.0 - self.node.baseline) * reward
        states, actions = before
        self._optimizer.zero_grad(set_to_none=True)
        surrogate(self.selector(states), actions, advantage).backward()
        optim = self.node.optim
        if optim.clip is not None:
            nn.utils.clip_grad_norm_(self.selector.parameters(), optim.clip)
        rate = LearningRate(optim, clock.total_steps, clock.steps_per_epoch).at(clock.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Drop what is pending: the reward of another stage says nothing of it."""
        self._pending, self._drawn = None, []

    def tensors(self) -> dict[str, Tensor]:
        """All of its state, by `what` or `what/parameter`."""
        found = {f"selector/{name}": parameter.detach() for name, parameter in self._named}
        for name, parameter in self._named:
            for what, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer/{what}/{name}"] = value
        if self._baseline is not None:
            found["baseline"] = self._baseline
        if self._pending is not None:
            found["pending/states"], found["pending/actions"] = self._pending
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put its state back, bit for bit. Raises RunError where a tensor is missing or of another shape."""
        for name, parameter in self._named:
            saved = tensors.get(f"selector/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise RunError(CHECKPOINT, f"the checkpoint does not fit policy `{self.node.name}`: `{name}` differs")
            with torch.no_grad():
                parameter.copy_(saved)
            self._optimizer.state.pop(parameter, None)
        parameters = dict(self._named)
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, what, name = key.split("/", 2)
                parameter = parameters[name]
                # torch keeps its step counter on the CPU.
                placed = value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
                self._optimizer.state[parameter][what] = placed
        self._baseline = tensors["baseline"].clone() if "baseline" in tensors else None
        device = next(self.selector.parameters()).device
        states, actions = tensors.get("pending/states"), tensors.get("pending/actions")
        self._pending = None
        if states is not None and actions is not None:
            self._pending = (states.to(device, copy=True), actions.to(device, copy=True))
        self._drawn = []

    def _taken(self) -> tuple[Tensor, Tensor] | None:
        drawn, self._drawn = self._drawn, []
        if not drawn:
            return None
        return torch.cat([states for states, _ in drawn]), torch.cat([actions for _, actions in drawn])


class Policies:
    """The policies of a stage, as its step uses them: `draw` runs the operator `policy`."""

    def __init__(self, plans: Iterable[PolicyPlan], policies: Mapping[str, Policy], *, keep: bool = True) -> None:
        self._plans = tuple(plans)
        self._policies = policies
        self._by_key = {plan.key: policies[plan.node.name] for plan in self._plans}
        self._keep = keep

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the draws."""
        return frozenset(self._by_key)

    def draw(self, step: Apply, env: Env, clock: Clock) -> Tensor:
        """The choices of the policy whose operator this is."""
        return self._by_key[step.key].draw(step, env, clock, keep=self._keep)

    def start(self) -> None:
        """Begin an optimiser step."""
        for plan in self._plans:
            self._policies[plan.node.name].start()

    def learn(self, watched: Mapping[str, float], clock: Clock) -> None:
        """End an optimiser step: `watched` holds the rewards, over all of its micro-batches, by the loss's name."""
        for plan in self._plans:
            self._policies[plan.node.name].learn(watched[plan.reward], clock)


def make_policies(plans: Iterable[PolicyPlan], device: torch.device, seed: int = 0) -> dict[str, Policy]:
    """The policies of a stage by name, with their first weights."""
    return {plan.node.name: Policy(plan.node, device, seed + _stable(plan.node.name)) for plan in plans}


def _stable(name: str) -> int:
    """A number that depends on the name alone, so that a policy starts alike beside others."""
    return int.from_bytes(sha256(name.encode()).digest()[:4], "big")
