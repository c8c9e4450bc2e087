"""Calls: which function is meant, and its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

from gkd_dsl.meaning import builtins, declare, gradients, operators, passes, paths
from gkd_dsl.meaning.context import MOST, Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    LossFunction,
    Method,
    Model,
    Num,
    PythonModule,
    TapPart,
    Unknown,
    Value,
    kind,
    plural,
)
from gkd_dsl.ops import registry
from gkd_dsl.syntax import ast

LATER = {
    "keep", "ids", "rollout", "peft",
}  # fmt: skip
"""Functions of what a later version runs: known to the checker."""

DECLARED = {
    "hf": "a model: `teacher t = hf(...)`",
    "truncated": "a model: `student s = truncated(t, layers = [...])`",
    "random_init": 'a model: `student s = random_init("...")`',
    "cached": 'a model: `teacher t = cached("outputs/t")`',
    "linear": "a projection: `project W = linear(s.H -> t.H)`",
    "selector": "a policy: `policy pi = selector(state[k] for k in teachers(ts)) { ... }`",
}


_OF_NUMBERS: dict[str, Callable[[float], float]] = {
    "log": math.log, "exp": math.exp, "sqrt": math.sqrt, "abs": abs
}  # fmt: skip


def is_function(name: str) -> bool:
    """Whether a name is a function of the language."""
    return (
        name in builtins.BUILTINS
        or name == "gradient"
        or name in LATER
        or name in DECLARED
        or registry.lookup(name) is not None
    )


def call(ctx: Context, scope: Scope, expr: ast.Call) -> Value:
    """The value of a call."""
    func = expr.func
    if isinstance(func, ast.Attr):
        return _call_member(ctx, scope, expr, func)
    if not isinstance(func, ast.Name):
        return ctx.error(scope, "E0228", "only a name can be called", func.span)
    name = func.id
    found = scope.find(name)
    # A metric may be called `accuracy`: where it is called, the operator is meant.
    if found is not None and is_function(name) and not isinstance(found[0].decl, ast.LossDecl | ast.MethodDecl):
        found = None
    if found is not None:
        found[0].used = True
        value = declare.value_of(ctx, found[1], found[0], func.span, scope)
        if isinstance(value, Unknown):
            return UNKNOWN
        if isinstance(value, LossFunction):
            return _call_loss(ctx, scope, value, expr)
        if isinstance(value, Model):
            return ctx.error(
                scope, "E0228", f"`{name}` is {kind(value)}, and is not called", func.span,
                f"declare a pass: `pass x = {expr.span.text}`",
            )  # fmt: skip
        if isinstance(value, Method):
            return ctx.error(scope, "E0230", f"`{name}` is a method: write `use {expr.span.text} as ...`", func.span)
        if not is_function(name):
            fix = replace(expr.span, name) if not expr.args else None
            return ctx.error(scope, "E0228", f"`{name}` is {kind(value)}, and is not called", func.span, fix=fix)
    if name in builtins.BUILTINS:
        return builtins.call(ctx, scope, name, expr)
    if name == "roll" and (moved := passes.roll(ctx, scope, expr)) is not None:
        return moved
    if name == "gradient":
        return gradients.gradient(ctx, scope, expr)
    spec = registry.lookup(name)
    if spec is not None:
        number = _of_number(ctx, scope, name, expr) if name in _OF_NUMBERS else None
        return operators.call(ctx, scope, spec, expr) if number is None else number
    if name in LATER:
        for arg in expr.args:
            ctx.evaluate(scope, arg.value)
        return ctx.not_yet(scope, f"`{name}`", expr.span)
    if name in DECLARED:
        return ctx.error(scope, "E0230", f"`{name}` declares {DECLARED[name]}", func.span, "not inside an expression")
    candidates = [*registry.names(), *builtins.BUILTINS, "gradient", *LATER]
    label, near = suggest(name, candidates)
    return ctx.error(
        scope,
        "E0231",
        f"there is no operator or function `{name}`",
        func.span,
        label or "not known",
        notes=[] if near else ["`gkd explain operators` lists them"],
        fix=replace(func.span, near) if near else None,
    )


def _of_number(ctx: Context, scope: Scope, name: str, expr: ast.Call) -> Value | None:
    """`log(s.C)`: a function of a plain number; None where its argument is something else."""
    if len(expr.args) != 1 or expr.args[0].name is not None or not _is_number(scope, expr.args[0].value):
        return None
    value = ctx.evaluate(scope, expr.args[0].value)
    if isinstance(value, Unknown):
        return UNKNOWN
    if not isinstance(value, Num):
        return None
    try:
        return Num(_OF_NUMBERS[name](value.value))
    except (ValueError, OverflowError):
        return ctx.error(scope, "E0216", f"`{name}` of {value.value:g} is not a number", expr.args[0].value.span)


def _is_number(scope: Scope, expr: ast.Expr) -> bool:
    """Whether an expression can be a plain number by its form, so that taps are not read twice."""
    match expr:
        case ast.Number():
            return True
        case ast.Attr():
            return expr.name.text in (*paths.SIZES, "num_labels")
        case ast.Name():
            found = scope.find(expr.id)
            return found is not None and isinstance(found[0].value, Num)
        case ast.Unary():
            return _is_number(scope, expr.value)
        case ast.Binary():
            return _is_number(scope, expr.left) and _is_number(scope, expr.right)
    return False


def _call_member(ctx: Context, scope: Scope, expr: ast.Call, func: ast.Attr) -> Value:
    base = ctx.evaluate(scope, func.base)
    match base:
        case Unknown():
            for arg in expr.args:
                sides = (arg.value.left, arg.value.right) if isinstance(arg.value, ast.Pair) else (arg.value,)
                for side in sides:
                    ctx.evaluate(scope, side)
            return UNKNOWN
        case Model() | TapPart():
            return paths.called(ctx, scope, base, expr, func)
        case PythonModule():
            return operators.call_python(ctx, scope, base, expr, func)
    return ctx.error(scope, "E0228", f"`{func.name.text}` of {kind(base)} is not called", func.name.span)


def _call_loss(ctx: Context, scope: Scope, function: LossFunction, expr: ast.Call) -> Value:
    """A loss as a function of models or passes: `soft(probe)`, `kd_loss(big -> mid)`."""
    decl = function.decl
    assert decl.formals is not None
    written: list[ast.Expr] = []
    for arg in expr.args:
        if isinstance(arg.value, ast.Arrow):
            written += [arg.value.left, arg.value.right]
        else:
            written.append(arg.value)
    if len(written) != len(decl.formals):
        wanted = plural(len(decl.formals), "argument", "arguments")
        return ctx.error(scope, "E0232", f"`{decl.name.text}` takes {wanted}, not {len(written)}", expr.span)
    bound: dict[str, Value] = {}
    for formal, given in zip(decl.formals, written, strict=True):
        value = ctx.evaluate(scope, given)
        if isinstance(value, Unknown):
            return UNKNOWN
        wants_model = formal.role is not None or (formal.type is not None and formal.type.name.text == "model")
        if wants_model and not isinstance(value, Model):
            return ctx.error(scope, "E0233", f"`{formal.name.text}` is a model, and this is {kind(value)}", given.span)
        bound[formal.name.text] = value
    if decl in ctx.calling:
        # There are no conditionals, so a loss that comes back to itself has no end.
        if decl in ctx.circular:
            return UNKNOWN
        ctx.circular.append(decl)
        return ctx.error(
            scope, "E0242", f"`{decl.name.text}` is defined by itself", expr.span, "it comes back to its own name here"
        )
    ctx.elements += 1
    if ctx.elements > MOST:
        return ctx.error(scope, "E0218", f"this spec asks for more than {MOST} losses", expr.span)
    inner = function.scope.child(**bound)
    ctx.calling.append(decl)
    try:
        return declare.nested(
            ctx, scope, decl.name.text, expr.span, lambda: declare.loss_value(ctx, inner, decl.value, name=None)
        )
    finally:
        ctx.calling.pop()
