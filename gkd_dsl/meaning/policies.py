"""Policies: a choice among actions for each sample, learned from a reward."""

from __future__ import annotations

import networkx as nx

from gkd_dsl import schedules
from gkd_dsl.graph.nodes import OpNode, OptimSpec, PolicyNode, StageNode
from gkd_dsl.meaning import paths
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Items,
    Length,
    Loss,
    NamedLoss,
    Num,
    Optimiser,
    Policy,
    Tensor,
    Unknown,
    Value,
    kind,
    shown,
)
from gkd_dsl.syntax import ast
from gkd_dsl.types import BATCH, Dim, TensorType

_ARGUMENTS = ("hidden",)
_SETTINGS = ("reward", "optim", "baseline")
_MOST_HIDDEN = 1_000_000
_WRITE = "write `selector(state[k] for k in teachers(ts))`"
OPTIM = OptimSpec(lr=1e-3, weight_decay=0.0)
"""The optimiser of a policy that names none."""


def declare(ctx: Context, scope: Scope, decl: ast.Policy) -> Value:
    """`policy pi = selector(state[k] for k in teachers(ts)) { reward = ... }`: one state for each action."""
    call = decl.value
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "selector":
        return ctx.error(scope, "E0250", "a policy is a `selector(...)`", call.span, _WRITE)
    states, hidden = _arguments(ctx, scope, call)
    optim, baseline, good = _settings(ctx, scope, decl)
    if states is None or hidden is None or not good:
        return UNKNOWN
    name = f"{scope.prefix}{decl.name.text}"
    width = next((state.type.dims[-1].size for state in states if state.type.dims[-1].size is not None), 0)
    node = PolicyNode(
        f"policy/{name}", name, len(states), width, hidden, optim, baseline,
        locations=(ctx.location(scope, decl.name.span),),
    )  # fmt: skip
    ctx.builder.add(node)
    type_ = TensorType("float", (BATCH, Dim("", len(states))))
    key = ctx.builder.fresh(f"op/{scope.prefix}policy")
    ctx.builder.add(OpNode(key, "policy", (), type_, locations=(ctx.location(scope, decl.name.span),)))
    ctx.builder.connect(node.key, key, "block")
    for slot, state in enumerate(states):
        # The policy learns from its reward alone.
        ctx.builder.connect(paths.detached(ctx, scope, state, call).key, key, str(slot))
    picked = Tensor(key, type_, reads=frozenset().union(*(state.reads for state in states)))
    policy = Policy(node.key, name, picked, decl, scope)
    ctx.policies[node.key] = policy

    def read_reward() -> None:
        _reward(ctx, policy)

    ctx.deferred.append(read_reward)
    return policy


def member(ctx: Context, scope: Scope, policy: Policy, expr: ast.Attr) -> Value:
    """`pi.pick`: 0 or 1 for each sample and action, Float[B, K], without gradient; `pi.pick[k]` is Float[B]."""
    if expr.name.text == "pick":
        return policy.pick
    label, near = suggest(expr.name.text, ("pick",))
    return ctx.error(
        scope, "E0206", f"a policy has no `{expr.name.text}`", expr.name.span, label, notes=["it has: pick"],
        fix=replace(expr.name.span, near) if near else None,
    )  # fmt: skip


def connect(
    ctx: Context,
    scope: Scope,
    decl: ast.Stage,
    stage: StageNode,
    losses: list[tuple[schedules.Schedule, NamedLoss]],
) -> None:
    """Put into a stage the policies that choose in its objective, each with the loss of its reward."""
    if not ctx.policies:
        return
    read: set[str] = set()
    for weight, loss in losses:
        if not schedules.is_zero(weight):
            read |= nx.ancestors(ctx.builder.graph, loss.key)
    for key, policy in ctx.policies.items():
        reward = _reward(ctx, policy) if key in read else None
        if reward is not None:
            ctx.builder.connect(key, stage.key, f"policy.{policy.name}")
            ctx.builder.connect(reward, stage.key, f"reward.{policy.name}")
        elif key not in read:
            _metrics(ctx, scope, decl, stage, policy)


def _metrics(ctx: Context, scope: Scope, decl: ast.Stage, stage: StageNode, policy: Policy) -> None:
    """A metric reads the choices of a policy only where the objective does."""
    for name in dict.fromkeys(name for spec in stage.evaluate for name in spec.metrics):
        if policy.key in nx.ancestors(ctx.builder.graph, f"metric/{name}"):
            at = next(stmt for stmt in decl.body if isinstance(stmt, ast.Evaluate))
            ctx.error(
                scope, "E0253", f"the metric `{name}` reads the policy `{policy.name}`, which does not choose in stage "
                f"`{stage.name}`", at.span, "evaluated here", notes=["no loss that this stage minimises reads it"],
            )  # fmt: skip
            return


