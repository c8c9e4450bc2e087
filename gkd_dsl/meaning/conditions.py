"""Conditions: comparisons of numbers that change over a stage, coins, and gates that make weights of them."""

from __future__ import annotations

from typing import Literal, cast

from gkd_dsl import schedules
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Condition,
    Num,
    Scheduled,
    Truth,
    Unknown,
    Value,
    as_schedule,
    kind,
)
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span

COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")
PROGRESS = ("progress", "step", "epoch")


def condition_of(value: Value) -> schedules.Schedule | None:
    """A value as a condition, 1 or 0 at each step: true, a comparison, a coin; None for anything else."""
    match value:
        case Truth(value=holds):
            return schedules.Constant(1.0 if holds else 0.0)
        case Condition(schedule=schedule):
            return schedule
        case Scheduled(schedule=schedule) if schedules.is_condition(schedule):
            return schedule
        case Scheduled(schedule=schedules.Constant(amount=0.0 | 1.0) as schedule):
            return schedule
    return None


def as_condition(ctx: Context, scope: Scope, value: Value, expr: ast.Expr) -> schedules.Schedule | None:
    """A value where a condition belongs; None where it was reported that it is none."""
    found = condition_of(value)
    if found is None and not isinstance(value, Unknown):
        ctx.error(
            scope, "E0260", f"a condition belongs here, and this is {kind(value)}", expr.span,
            "compare it: `stage.progress >= 0.5`, `i < k`",
        )  # fmt: skip
    return found


def _made(schedule: schedules.Schedule) -> Value:
    """A condition; `true` or `false` where it always or never holds."""
    held = schedules.settled(schedule)
    return Truth(held.amount != 0.0) if isinstance(held, schedules.Constant) else Condition(held)


def compared(expr: ast.Binary, left: Value, right: Value) -> Value | None:
    """`left < right` of numbers and schedules; None where they are something else."""
    first, second = as_schedule(left), as_schedule(right)
    if expr.op not in COMPARISONS or first is None or second is None:
        return None
    op = cast(Literal["==", "!=", "<", "<=", ">", ">="], expr.op)
    return _made(schedules.Comparison(op, first, second))


def joined(ctx: Context, scope: Scope, expr: ast.Binary, left: Value, right: Value) -> Value | None:
    """`left and right`, `left or right`; None where neither side is a condition."""
    sides = condition_of(left), condition_of(right)
    if expr.op not in ("and", "or", "&") or sides == (None, None):
        return None
    first, second = as_condition(ctx, scope, left, expr.left), as_condition(ctx, scope, right, expr.right)
    if first is None or second is None:
        return UNKNOWN
    return _made(schedules.Logic("or" if expr.op == "or" else "and", first, second))


def negated(value: Value) -> Value | None:
    """`not value`; None where it is no condition."""
    found = condition_of(value)
    return None if found is None else _made(schedules.Not(found))


def as_weight(ctx: Context, scope: Scope, value: Value, expr: ast.Expr) -> Value:
    """Report a condition where a number belongs, with its gate as the fix."""
    span, text = expr.span, expr.span.source.text
    whole = span
    if text[span.start - 1 : span.start] == "(" and text[span.end : span.end + 1] == ")":
        whole = Span(span.source, span.start - 1, span.end + 1)
    return ctx.error(
        scope, "E0263", f"a number belongs here, and this is {kind(value)}", span, "`gate(...)` makes 1 or 0 of it",
        fix=replace(whole, f"gate({span.text})"),
    )  # fmt: skip


# --- functions ----------------------------------------------------------------------------------


def _one(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> tuple[Value, ast.Expr] | None:
    if len(expr.args) != 1 or expr.args[0].name is not None:
        form = {"gate": "gate(i < k)", "draw": "draw(s.N)"}.get(name, "coin(0.5)")
        what = {"gate": "a condition", "draw": "a whole number"}.get(name, "a probability")
        ctx.error(scope, "E0224", f"`{name}` takes {what}", expr.span, f"write `{form}`")
        return None
    written = expr.args[0].value
    return ctx.evaluate(scope, written), written


def gate(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value:
    """`gate(i < k)`: 1 while a condition holds, 0 otherwise."""
    given = _one(ctx, scope, name, expr)
    if given is None:
        return UNKNOWN
    found = as_condition(ctx, scope, *given)
    if found is None:
        return UNKNOWN
    return Num(int(found.amount)) if isinstance(found, schedules.Constant) else Scheduled(found)


def coin(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value:
    """`coin(0.75)`: 1 with a probability, drawn at each step; each place, and each element of a family, by itself."""
    given = _one(ctx, scope, name, expr)
    if given is None or isinstance(given[0], Unknown):
        return UNKNOWN
    value, written = given
    p = as_schedule(value)
    if p is None:
        return ctx.error(scope, "E0404", f"a probability is a number, and this is {kind(value)}", written.span)
    limits = schedules.bounds(p)
    if limits is not None and (limits[0] < 0.0 or limits[1] > 1.0):
        shown = f"{limits[0]:g}" if limits[0] == limits[1] else f"from {limits[0]:g} to {limits[1]:g}"
        return ctx.error(scope, "E0403", f"a probability is from 0 to 1, and this is {shown}", written.span)
    if limits in ((0.0, 0.0), (1.0, 1.0)):
        # Still a coin, which `not` and `and` take.
        return Scheduled(schedules.Constant(limits[0]))
    return Scheduled(schedules.Coin(p, _name(ctx, scope, expr)))


def draw(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value:
    """`draw(s.N)`: a whole number from 0 to s.N - 1, drawn at each step; each place by itself, as coins are."""
    given = _one(ctx, scope, name, expr)
    if given is None or isinstance(given[0], Unknown):
        return UNKNOWN
    value, written = given
    count = value.value if isinstance(value, Num) else None
    if not isinstance(count, int):
        return ctx.error(scope, "E0404", f"`draw` takes a whole number, and this is {kind(value)}", written.span)
    if count < 1:
        return ctx.error(scope, "E0403", f"`draw` is of one number or more, not {count}", written.span)
    return Num(0) if count == 1 else Scheduled(schedules.Draw(count, _name(ctx, scope, expr)))


def _name(ctx: Context, scope: Scope, expr: ast.Call) -> str:
    """The name of a coin or a draw: one for each place, used method, and element of families and `for`s around it."""
    bound = []
    inner: Scope | None = scope
    while inner is not None:
        bound += [(name, held.value) for name, held in inner.names.items() if held.decl is None]
        inner = inner.parent
    numbers = tuple((name, value.value) for name, value in bound if isinstance(value, Num))
    place = (scope.prefix, id(expr.span.source), expr.span.start, numbers)
    if place not in ctx.coins:
        ctx.coins[place] = ctx.builder.fresh(f"{scope.prefix}{expr.func.span.text}")
    return ctx.coins[place]


def progress(ctx: Context, scope: Scope, expr: ast.Attr) -> Value:
    """`stage.progress`, `stage.step`, `stage.epoch`: how far the stage is."""
    if expr.name.text in PROGRESS:
        return Scheduled(schedules.StageProgress(cast(Literal["progress", "step", "epoch"], expr.name.text)))
    label, near = suggest(expr.name.text, PROGRESS)
    return ctx.error(
        scope, "E0206", f"a stage has no `{expr.name.text}`", expr.name.span, label,
        notes=[f"it has: {', '.join(PROGRESS)}"], fix=replace(expr.name.span, near) if near else None,
    )  # fmt: skip
