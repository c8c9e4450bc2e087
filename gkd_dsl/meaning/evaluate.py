"""Expressions: names, arithmetic, indexing, comprehensions."""

from __future__ import annotations

import math
from typing import Literal, cast

from gkd_dsl import schedules
from gkd_dsl.diagnostics import Label
from gkd_dsl.meaning import calls, conditions, declare, operators, passes, paths, policies
from gkd_dsl.meaning.context import MOST, Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Batch,
    Block,
    Condition,
    Directed,
    Drawn,
    Family,
    Instance,
    Items,
    Layers,
    Length,
    Loss,
    Model,
    Module,
    Num,
    Numbers,
    Policy,
    PythonModule,
    Scheduled,
    TapPart,
    Tensor,
    Term,
    Text,
    Truth,
    Unknown,
    Value,
    as_schedule,
    digits,
    gated,
    kind,
    plural,
    shown,
)
from gkd_dsl.syntax import ast

_ARITHMETIC = ("+", "-", "*", "/")
_LIMIT = 4096
_LARGEST = 1e300


def evaluate(ctx: Context, scope: Scope, expr: ast.Expr) -> Value:
    """The value of an expression in a scope."""
    match expr:
        case ast.Missing():
            return UNKNOWN
        case ast.Name():
            return _name(ctx, scope, expr)
        case ast.Number():
            return _number(ctx, scope, expr)
        case ast.Bool():
            return Truth(expr.value)
        case ast.String():
            return Text(expr.value)
        case ast.Duration():
            return Length(schedules.Span(expr.value, expr.unit))
        case ast.List():
            items = tuple(ctx.evaluate(scope, item) for item in expr.items)
            return UNKNOWN if any(isinstance(item, Unknown) for item in items) else Items(items)
        case ast.Attr():
            return _attribute(ctx, scope, expr)
        case ast.Index():
            return _index(ctx, scope, expr)
        case ast.Call():
            return calls.call(ctx, scope, expr)
        case ast.Unary():
            return _unary(ctx, scope, expr)
        case ast.Binary():
            return _binary(ctx, scope, expr)
        case ast.Pipe():
            return _pipe(ctx, scope, expr)
        case ast.Pair():
            return _pair_alone(ctx, scope, expr)
        case ast.Arrow():
            return Directed(ctx.evaluate(scope, expr.left), ctx.evaluate(scope, expr.right))
        case ast.Range():
            return _range(ctx, scope, expr)
        case ast.Comprehension():
            return _comprehension(ctx, scope, expr)
    raise AssertionError(expr)


def _number(ctx: Context, scope: Scope, expr: ast.Number) -> Value:
    if abs(expr.value) <= _LARGEST:
        return Num(expr.value)
    return ctx.error(scope, "E0216", "this number is too large", expr.span)


def _name(ctx: Context, scope: Scope, expr: ast.Name) -> Value:
    found = scope.find(expr.id)
    if expr.id == "batch":
        return Batch() if found is None else UNKNOWN
    if found is None:
        candidates = {d.name for d in scope.visible()} | {"batch"}
        label, near = suggest(expr.id, candidates)
        if calls.is_function(expr.id):
            return ctx.error(
                scope, "E0207", f"`{expr.id}` is a function, and must be called", expr.span, f"write `{expr.id}(...)`"
            )
        notes = [] if near else _names_here(scope)
        return ctx.error(
            scope,
            "E0203",
            f"nothing is called `{expr.id}` here",
            expr.span,
            label or "not declared",
            notes=notes,
            fix=replace(expr.span, near) if near else None,
        )
    definition, home = found
    definition.used = True
    return declare.value_of(ctx, home, definition, expr.span, scope)


def _names_here(scope: Scope) -> list[str]:
    names = sorted({d.name for d in scope.visible()})
    return [f"declared here: {', '.join(names[:20])}"] if names else []


