"""Parameters: types, ranges, defaults, and values from the command line or a `use`."""

from __future__ import annotations

import math
import re

from gkd_dsl import schedules
from gkd_dsl.diagnostics import SpecError
from gkd_dsl.meaning.context import Context, ResolvedParam, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Items,
    Length,
    Model,
    Num,
    Scheduled,
    Source,
    Text,
    Truth,
    Unknown,
    Value,
    as_schedule,
    digits,
    kind,
    plain,
)
from gkd_dsl.syntax import ast, parse_expression
from gkd_dsl.text import Span

TYPES = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "text": "a text",
    "list": "a list",
    "schedule": "a number or a schedule",
    "duration": "a duration",
    "ratio": "a percentage",
    "source": "a data source",
    "model": "a model",
}


def declare(ctx: Context, scope: Scope, decl: ast.Param) -> Value:
    """The value of a `param`: from the command line where it is set there, else its default."""
    name = decl.name.text
    if not known_type(ctx, scope, decl.type):
        return UNKNOWN
    if scope.prefix == "" and name in ctx.overrides and not scope.uses:
        return _override(ctx, scope, decl, ctx.overrides[name])
    if decl.default is None:
        ctx.unset_params[name] = decl.name.span
        return UNKNOWN
    value = ctx.evaluate(scope, decl.default)
    fitted = fit(ctx, scope, name, value, decl.type, decl.within, decl.default.span)
    if not isinstance(fitted, Unknown):
        ctx.params[name] = ResolvedParam(name, plain(fitted), "default", decl.name.span)
    return fitted


def _override(ctx: Context, scope: Scope, decl: ast.Param, text: str) -> Value:
    name = decl.name.text
    expr: ast.Expr
    if decl.type.name.text == "text":
        # On a command line a path needs no quotes.
        stripped = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
        expr = ast.String(decl.name.span, stripped)
        value: Value = Text(stripped)
    else:
        try:
            expr = parse_expression(text, f"--set {name}")
        except SpecError as error:
            for diagnostic in error.diagnostics:
                ctx.diagnostics.add(diagnostic)
            return UNKNOWN
        value = ctx.evaluate(scope, expr)
    fitted = fit(ctx, scope, name, value, decl.type, decl.within, expr.span)
    if not isinstance(fitted, Unknown):
        ctx.params[name] = ResolvedParam(name, plain(fitted), "--set", decl.name.span)
    return fitted


def known_type(ctx: Context, scope: Scope, type_: ast.TypeExpr) -> bool:
    """Whether there is such a type of parameter; reported where there is none."""
    if type_.name.text in TYPES:
        return True
    label, near = suggest(type_.name.text, TYPES)
    ctx.error(
        scope, "E0405", f"there is no parameter type `{type_.name.text}`", type_.name.span, label,
        notes=[f"types: {', '.join(TYPES)}"], fix=replace(type_.name.span, near) if near else None,
    )  # fmt: skip
    return False


def fit(
    ctx: Context, scope: Scope, name: str, value: Value, type_: ast.TypeExpr, within: ast.Range | None, span: Span
) -> Value:
    """A value as the type of a parameter takes it, inside its range."""
    if isinstance(value, Unknown):
        return UNKNOWN
    if not known_type(ctx, scope, type_):
        return UNKNOWN
    wanted = type_.name.text
    if not _is(value, wanted):
        return _wrong_type(ctx, scope, name, value, wanted, within, span)
    if wanted == "float" and isinstance(value, Num):
        value = Num(float(value.value), value.dim)
    if within is not None and not _inside(ctx, scope, name, value, within, wanted, span):
        return UNKNOWN
    return value


def _is(value: Value, wanted: str) -> bool:
    """Whether a value is of a type of parameters."""
    return {
        "float": isinstance(value, Num),
        "int": isinstance(value, Num) and isinstance(value.value, int),
        "bool": isinstance(value, Truth),
        "text": isinstance(value, Text),
        "list": isinstance(value, Items),
        "schedule": as_schedule(value) is not None,
        "duration": isinstance(value, Length),
        "ratio": isinstance(value, Length) and value.span.unit == "percent",
        "source": isinstance(value, Source),
        "model": isinstance(value, Model),
    }[wanted]


