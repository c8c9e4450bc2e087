"""Counters: whole numbers that go up when something holds, and the losses that they watch."""

from __future__ import annotations

from collections.abc import Iterable

from gkd_dsl import schedules
from gkd_dsl.graph.access import ancestors
from gkd_dsl.graph.nodes import CounterNode, ForwardNode, LossNode, MetricNode, OpNode, ReplaceBlock, StageNode
from gkd_dsl.meaning.conditions import as_condition
from gkd_dsl.meaning.context import Context
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Length,
    Loss,
    NamedLoss,
    Num,
    Scheduled,
    Unknown,
    Value,
    kind,
    shown,
)
from gkd_dsl.schedules import Schedule
from gkd_dsl.syntax import ast

_MOST = 1024
"""Values of one counter."""


def declare(ctx: Context, scope: Scope, decl: ast.Counter) -> Value:
    """`counter k from 1 to s.N advance when ...`: its value as a schedule."""
    ends: list[int] = []
    for expr in (decl.start, decl.stop):
        value = ctx.evaluate(scope, expr)
        if isinstance(value, Num) and isinstance(value.value, int):
            ends.append(value.value)
        elif not isinstance(value, Unknown):
            ctx.error(scope, "E0210", f"a counter runs between whole numbers, and this is {shown(value)}", expr.span)
    if len(ends) == 2 and not 0 < ends[1] - ends[0] < _MOST:
        what = f"more than {_MOST} values" if ends[1] > ends[0] else "nowhere to go"
        ctx.error(
            scope, "E0261", f"a counter goes up, and from {ends[0]} to {ends[1]} it has {what}",
            decl.start.span.to(decl.stop.span),
        )  # fmt: skip
        ends = []
    name = f"{scope.prefix}{decl.name.text}"
    if len(ends) < 2:
        return UNKNOWN
    # What it watches may itself be weighed by the counter, so its condition is read when all is known.
    ctx.deferred.append(lambda: _node(ctx, scope, decl, name, ends[0], ends[1]))
    return Scheduled(schedules.CounterValue(name, *ends))


def _node(ctx: Context, scope: Scope, decl: ast.Counter, name: str, start: int, stop: int) -> None:
    cases = _conditions(ctx, scope, decl, range(start, stop))
    if cases is None:
        return
    when = cases[0] if len(set(cases)) == 1 else schedules.AtCount(name, start, tuple(cases))
    key = f"counter/{name}"
    ctx.builder.add(CounterNode(key, name, start, stop, when, locations=(ctx.location(scope, decl.name.span),)))
    watched = [part.loss for part in schedules.parts(when) if isinstance(part, schedules.Recent)]
    for slot, loss in enumerate(dict.fromkeys(watched)):
        ctx.builder.connect(f"loss/{loss}", key, str(slot))


def _conditions(ctx: Context, scope: Scope, decl: ast.Counter, values: Iterable[int]) -> list[Schedule] | None:
    """When the counter advances from each of its values; its name stands for that value in the condition."""
    found: list[Schedule] = []
    before, ctx.monitoring = ctx.monitoring, decl.name.text
    try:
        for value in values:
            inner = scope.child(**{decl.name.text: Num(value)})
            condition = as_condition(ctx, scope, ctx.evaluate(inner, decl.when), decl.when)
            if condition is None:
                # The same fault would be found for each value; once is enough.
                return None
            found.append(condition)
    finally:
        ctx.monitoring = before
    return found


def recent(ctx: Context, scope: Scope, expr: ast.Call) -> Value:
    """`mean(loss, last = 100 steps)` in the condition of a counter."""
    from gkd_dsl.meaning.declare import named_loss
    from gkd_dsl.meaning.evaluate import as_loss

    if ctx.monitoring is None:
        return ctx.error(
            scope, "E0262", "the mean over the last steps is known to the condition of a counter only", expr.span,
            "write it in a `counter ... advance when ...`",
        )  # fmt: skip
    loss = as_loss(ctx, scope, ctx.evaluate(scope, expr.args[0].value), expr.args[0].value)
    written = expr.args[1].value
    length = ctx.evaluate(scope, written)
    if isinstance(loss, Unknown) or isinstance(length, Unknown):
        return UNKNOWN
    if not isinstance(length, Length) or length.span.unit != "steps":
        text = f"{length.value:g} steps" if isinstance(length, Num) and length.value >= 1 else "100 steps"
        return ctx.error(
            scope, "E0401", f"`last` is a number of steps, and this is {kind(length)}", written.span, f"write `{text}`"
        )
    steps = length.span.amount
    if steps < 1 or steps != int(steps):
        return ctx.error(scope, "E0403", f"`last` is at least 1 step, and whole; this is {steps:g}", written.span)
    assert isinstance(loss, Loss)
    if loss.partial:
        return UNKNOWN
    term = loss.terms[0]
    if len(loss.terms) == 1 and term.weight == schedules.Constant(1.0) and isinstance(term.loss, NamedLoss):
        name = term.loss.name
    else:
        name = named_loss(ctx, scope, loss, f"{ctx.monitoring}.watched", expr.args[0].value).name
    return Scheduled(schedules.Recent(name, int(steps)))


def connect(ctx: Context, stage: StageNode) -> None:
    """Give a stage the counters that its schedules read, and those that their conditions read."""

    def edges() -> None:
        waiting = sorted(_read(ctx, stage))
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            key = f"counter/{name}"
            if name in seen or key not in ctx.builder:
                continue
            seen.add(name)
            ctx.builder.connect(key, stage.key, f"counter.{name}")
            node = ctx.builder.node(key)
            assert isinstance(node, CounterNode)
            waiting += sorted(schedules.counters(node.when))
            waiting += sorted(_behind(ctx, ctx.builder.inputs(key).values()))

    ctx.deferred.append(edges)


def _read(ctx: Context, stage: StageNode) -> set[str]:
    found = {name for weight in stage.weights for name in schedules.counters(weight)}
    return found | _behind(ctx, ctx.builder.inputs(stage.key).values())


def _behind(ctx: Context, keys: Iterable[str]) -> set[str]:
    """The counters that what these nodes are made of reads."""
    found: set[str] = set()
    for key in ancestors(ctx.builder.graph, list(keys)):
        node = ctx.builder.node(key)
        held: list[object] = []
        if isinstance(node, LossNode):
            held += node.coefficients
        elif isinstance(node, OpNode | MetricNode):
            held += [value for _, value in node.attrs]
        elif isinstance(node, ForwardNode):
            held += [change.when for change in node.changes if isinstance(change, ReplaceBlock)]
        for value in held:
            if isinstance(value, Schedule):
                found |= schedules.counters(value)
    return found