def _attribute(ctx: Context, scope: Scope, expr: ast.Attr) -> Value:
    if isinstance(expr.base, ast.Name) and expr.base.id == "stage" and scope.find("stage") is None:
        return conditions.progress(ctx, scope, expr)
    base = ctx.evaluate(scope, expr.base)
    match base:
        case Unknown():
            return UNKNOWN
        case Model() | TapPart():
            return paths.member(ctx, scope, base, expr)
        case Batch():
            column = operators.batch_column(ctx, scope, expr)
            return passes.rolled(ctx, scope, column, base.shift, expr) if isinstance(column, Tensor) else column
        case Instance():
            return _instance_member(ctx, scope, base, expr)
        case Policy():
            return policies.member(ctx, scope, base, expr)
        case Module():
            return _module_member(ctx, scope, base, expr)
        case PythonModule():
            return ctx.error(
                scope,
                "E0207",
                f"`{expr.name.text}` is a function, and must be called",
                expr.span,
                f"write `{expr.span.text}(...)`",
            )
    hint = f"`.{expr.name.text}` of {kind(base)}"
    if isinstance(base, Items) and base.items and all(isinstance(item, Model) for item in base.items):
        one = f"{expr.base.span.text}[k].{expr.name.text}"
        hint = f"write `{one}`, as in `sum(... {one} ... for k in teachers({expr.base.span.text}))`"
    return ctx.error(scope, "E0206", f"{kind(base)} has no parts", expr.name.span, hint)


def _instance_member(ctx: Context, scope: Scope, base: Instance, expr: ast.Attr) -> Value:
    definition = base.scope.names.get(expr.name.text)
    if definition is not None and not isinstance(definition.decl, ast.Formal):
        definition.used = True
        return declare.value_of(ctx, base.scope, definition, expr.span, scope)
    members = [n for n, d in base.scope.names.items() if not isinstance(d.decl, ast.Formal)]
    if expr.name.text == "total" and base.total is not None:
        return base.total
    label, near = suggest(expr.name.text, members)
    return ctx.error(
        scope,
        "E0208",
        f"`{base.name}` has no `{expr.name.text}`",
        expr.name.span,
        label or "not in this method",
        notes=[f"it has: {', '.join(members)}"],
        fix=replace(expr.name.span, near) if near else None,
    )


def _module_member(ctx: Context, scope: Scope, base: Module, expr: ast.Attr) -> Value:
    definition = base.scope.names.get(expr.name.text)
    if definition is not None:
        return declare.value_of(ctx, base.scope, definition, expr.span, scope)
    label, near = suggest(expr.name.text, base.scope.names)
    return ctx.error(
        scope, "E0209", f"`{base.name}` has no `{expr.name.text}`", expr.name.span, label or "not in that file",
        fix=replace(expr.name.span, near) if near else None,
    )  # fmt: skip


def _index(ctx: Context, scope: Scope, expr: ast.Index) -> Value:
    base = ctx.evaluate(scope, expr.base)
    if isinstance(base, Unknown):
        return UNKNOWN
    if isinstance(base, TapPart):
        return paths.indexed(ctx, scope, base, expr)
    args = [ctx.evaluate(scope, arg) for arg in expr.args]
    if any(isinstance(arg, Unknown) for arg in args):
        return UNKNOWN
    numbers: list[int] = []
    for arg, written in zip(args, expr.args, strict=True):
        if not isinstance(arg, Num) or not isinstance(arg.value, int):
            return ctx.error(scope, "E0210", f"an index is a whole number, not {shown(arg)}", written.span, gated(arg))
        numbers.append(arg.value)
    match base:
        case Family():
            if len(numbers) != base.arity:
                return ctx.error(
                    scope,
                    "E0211",
                    f"`{base.name}` takes {plural(base.arity, 'index', 'indices')}, not {len(numbers)}",
                    expr.args[0].span.to(expr.args[-1].span),
                )
            return base.make(tuple(numbers), expr.span)
        case Items() if len(numbers) == 1:
            count = len(base.items)
            if not -count <= numbers[0] < count:
                return ctx.error(
                    scope, "E0212", f"index {numbers[0]} is outside a list of {count}", expr.args[0].span,
                    f"its indices are 0 to {count - 1}",
                )  # fmt: skip
            return base.items[numbers[0]]
        case Tensor() if len(numbers) == 1:
            return operators.index(ctx, scope, base, numbers[0], expr)
        case Layers() if len(numbers) == 1:
            return paths.block(ctx, scope, base, numbers[0], expr)
        case Model() if numbers in ([0], [-1]) and _is_formal(scope, expr.base):
            # The one model of a formal that may hold several: `ts[0]`.
            return base
    return ctx.error(scope, "E0206", f"{kind(base)} cannot be indexed", expr.span)