def _arguments(ctx: Context, scope: Scope, call: ast.Call) -> tuple[list[Tensor] | None, int | None]:
    """The state of each action, and the hidden units; None for what was reported."""
    unnamed = [arg for arg in call.args if arg.name is None]
    hidden: int | None = 0
    for arg in call.args:
        if arg.name is None:
            continue
        if arg.name.text not in _ARGUMENTS:
            label, near = suggest(arg.name.text, _ARGUMENTS)
            ctx.error(
                scope, "E0234", f"`selector` has no argument `{arg.name.text}`", arg.name.span, label,
                notes=["it takes the state of each action, and `hidden`"],
                fix=replace(arg.name.span, near) if near else None,
            )  # fmt: skip
            hidden = None
            continue
        value = ctx.evaluate(scope, arg.value)
        hidden = value.value if isinstance(value, Num) and isinstance(value.value, int) else None
        if isinstance(value, Unknown):
            continue
        if hidden is None:
            ctx.error(scope, "E0210", f"`hidden` is a whole number, not {shown(value)}", arg.value.span)
        elif not 0 <= hidden <= _MOST_HIDDEN:
            ctx.error(scope, "E0403", f"`hidden` is {hidden}, outside 0 to {_MOST_HIDDEN}", arg.value.span)
            hidden = None
    if len(unnamed) != 1:
        span = unnamed[1].span if unnamed else call.span
        ctx.error(scope, "E0250", "`selector` takes one list, the state of each action", span, _WRITE)
        return None, hidden
    return _states(ctx, scope, unnamed[0].value), hidden


def _states(ctx: Context, scope: Scope, written: ast.Expr) -> list[Tensor] | None:
    value = ctx.evaluate(scope, written)
    if isinstance(value, Unknown):
        return None
    if not isinstance(value, Items):
        ctx.error(scope, "E0250", f"`selector` takes a list of states, not {kind(value)}", written.span, _WRITE)
        return None
    states: list[Tensor] = []
    for item in value.items:
        state = paths.as_tensor(ctx, scope, item, written)
        if isinstance(state, Unknown):
            return None
        vectors = isinstance(state, Tensor) and state.type.dtype == "float" and len(state.type.dims) == 2
        if not isinstance(state, Tensor) or not vectors or state.type.dims[0] != BATCH:
            what = str(state.type) if isinstance(state, Tensor) else kind(state)
            ctx.error(
                scope, "E0251", f"a state is one vector for each sample, and this is {what}", written.span,
                "Float[B, D] is wanted", notes=["`stack(x)` makes Float[B, 1] of a number for each sample"],
            )  # fmt: skip
            return None
        if states and not states[0].type.dims[1].agrees(state.type.dims[1]):
            ctx.error(
                scope, "E0251",
                f"the states of a selector have one width, and these have {states[0].type.dims[1].short} and "
                f"{state.type.dims[1].short}",
                written.span, "one linear map reads them all",
            )  # fmt: skip
            return None
        states.append(state)
    return states


def _settings(ctx: Context, scope: Scope, decl: ast.Policy) -> tuple[OptimSpec, float, bool]:
    """The optimiser, what the running mean keeps, and whether all is well; the reward is read later."""
    optim, baseline, good, named = OPTIM, PolicyNode.baseline, True, set()
    for stmt in decl.body:
        if not isinstance(stmt, ast.Setting):
            continue  # The parser said so.
        name = stmt.name.text
        named.add(name)
        if name not in _SETTINGS:
            label, near = suggest(name, _SETTINGS)
            ctx.error(
                scope, "E0408", f"a policy has no setting `{name}`", stmt.name.span, label or "not a setting",
                notes=[f"its settings: {', '.join(_SETTINGS)}"], fix=replace(stmt.name.span, near) if near else None,
            )  # fmt: skip
            good = False
            named.add(near or "")
        if name == "optim":
            value = ctx.evaluate(scope, stmt.value)
            if isinstance(value, Optimiser) and value.spec.warmup.unit != "tokens":
                optim = value.spec
            elif isinstance(value, Optimiser):
                length = Length(value.spec.warmup)
                ctx.error(
                    scope, "E0401", f"the warm-up of a policy is in steps, epochs or percent, not {kind(length)}",
                    stmt.value.span,
                )  # fmt: skip
                good = False
            elif not isinstance(value, Unknown):
                ctx.error(scope, "E0404", f"`optim` is an optimiser, and this is {kind(value)}", stmt.value.span)
                good = False
        elif name == "baseline":
            value = ctx.evaluate(scope, stmt.value)
            if isinstance(value, Num) and 0.0 <= value.value < 1.0:
                baseline = float(value.value)
            elif not isinstance(value, Unknown):
                ctx.error(
                    scope, "E0403", f"`baseline` is a number from 0 and below 1, not {shown(value)}", stmt.value.span,
                    "the share of the running mean of the rewards that a new reward leaves",
                )  # fmt: skip
                good = False
    if "reward" not in named:
        ctx.error(
            scope, "E0252", f"the policy `{decl.name.text}` has no reward", decl.name.span,
            "write `reward = -hard` in its block", notes=["a policy chooses what makes its reward large"],
        )  # fmt: skip
        good = False
    return optim, baseline, good


def _reward(ctx: Context, policy: Policy) -> str | None:
    """The LossNode of a reward. It may be made of losses that the policy itself weighs, so it is read late."""
    from gkd_dsl.meaning.declare import named_loss
    from gkd_dsl.meaning.evaluate import as_loss

    if policy.key in ctx.rewards or policy.key not in ctx.builder:
        return ctx.rewards.get(policy.key)
    decl, scope = policy.decl, policy.scope
    written = next(s.value for s in decl.body if isinstance(s, ast.Setting) and s.name.text == "reward")
    ctx.rewards[policy.key] = None
    value = as_loss(ctx, scope, ctx.evaluate(scope, written), written)
    if isinstance(value, Loss) and value.terms and not value.partial:
        ctx.rewards[policy.key] = named_loss(ctx, scope, value, f"{decl.name.text}.reward", written).key
    return ctx.rewards[policy.key]
