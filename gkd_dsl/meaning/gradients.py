"""`gradient(loss, at = tap)`: a gradient as a tensor, and where its passes may not be read."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx

from gkd_dsl.graph.nodes import ForwardNode, OpNode, TapNode
from gkd_dsl.meaning import declare, paths
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.reach import depth_of_tap
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import UNKNOWN, Loss, NamedLoss, Tensor, Unknown, Value, kind
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span

_FORM = "write `gradient(loss, at = probe.embed)`"


def gradient(ctx: Context, scope: Scope, expr: ast.Call) -> Value:
    """The gradient of a loss at a tap that it is computed from, a tensor of the tap's shape without gradient."""
    from gkd_dsl.meaning.evaluate import as_loss

    plain = [arg for arg in expr.args if arg.name is None]
    named = {arg.name.text: arg for arg in expr.args if arg.name is not None}
    for name, arg in named.items():
        if name != "at":
            label, near = suggest(name, ("at",))
            assert arg.name is not None
            return ctx.error(
                scope, "E0234", f"`gradient` has no argument `{name}`", arg.name.span, label or _FORM,
                fix=replace(arg.name.span, near) if near else None,
            )  # fmt: skip
    if len(plain) != 1 or "at" not in named:
        return ctx.error(scope, "E0235", "`gradient` needs a loss, and where its gradient is taken", expr.span, _FORM)
    loss = as_loss(ctx, scope, ctx.evaluate(scope, plain[0].value), plain[0].value)
    place = named["at"].value
    at = paths.as_tensor(ctx, scope, ctx.evaluate(scope, place), place)
    if not isinstance(loss, Loss) or loss.partial or isinstance(at, Unknown):
        return UNKNOWN
    tap = ctx.builder.node(at.key) if isinstance(at, Tensor) else None
    if not isinstance(at, Tensor) or not isinstance(tap, TapNode) or tap.path.kind == "weight":
        return ctx.error(
            scope, "E0272", f"a gradient is taken at a tap, and this is {kind(at)}", place.span, "such as `probe.embed`"
        )
    parts = list(declare.atoms(ctx, loss))
    if not any(_comes_from(ctx, key, tap) for _, key in parts):
        return ctx.error(
            scope, "E0272", f"this loss is not computed from `{place.span.text}`", plain[0].value.span,
            "its gradient there is 0", notes=["no tensor of it comes after that tap in the same pass"],
        )  # fmt: skip
    key = ctx.builder.fresh(f"op/{scope.prefix}gradient")
    coefficients = tuple(weight for weight, _ in parts)
    node = OpNode(
        key, "gradient", (("coefficients", coefficients),), at.type, locations=(ctx.location(scope, expr.span),)
    )
    ctx.builder.add(node)
    ctx.builder.connect(at.key, key, "at")
    for slot, (_, atom) in enumerate(parts):
        ctx.builder.connect(atom, key, str(slot))
    return Tensor(key, at.type, reads=at.reads, tokens=at.tokens)


def _comes_from(ctx: Context, key: str, at: TapNode) -> bool:
    """Whether a loss has a gradient at a tap: an undetached way to it, or to a deeper tap of the same pass."""
    home = ctx.builder.inputs(at.key)["forward"]
    info = ctx.models[at.model].info if at.model in ctx.models else None
    start = depth_of_tap(info, at.path) if info is not None else None
    for tap in _taps(ctx, key):
        if tap.key == at.key:
            return True
        if ctx.builder.inputs(tap.key)["forward"] != home:
            continue
        depth = depth_of_tap(info, tap.path) if info is not None else None
        if depth is None or start is None or depth > start or (depth == start and at.path.kind == "layer"):
            return True
    return False


def _taps(ctx: Context, key: str) -> Iterator[TapNode]:
    """The taps that a gradient reaches from a node: through passes that take tensors, not through `detach`."""
    waiting, seen = [key], {key}
    while waiting:
        node = ctx.builder.node(waiting.pop())
        if isinstance(node, OpNode) and node.op in ("detach", "gradient"):
            continue
        if isinstance(node, TapNode):
            yield node
        for producer in ctx.builder.inputs(node.key).values():
            if producer not in seen:
                seen.add(producer)
                waiting.append(producer)


def kept(ctx: Context, scope: Scope, losses: list[NamedLoss], span: Span) -> bool:
    """Whether an objective leaves passes with `grad = discard` alone; reported where it does not."""
    good = True
    for loss in losses:
        for tap in _taps(ctx, loss.key):
            forward = ctx.builder.node(ctx.builder.inputs(tap.key)["forward"])
            if not isinstance(forward, ForwardNode) or not forward.discard:
                continue
            name = forward.key.removesuffix("/forward").rsplit("/", 1)[-1]
            node = ctx.builder.node(loss.key)
            where = node.locations[0].span if node.locations and not scope.uses else span
            ctx.error(
                scope, "E0273", f"`{loss.name}` reads `{name}.{tap.path}`, whose gradient is thrown away", where,
                f"`{name}` has `grad = discard`",
                notes=["read it inside `gradient(...)` or `detach(...)`, or take another pass for the objective"],
            )  # fmt: skip
            good = False
            break
    return good


def measured(ctx: Context, scope: Scope, key: str, span: Span) -> bool:
    """Whether a metric needs no gradient; reported where it does, since evaluations compute none."""
    for above in nx.ancestors(ctx.builder.graph, key):
        node = ctx.builder.node(above)
        if isinstance(node, OpNode) and node.op == "gradient":
            ctx.error(
                scope, "E0274", "a metric is computed without gradients, and this one reads `gradient(...)`", span,
                "measure a pass that needs none",
            )  # fmt: skip
            return False
    return True