def _is_formal(scope: Scope, expr: ast.Expr) -> bool:
    found = scope.find(expr.id) if isinstance(expr, ast.Name) else None
    return found is not None and isinstance(found[0].decl, ast.Formal)


def _unary(ctx: Context, scope: Scope, expr: ast.Unary) -> Value:
    value = _instance_total(ctx, scope, ctx.evaluate(scope, expr.value), expr.value)
    value = paths.as_tensor(ctx, scope, value, expr.value)
    match value:
        case Unknown():
            return UNKNOWN
        case Truth() | Condition() | Scheduled() if expr.op == "not" and (held := conditions.negated(value)):
            return held
        case Tensor() if expr.op == "not":
            return operators.apply(ctx, scope, "not", {"x": value}, {}, expr)
        case Num() if expr.op == "-":
            return Num(-value.value)
        case Scheduled() if expr.op == "-":
            return Scheduled(schedules.combine("*", schedules.Constant(-1.0), value.schedule))
        case Loss() if expr.op == "-":
            return scale(value, schedules.Constant(-1.0))
        case Tensor() if expr.op == "-":
            return operators.apply(ctx, scope, "neg", {"x": value}, {}, expr)
    return ctx.error(scope, "E0213", f"`{expr.op}` does not take {kind(value)}", expr.span)


def scale(loss: Loss, weight: schedules.Schedule) -> Loss:
    """`weight * loss`."""
    return Loss(
        tuple(Term(schedules.combine("*", weight, term.weight), term.loss) for term in loss.terms), loss.partial
    )


