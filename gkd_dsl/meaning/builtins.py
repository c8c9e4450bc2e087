"""The functions that work on numbers, lists and layers: schedules, layer maps, optimisers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import cast

from gkd_dsl import aligners, schedules
from gkd_dsl.graph.nodes import OptimSpec
from gkd_dsl.meaning import conditions, counters, paths
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Directed,
    Drawn,
    Items,
    Length,
    Loss,
    Model,
    Num,
    Numbers,
    Optimiser,
    Scheduled,
    Tensor,
    Text,
    Truth,
    Unknown,
    Value,
    Word,
    as_schedule,
    digits,
    kind,
    plain,
    shown,
)
from gkd_dsl.syntax import ast

ALIGNERS = ("uniform", "last", "first", "skip", "stride", "all_pairs", "random_sorted")
SCHEDULES = ("ramp", "cosine", "step_at", "stairs", "constant")
OPTIMISERS = ("adamw", "sgd")


def call(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value:
    """A call of one of `BUILTINS`."""
    return BUILTINS[name](ctx, scope, name, expr)


def _arguments(
    ctx: Context, scope: Scope, name: str, expr: ast.Call, keywords: tuple[str, ...]
) -> tuple[list[tuple[Value, ast.Expr]], dict[str, tuple[Value, ast.Expr]]] | None:
    """Positional and keyword arguments with their places; None where one was reported or unknown."""
    positional: list[tuple[Value, ast.Expr]] = []
    named: dict[str, tuple[Value, ast.Expr]] = {}
    bad = False
    for arg in expr.args:
        if arg.name is not None and arg.name.text not in keywords:
            label, near = suggest(arg.name.text, keywords)
            ctx.error(
                scope, "E0234", f"`{name}` has no argument `{arg.name.text}`", arg.name.span,
                label or "not an argument", notes=[f"its arguments: {', '.join(keywords)}"] if keywords else [],
                fix=replace(arg.name.span, near) if near else None,
            )  # fmt: skip
            bad = True
            continue
        value = _word_or_value(ctx, scope, arg, ("decay",))
        if isinstance(value, Unknown):
            bad = True
        elif arg.name is not None:
            named[arg.name.text] = (value, arg.value)
        else:
            positional.append((value, arg.value))
    return None if bad else (positional, named)


def _word_or_value(ctx: Context, scope: Scope, arg: ast.Arg, words: tuple[str, ...]) -> Value:
    """An argument such as `decay = cosine`, where a bare name is a word."""
    if arg.name is not None and arg.name.text in words and isinstance(arg.value, ast.Name):
        return Word(arg.value.id)
    return ctx.evaluate(scope, arg.value)


# --- schedules ----------------------------------------------------------------------------------


def _schedule(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value:
    keyword = {
        "ramp": ("until",), "cosine": ("until",), "step_at": ("at",), "stairs": ("until", "count"), "constant": (),
    }[name]  # fmt: skip
    parts = _arguments(ctx, scope, name, expr, keyword)
    if parts is None:
        return UNKNOWN
    positional, named = parts
    if name == "constant":
        amount = as_schedule(positional[0][0]) if len(positional) == 1 else None
        if amount is None:
            return ctx.error(scope, "E0224", "`constant` takes one number", expr.span)
        return Scheduled(amount)
    form = f"{name}(0 -> 1, {keyword[0]} = 10%)" if name != "stairs" else "stairs(0 -> 1, count = 5, until = 100%)"
    if len(positional) != 1 or not isinstance(positional[0][0], Directed):
        fix = None
        if len(positional) == 2 and all(isinstance(value, Num) for value, _ in positional):
            first, second = (arg.span for arg in expr.args if arg.name is None)
            fix = replace(first.to(second), f"{first.text} -> {second.text}")
        return ctx.error(
            scope, "E0224", f"`{name}` runs from one number to another", expr.span, f"write `{form}`", fix=fix
        )
    ends = positional[0][0]
    numbers = []
    for end, written in ((ends.left, expr.args[0].value), (ends.right, expr.args[0].value)):
        if isinstance(end, Unknown):
            return UNKNOWN
        if not isinstance(end, Num):
            return ctx.error(scope, "E0401", f"`{name}` runs between numbers, and this is {kind(end)}", written.span)
        numbers.append(float(end.value))
    if keyword[0] not in named:
        return ctx.error(scope, "E0235", f"`{name}` needs `{keyword[0]}`", expr.span, f"write `{form}`")
    length, written = named[keyword[0]]
    if not isinstance(length, Length):
        return _needs_duration(ctx, scope, f"`{keyword[0]}`", length, written)
    if name == "stairs":
        return _stairs(ctx, scope, numbers, length.span, named.get("count"), expr)
    kinds: dict[str, type[schedules.Ramp | schedules.Cosine | schedules.StepAt]] = {
        "ramp": schedules.Ramp, "cosine": schedules.Cosine, "step_at": schedules.StepAt,
    }  # fmt: skip
    return Scheduled(kinds[name](numbers[0], numbers[1], length.span))


def _stairs(
    ctx: Context,
    scope: Scope,
    ends: list[float],
    until: schedules.Span,
    given: tuple[Value, ast.Expr] | None,
    expr: ast.Call,
) -> Value:
    if given is None:
        return ctx.error(scope, "E0235", "`stairs` needs `count`", expr.span, "its number of plateaus: `count = 5`")
    count, written = given
    if not isinstance(count, Num) or not isinstance(count.value, int) or count.value < 2:
        return ctx.error(
            scope, "E0403", f"`count` is a whole number from 2 on, and this is {shown(count)}", written.span
        )
    return Scheduled(schedules.Stairs(ends[0], ends[1], count.value, until))


def _needs_duration(
    ctx: Context, scope: Scope, what: str, value: Value, written: ast.Expr, unit: str = "steps"
) -> Value:
    hint, fix = "a duration has a unit: `10%`, `500 steps`, `3 epochs`", None
    if isinstance(value, Num) and (value.value > 0 or (value.value == 0 and unit == "steps")):
        text = f"{digits(value.value)} {unit if value.value != 1 else unit.removesuffix('s')}"
        if value.value < 1 and unit == "steps":
            text = f"{digits(value.value * 100)}%"
        hint, fix = f"write `{text}`", replace(written.span, text)
    return ctx.error(scope, "E0401", f"{what} is a duration, and this is {kind(value)}", written.span, hint, fix=fix)


# --- layer maps ---------------------------------------------------------------------------------


def _aligner(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value:
    function = getattr(aligners, name)
    options = tuple(
        p.name for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
    )
    extra = ("seed", "every") if name == "random_sorted" else ()
    visible = tuple(dict.fromkeys((*(o for o in options if o != "epoch"), *extra)))
    parts = _arguments(ctx, scope, name, expr, visible)
    if parts is None:
        return UNKNOWN
    positional, named = parts
    if len(positional) != 2:
        return ctx.error(
            scope, "E0224", f"`{name}` takes the student's layers and the teacher's", expr.span,
            f"write `{name}(s.layer, t.layer)`",
        )  # fmt: skip
    sides = []
    for value, written in positional:
        layers = paths.as_layers(value)
        if layers is None:
            return ctx.error(
                scope, "E0236", f"`{name}` pairs layers, and this is {kind(value)}", written.span,
                "write `s.layer`, or some of them: `s.layer[0 ..< 4]`",
            )  # fmt: skip
        sides.append(layers)
    values: dict[str, object] = {}
    for key, (value, written) in named.items():
        if key == "every":
            continue
        wants = "true or false" if key == "include_last" else "a whole number"
        fits = isinstance(value, Truth) if key == "include_last" else isinstance(value, Num) and _whole(value)
        if not fits:
            return ctx.error(
                scope, "E0404", f"`{key}` of `{name}` is {wants}, and this is {shown(value)}", written.span
            )
        values[key] = plain(value)
    every = named.get("every")
    try:
        if every is not None:
            return _drawn(ctx, scope, sides, values, *every)
        pairs = function(len(sides[0].indices), len(sides[1].indices), **values)
    except (ValueError, TypeError) as error:
        return ctx.error(scope, "E0237", f"`{name}` cannot pair these layers: {error}", expr.span)
    return Items(tuple(Items((Num(sides[0].indices[i]), Num(sides[1].indices[j]))) for i, j in pairs))


def _whole(value: Num) -> bool:
    return isinstance(value.value, int)


def _drawn(
    ctx: Context, scope: Scope, sides: list, values: dict[str, object], every: Value, written: ast.Expr
) -> Value:
    """A map that is drawn anew: all pairs that may come, each with the schedule of when it counts."""
    if not isinstance(every, Length):
        return _needs_duration(ctx, scope, "`every`", every, written, "epochs")
    if every.span.unit != "epochs":
        return ctx.error(
            scope, "E0401", "a layer map is drawn anew in epochs", written.span, "write `1 epoch`",
            fix=replace(written.span, "1 epoch"),
        )  # fmt: skip
    if every.span.amount <= 0:
        return ctx.error(scope, "E0403", "a layer map is drawn anew after more than nothing", written.span)
    student, teacher = sides
    seed = int(cast(int, values.pop("seed", 0)))
    count = values.pop("n", None)
    options = (len(student.indices), len(teacher.indices), None if count is None else int(cast(int, count)))
    pairs = aligners.possible_pairs(*options)
    drawn = aligners.random_sorted(*options[:2], n=options[2], seed=seed)
    return Drawn(
        tuple(
            (
                (student.indices[i], teacher.indices[j]),
                schedules.InDrawnMap(i, j, *options, seed, every.span.amount),
            )
            for i, j in pairs
        ),
        len(drawn),
    )


def _groups(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value:
    """`groups(s.layer, t.layer)`: each student layer with the run of teacher layers that it stands for."""
    parts = _arguments(ctx, scope, name, expr, ())
    if parts is None:
        return UNKNOWN
    sides = [paths.as_layers(value) for value, _ in parts[0]]
    if len(sides) != 2 or sides[0] is None or sides[1] is None:
        return ctx.error(
            scope, "E0236", "`groups` pairs the student's layers with runs of the teacher's", expr.span,
            "write `groups(s.layer, t.layer)`",
        )  # fmt: skip
    student, teacher = sides[0].indices, sides[1].indices
    if not student or len(teacher) % len(student):
        return ctx.error(
            scope, "E0237", f"`groups` cannot share {len(teacher)} layers equally among {len(student)}", expr.span
        )
    size = len(teacher) // len(student)
    return Items(
        tuple(
            Items((Num(i), Items(tuple(Num(j) for j in teacher[place * size : (place + 1) * size]))))
            for place, i in enumerate(student)
        )
    )


def _teachers(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value:
    """`teachers(ts)`: the indices of the models that a formal holds."""
    parts = _arguments(ctx, scope, name, expr, ())
    if parts is None:
        return UNKNOWN
    held = parts[0][0][0] if len(parts[0]) == 1 else None
    if isinstance(held, Items) and all(isinstance(item, Model) for item in held.items):
        return Numbers(0, len(held.items))
    if isinstance(held, Model):
        return Numbers(0, 1)
    return ctx.error(scope, "E0233", "`teachers` takes the teachers of a method", expr.span, "write `teachers(ts)`")


# --- lists --------------------------------------------------------------------------------------


def _reduce(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value:
    """`sum(...)` and `mean(...)` of a list: numbers, schedules, losses or tensors."""
    from gkd_dsl.meaning import operators
    from gkd_dsl.meaning.evaluate import scale

    if name == "mean" and len(expr.args) == 2 and expr.args[1].name is not None and expr.args[1].name.text == "last":
        return counters.recent(ctx, scope, expr)
    if len(expr.args) != 1 or expr.args[0].name is not None:
        return ctx.error(
            scope, "E0224", f"`{name}` takes one list", expr.span, f"write `{name}(... for (i, j) in pairs)`"
        )
    written = expr.args[0].value
    value = paths.as_tensor(ctx, scope, ctx.evaluate(scope, written), written)
    if isinstance(value, Unknown):
        return UNKNOWN
    if isinstance(value, Loss):
        return value
    if isinstance(value, Tensor):
        if name == "mean":
            return operators.apply(ctx, scope, "mean", {"x": value}, {}, expr)
        return ctx.error(
            scope, "E0224", "`sum` takes a list, and this is a tensor", written.span, "`mean(x)` makes a loss of it"
        )
    if not isinstance(value, Items):
        return ctx.error(scope, "E0224", f"`{name}` takes a list, not {kind(value)}", written.span)
    items = value.items
    share = schedules.Constant(1.0 / (value.count or len(items))) if items else schedules.Constant(1.0)
    weighs = name == "mean"
    if items and all(isinstance(item, Loss) for item in items):
        terms = tuple(term for item in items for term in cast(Loss, item).terms)
        loss = Loss(terms, any(cast(Loss, item).partial for item in items))
        return scale(loss, share) if weighs else loss
    if items and all(as_schedule(item) is not None for item in items):
        if all(isinstance(item, Num) for item in items):
            total = sum(cast(Num, item).value for item in items)
            return Num(total / len(items) if weighs else total)
        combined: schedules.Schedule = schedules.Constant(0.0)
        for item in items:
            combined = schedules.combine("+", combined, cast(schedules.Schedule, as_schedule(item)))
        return Scheduled(schedules.combine("*", share, combined) if weighs else combined)
    if items and all(isinstance(item, Tensor) for item in items):
        part = share.amount if weighs else 1.0
        return operators.sum_tensors(ctx, scope, [cast(Tensor, item) for item in items], part, expr)
    kinds = sorted({kind(item) for item in items})
    return ctx.error(
        scope, "E0238", f"`{name}` takes a list of one kind, and this holds {' and '.join(kinds) or 'nothing'}",
        written.span,
    )  # fmt: skip


# --- optimisers ---------------------------------------------------------------------------------

_OPTIONS = {
    "adamw": ("lr", "weight_decay", "betas", "eps", "warmup", "decay", "clip"),
    "sgd": ("lr", "weight_decay", "momentum", "warmup", "decay", "clip"),
}
_RANGES = {
    "lr": (0.0, 100.0), "weight_decay": (0.0, 100.0), "eps": (0.0, 1.0), "momentum": (0.0, 1.0), "clip": (0.0, 1e9),
}  # fmt: skip
_DECAYS = ("linear", "cosine", "constant")


def _optimiser(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value:
    parts = _arguments(ctx, scope, name, expr, _OPTIONS[name])
    if parts is None:
        return UNKNOWN
    positional, named = parts
    if positional:
        return ctx.error(scope, "E0224", f"`{name}` takes named arguments", positional[0][1].span, "write `lr = ...`")
    fields: dict[str, object] = {}
    for key, (value, written) in named.items():
        if key == "warmup":
            if not isinstance(value, Length):
                return _needs_duration(ctx, scope, "`warmup`", value, written)
            fields[key] = value.span
        elif key == "decay":
            word = value.value if isinstance(value, Word | Text) else ""
            if word not in _DECAYS:
                label, near = suggest(str(word), _DECAYS)
                return ctx.error(
                    scope, "E0402", f"`decay` is one of {', '.join(_DECAYS)}", written.span, label,
                    fix=replace(written.span, near) if near else None,
                )  # fmt: skip
            fields[key] = word
        elif key == "betas":
            numbers = plain(value)
            valid = isinstance(numbers, tuple) and len(numbers) == 2
            if not valid or not all(isinstance(n, int | float) and 0 <= n < 1 for n in cast(tuple, numbers)):
                return ctx.error(scope, "E0403", "`betas` are two numbers from 0 to 1", written.span)
            fields[key] = tuple(float(n) for n in cast(tuple, numbers))
        elif key == "clip" and isinstance(value, Truth) and not value.value:
            fields[key] = None
        elif not isinstance(value, Num):
            return _not_a_number(ctx, scope, key, value, written)
        else:
            low, high = _RANGES[key]
            if key == "clip" and value.value == 0:
                return ctx.error(
                    scope, "E0403", "`clip` is 0, so that nothing would be learned", written.span,
                    "`false` clips nothing", fix=replace(written.span, "false"),
                )  # fmt: skip
            if not low <= value.value <= high:
                return ctx.error(
                    scope, "E0403", f"`{key}` is {value.value:g}, outside {low:g} to {high:g}", written.span
                )
            fields[key] = float(value.value)
    if name == "sgd":
        fields = {"weight_decay": 0.0, **fields}
    return Optimiser(OptimSpec(name=name, **fields))  # type: ignore[arg-type]


def _not_a_number(ctx: Context, scope: Scope, key: str, value: Value, written: ast.Expr) -> Value:
    fix, hint = None, ""
    if isinstance(value, Length) and value.span.unit == "percent":
        hint = f"write {digits(value.span.amount / 100)}"
        fix = replace(written.span, digits(value.span.amount / 100))
    code = "E0401" if isinstance(value, Length) else "E0404"
    return ctx.error(scope, code, f"`{key}` is a number, and this is {kind(value)}", written.span, hint, fix=fix)


BUILTINS: dict[str, Callable[[Context, Scope, str, ast.Call], Value]] = {
    **dict.fromkeys(SCHEDULES, _schedule),
    **dict.fromkeys(ALIGNERS, _aligner),
    **dict.fromkeys(OPTIMISERS, _optimiser),
    "groups": _groups,
    "teachers": _teachers,
    "gate": conditions.gate,
    "coin": conditions.coin,
    "draw": conditions.draw,
    "sum": _reduce,
    "mean": _reduce,
}