def _wrong_type(
    ctx: Context, scope: Scope, name: str, value: Value, wanted: str, within: ast.Range | None, span: Span
) -> Value:
    text, hint, code = "", f"declared as `{wanted}`", "E0404"
    if isinstance(value, Length) and wanted in ("float", "int", "schedule"):
        code = "E0401"
        if value.span.unit == "percent" and wanted != "int":
            text = digits(value.span.amount / 100)
            hint = f"write {text}"
        else:
            hint = "a number has no unit" if within is None else f"a number in {within.span.text}, without a unit"
            text = digits(value.span.amount)
    elif isinstance(value, Num | Length) and wanted in ("duration", "ratio"):
        code, hint = "E0401", "give it a unit: `10%`, `500 steps`"
        if isinstance(value, Num) and 0 <= value.value <= 1:
            text = f"{digits(value.value * 100)}%"
    elif isinstance(value, Text) and wanted in ("float", "int") and _is_number(value.value):
        hint = "without the quotes"
        text = value.value.strip()
    elif isinstance(value, Num) and wanted == "int":
        hint = "a whole number has no decimals"
        text = str(round(value.value))
    fix = replace(span, text) if text and _would_do(ctx, scope, text, wanted, within) else None
    return ctx.error(scope, code, f"`{name}` takes {TYPES[wanted]}, and this is {kind(value)}", span, hint, fix=fix)


def _would_do(ctx: Context, scope: Scope, text: str, wanted: str, within: ast.Range | None) -> bool:
    """Whether a number or a duration as it is written is of a type, and in a range."""
    value = ctx.evaluate(scope, parse_expression(text, text))
    if not _is(value, wanted):
        return False
    ends = _ends(ctx, scope, within) if within is not None else None
    return ends is None or all(_between(number, ends, within) for number in _numbers(value))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*\d+(\.\d+)?(e-?\d+)?\s*", text) is not None


def _ends(ctx: Context, scope: Scope, within: ast.Range) -> tuple[float, float] | None:
    """The two numbers of a range; None where they are none."""
    low, high = ctx.evaluate(scope, within.lo), ctx.evaluate(scope, within.hi)
    return (low.value, high.value) if isinstance(low, Num) and isinstance(high, Num) else None


def _numbers(value: Value) -> list[float]:
    """What has to lie in a range: a number, a schedule's bounds, a duration in its unit, a percentage as a share."""
    if isinstance(value, Scheduled):
        return list(schedules.bounds(value.schedule) or ())
    if isinstance(value, Num):
        return [float(value.value)]
    if isinstance(value, Length):
        return [value.span.amount / 100 if value.span.unit == "percent" else value.span.amount]
    return []


def _between(number: float, ends: tuple[float, float], within: ast.Range | None) -> bool:
    low, high = ends
    return low <= number and (number <= high if within is None or within.inclusive else number < high)


def _inside(ctx: Context, scope: Scope, name: str, value: Value, within: ast.Range, wanted: str, span: Span) -> bool:
    given = [ctx.evaluate(scope, end) for end in (within.lo, within.hi)]
    ends = _ends(ctx, scope, within)
    if ends is None:
        if not any(isinstance(end, Unknown) for end in given):
            ctx.error(scope, "E0406", "a range runs between numbers", within.span)
        return False
    low, high = ends
    if low > high:
        ctx.error(scope, "E0406", f"this range is empty: {low:g} is above {high:g}", within.span)
        return False
    for number in _numbers(value):
        if not _between(number, ends, within):
            near = _nearest(value, number, ends, within, wanted)
            fits = near is not None and _would_do(ctx, scope, near, wanted, within)
            ctx.error(
                scope, "E0403", f"`{name}` is {number:g}, outside {within.span.text}", span,
                f"the nearest is {near}" if fits else "", fix=replace(span, near) if fits and near else None,
            )  # fmt: skip
            return False
    return True


def _nearest(value: Value, number: float, ends: tuple[float, float], within: ast.Range, wanted: str) -> str | None:
    """What of a range is nearest to a number outside of it, as it is written; None where a range has no last number."""
    low, high = ends
    if wanted == "int":
        return str(math.ceil(low) if number < low else math.floor(high) if within.inclusive else math.ceil(high) - 1)
    if number >= high and not within.inclusive:
        return None
    end = low if number < low else high
    if not isinstance(value, Length):
        return digits(end)
    unit = value.span.unit
    return f"{digits(end * 100)}%" if unit == "percent" else f"{digits(end)} {unit}"


def unknown_overrides(ctx: Context, scope: Scope) -> None:
    """Report every `--set name=...` that is no parameter of the file or of a method that it uses."""
    own = [d.name for d in scope.names.values() if isinstance(d.decl, ast.Param)]
    declared = [*own, *(name for name in ctx.params if "." in name)]
    for name in ctx.overrides:
        head = scope.names.get(name.partition(".")[0])
        if name in declared or ("." in name and head is not None and isinstance(head.value, Unknown)):
            continue
        label, near = suggest(name, declared)
        notes = [f"its parameters: {', '.join(declared[:20])}"] if declared else ["it declares none"]
        ctx.error(
            scope, "E0407", f"this spec has no parameter `{name}`" + (f"; {label}" if near else ""), None, notes=notes
        )