def _binary(ctx: Context, scope: Scope, expr: ast.Binary) -> Value:
    left, right = ctx.evaluate(scope, expr.left), ctx.evaluate(scope, expr.right)
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        # A sum with an unknown part is still a sum of the losses that are known, so that
        # an error in one term does not hide the others.
        known = right if isinstance(left, Unknown) else left
        if isinstance(known, Loss) and expr.op in ("+", "-", "*"):
            return Loss(known.terms, partial=True)
        return UNKNOWN
    left, right = _instance_total(ctx, scope, left, expr.left), _instance_total(ctx, scope, right, expr.right)
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        return UNKNOWN
    left, right = paths.as_tensor(ctx, scope, left, expr.left), paths.as_tensor(ctx, scope, right, expr.right)
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        return UNKNOWN
    if isinstance(left, Length) or isinstance(right, Length):
        return _unit(ctx, scope, expr, left, right)
    if isinstance(left, Loss) or isinstance(right, Loss):
        for side, written in ((left, expr.left), (right, expr.right)):
            if isinstance(side, Condition):
                return conditions.as_weight(ctx, scope, side, written)
        return _loss_arithmetic(ctx, scope, expr, left, right)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return operators.arithmetic(ctx, scope, expr, left, right)
    for side, written in ((left, expr.left), (right, expr.right)):
        if isinstance(side, Condition) and expr.op in _ARITHMETIC:
            return conditions.as_weight(ctx, scope, side, written)
    if expr.op in _ARITHMETIC:
        return _number_arithmetic(ctx, scope, expr, left, right)
    if isinstance(left, Num) and isinstance(right, Num) and expr.op in ("==", "!=", "<", "<=", ">", ">="):
        a, b = left.value, right.value
        return Truth({"==": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[expr.op])
    made = conditions.compared(expr, left, right) or conditions.joined(ctx, scope, expr, left, right)
    return _unfit(ctx, scope, expr, left, right) if made is None else made


def _unfit(ctx: Context, scope: Scope, expr: ast.Binary, left: Value, right: Value, code: str = "E0213") -> Value:
    """An operator between values that it does not take."""
    sides = [Label(expr.left.span, kind(left), primary=False), Label(expr.right.span, kind(right), primary=False)]
    return ctx.error(
        scope, code, f"`{expr.op}` does not go between {kind(left)} and {kind(right)}", expr.op_span, labels=sides
    )


def _instance_total(ctx: Context, scope: Scope, value: Value, expr: ast.Expr) -> Value:
    if not isinstance(value, Instance):
        return value
    if value.total is not None:
        return value.total
    losses = [d.name for d in value.scope.names.values() if isinstance(d.decl, ast.LossDecl) and d.decl.formals is None]
    fix = replace(expr.span, f"{expr.span.text}.{losses[0]}") if len(losses) == 1 else None
    return ctx.error(
        scope, "E0214", f"`{value.name}` has no `total`", expr.span, "name one of its losses",
        notes=[f"its losses: {', '.join(losses)}"] if losses else [], fix=fix,
    )  # fmt: skip


def as_loss(ctx: Context, scope: Scope, value: Value, expr: ast.Expr) -> Value:
    """A value where a loss is expected: a loss, a used method's total, a tensor (its mean)."""
    value = paths.as_tensor(ctx, scope, _instance_total(ctx, scope, value, expr), expr)
    if isinstance(value, Tensor):
        return operators.apply(ctx, scope, "mean", {"x": value}, {}, expr)
    if isinstance(value, Loss | Unknown):
        return value
    return ctx.error(scope, "E0215", f"a loss is expected here, and this is {kind(value)}", expr.span)


def _loss_arithmetic(ctx: Context, scope: Scope, expr: ast.Binary, left: Value, right: Value) -> Value:
    if isinstance(left, Loss) and isinstance(right, Loss):
        if expr.op == "+":
            return Loss(left.terms + right.terms, left.partial or right.partial)
        if expr.op == "-":
            negative = scale(right, schedules.Constant(-1.0))
            return Loss(left.terms + negative.terms, left.partial or right.partial)
        return ctx.error(
            scope,
            "E0331",
            f"an objective is a sum of weighted losses: `{expr.op}` between two losses is not linear",
            expr.op_span,
            "both sides are losses",
            labels=(),
            notes=["weight a loss by a number or a schedule; for a weight of each sample use `per_sample(...)`"],
        )
    loss, other = (left, right) if isinstance(left, Loss) else (right, left)
    assert isinstance(loss, Loss)
    weight = as_schedule(other)
    if weight is not None and (expr.op == "*" or (expr.op == "/" and isinstance(left, Loss))):
        if expr.op == "/":
            if _may_be_zero(weight):
                return _by_zero(ctx, scope, weight, expr)
            weight = schedules.combine("/", schedules.Constant(1.0), weight)
        return scale(loss, weight)
    if weight is not None and expr.op in ("+", "-"):
        return ctx.error(
            scope, "E0332", "a number added to a loss changes nothing that is trained", expr.op_span,
            "a loss and a number", notes=["write a weight with `*`, or leave the number out"],
        )  # fmt: skip
    if weight is not None:
        return ctx.error(scope, "E0331", f"`{expr.op}` of a number and a loss is not linear in the loss", expr.op_span)
    if isinstance(other, Tensor) and expr.op == "*":
        return ctx.error(
            scope,
            "E0333",
            "a tensor does not weight a reduced loss",
            expr.op_span,
            f"{other.type} times a loss",
            notes=["write `w * per_sample(loss)`, or give the loss `sample_weight = w` or `token_weight = w`"],
        )
    return _unfit(ctx, scope, expr, left, right, "E0331" if expr.op in ("*", "/") else "E0213")


def _unit(ctx: Context, scope: Scope, expr: ast.Binary, left: Value, right: Value) -> Value:
    """A duration or a percentage as an operand."""
    length, written = (left, expr.left) if isinstance(left, Length) else (right, expr.right)
    assert isinstance(length, Length)
    fix, hint = None, "numbers and schedules have no unit"
    if length.span.unit == "percent":
        text = digits(length.span.amount / 100)
        fix, hint = replace(written.span, text), f"write `{text}`"
    return ctx.error(scope, "E0401", f"{kind(length)} stands where a number belongs", written.span, hint, fix=fix)


def _number_arithmetic(ctx: Context, scope: Scope, expr: ast.Binary, left: Value, right: Value) -> Value:
    if isinstance(left, Num) and isinstance(right, Num):
        return _of_numbers(ctx, scope, expr, left.value, right.value)
    first, second = as_schedule(left), as_schedule(right)
    if first is None or second is None:
        return _unfit(ctx, scope, expr, left, right)
    if expr.op == "/" and _may_be_zero(second):
        return _by_zero(ctx, scope, second, expr)
    return Scheduled(schedules.combine(cast(Literal["+", "-", "*", "/"], expr.op), first, second))


def _may_be_zero(divisor: schedules.Schedule) -> bool:
    """Whether a schedule is known to reach, or to pass, 0."""
    limits = schedules.bounds(divisor)
    return limits is not None and limits[0] <= 0.0 <= limits[1]


def _by_zero(ctx: Context, scope: Scope, divisor: schedules.Schedule, expr: ast.Binary) -> Value:
    if isinstance(divisor, schedules.Constant):
        return ctx.error(scope, "E0216", "division by zero", expr.right.span)
    low, high = schedules.bounds(divisor) or (0.0, 0.0)
    return ctx.error(
        scope, "E0216", "this schedule can be zero, and something is divided by it", expr.right.span,
        f"from {low:g} to {high:g}",
    )  # fmt: skip


def _of_numbers(ctx: Context, scope: Scope, expr: ast.Binary, a: int | float, b: int | float) -> Value:
    if expr.op == "/" and b == 0:
        return ctx.error(scope, "E0216", "division by zero", expr.right.span)
    result: int | float
    try:
        if expr.op == "/":
            whole = isinstance(a, int) and isinstance(b, int) and a % b == 0
            result = a // b if whole else a / b
        else:
            result = a + b if expr.op == "+" else a - b if expr.op == "-" else a * b
        if math.isfinite(float(result)):
            return Num(result)
    except OverflowError:
        pass
    return ctx.error(scope, "E0216", "this number is too large", expr.span)


def _pipe(ctx: Context, scope: Scope, expr: ast.Pipe) -> Value:
    value = paths.as_tensor(ctx, scope, ctx.evaluate(scope, expr.value), expr.value)
    block = ctx.evaluate(scope, expr.block)
    if isinstance(value, Unknown) or isinstance(block, Unknown):
        return UNKNOWN
    if isinstance(block, Family):
        return ctx.error(
            scope, "E0311", f"`{block.name}` is a family of projections: say which", expr.block.span,
            f"write `{block.name}[i]`",
        )  # fmt: skip
    if not isinstance(block, Block):
        return ctx.error(
            scope, "E0310", f"`|>` takes a projection, not {kind(block)}", expr.block.span,
            notes=["declare one: `project W = linear(s.H -> t.H)`"],
        )  # fmt: skip
    if not isinstance(value, Tensor):
        return ctx.error(scope, "E0310", f"`|>` projects a tensor, not {kind(value)}", expr.value.span)
    return operators.project(ctx, scope, value, block, expr)


def _pair_alone(ctx: Context, scope: Scope, expr: ast.Pair) -> Value:
    return ctx.error(
        scope,
        "E0334",
        "`<-` stands inside a loss: it says what is compared, not how",
        expr.arrow,
        "which loss?",
        notes=["for example `mse(a <- b)` or `kl(a <- b, temperature = 2.0)`"],
    )


def _range(ctx: Context, scope: Scope, expr: ast.Range) -> Value:
    ends = []
    for end in (expr.lo, expr.hi):
        value = ctx.evaluate(scope, end)
        if isinstance(value, Unknown):
            return UNKNOWN
        if not isinstance(value, Num) or not isinstance(value.value, int):
            return ctx.error(
                scope, "E0210", f"a range runs between whole numbers, and this is {shown(value)}", end.span
            )
        ends.append(value.value)
    return Numbers(ends[0], ends[1] + (1 if expr.inclusive else 0))


def elements(ctx: Context, scope: Scope, value: Value, expr: ast.Expr) -> list[tuple[Value, schedules.Schedule]] | None:
    """What a comprehension runs over, each with its weight; None where that was reported or unknown."""
    one = schedules.Constant(1.0)
    match value:
        case Unknown():
            return None
        case Items():
            return [(item, one) for item in value.items]
        case Model() if _is_formal(scope, expr):
            # The one model of a formal that may hold several: `for t in ts`.
            return [(value, one)]
        case Numbers() if value.hi - value.lo > _LIMIT:
            ctx.error(scope, "E0218", f"this runs over {value.hi - value.lo} numbers, more than {_LIMIT}", expr.span)
            return None
        case Numbers():
            return [(Num(number), one) for number in range(value.lo, value.hi)]
        case Layers():
            return [(Num(number), one) for number in value.indices]
        case Drawn():
            return [(Items(tuple(Num(n) for n in pair)), weight) for pair, weight in value.pairs]
    text = f"0 ..< {expr.span.text}"
    counts = (
        isinstance(value, Num) and isinstance(value.value, int) and isinstance(expr, ast.Number | ast.Attr | ast.Name)
    )
    ctx.error(
        scope, "E0217", f"`for` runs over a list, a range or a layer map, not {kind(value)}", expr.span,
        f"write `{text}`" if counts else "", fix=replace(expr.span, text) if counts else None,
    )  # fmt: skip
    return None


def _why_empty(value: Value) -> str:
    return f"no number is from {value.lo} and below {value.hi}" if isinstance(value, Numbers) else "an empty list"


def unpacked(ctx: Context, scope: Scope, binders: tuple[ast.Ident, ...], element: Value) -> dict[str, Value] | None:
    """What each name of a `for` stands for; `_` stands for nothing. None where that was reported."""
    names = [binder.text for binder in binders]
    if len(names) == 1:
        return {names[0]: element} if names != ["_"] else {}
    if isinstance(element, Items) and len(element.items) == len(names):
        return {name: value for name, value in zip(names, element.items, strict=True) if name != "_"}
    size = len(element.items) if isinstance(element, Items) else 1
    ctx.error(
        scope, "E0220", f"{len(names)} names for elements of {size}", binders[0].span.to(binders[-1].span),
        f"each element is {kind(element)}" if size == 1 else f"{size} in each element",
    )  # fmt: skip
    return None


def _comprehension(ctx: Context, scope: Scope, expr: ast.Comprehension) -> Value:
    iterable = ctx.evaluate(scope, expr.iterable)
    over = elements(ctx, scope, iterable, expr.iterable)
    if over is None:
        return UNKNOWN
    ctx.elements += len(over)
    if len(over) > _LIMIT or ctx.elements > MOST:
        what = f"{len(over)} elements, more than {_LIMIT}"
        if len(over) <= _LIMIT:
            what = f"more than {MOST} elements with all that came before"
        return ctx.error(scope, "E0218", f"this runs over {what}", expr.iterable.span)
    if not over:
        return ctx.error(scope, "E0219", "this runs over nothing", expr.iterable.span, _why_empty(iterable))
    out: list[Value] = []
    for element, weight in over:
        bound = unpacked(ctx, scope, expr.binders, element)
        if bound is None:
            return UNKNOWN
        value = ctx.evaluate(scope.child(**bound), expr.element)
        value = paths.as_tensor(ctx, scope, value, expr.element)
        if isinstance(value, Unknown):
            # The same fault would be found for each element; once is enough.
            return UNKNOWN
        if weight != schedules.Constant(1.0):
            value = _weighed(ctx, scope, value, weight, expr.element)
            if isinstance(value, Unknown):
                return UNKNOWN
        out.append(value)
    return Items(tuple(out), iterable.count if isinstance(iterable, Drawn) else None)


def _weighed(ctx: Context, scope: Scope, value: Value, weight: schedules.Schedule, expr: ast.Expr) -> Value:
    """An element of a map that is drawn anew: a loss or a tensor, 0 while its pair is not drawn."""
    if isinstance(value, Loss):
        return scale(value, weight)
    if isinstance(value, Tensor):
        return operators.apply(ctx, scope, "mul", {"a": value}, {"b": weight}, expr)
    return ctx.error(scope, "E0221", "a layer map that is drawn anew selects losses and tensors only", expr.span)
