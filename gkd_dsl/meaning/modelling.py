"""Declared models and passes."""

from __future__ import annotations

import re
from collections.abc import Callable

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.meaning import adapters, quantising, stored, vocabulary
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import UNKNOWN, Items, Model, Num, Numbers, Text, Unknown, Value, kind, plain
from gkd_dsl.models import describe, locate
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.locate import offline_by_environment
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span

TASKS = ("encoder", "classification", "masked_lm", "causal_lm")
_SETTINGS = ("vocabulary", "adapter", "quantize")
_WIDTHS = ("width", "heads", "inner")
_CONSTRUCTORS = ("hf", "truncated", "with_head", "random_init", "cached")


def declare(ctx: Context, scope: Scope, decl: ast.ModelDecl) -> Value:
    """A model as its config describes it, and its node."""
    info = _info(ctx, scope, decl.value)
    info = _block(ctx, scope, decl, info)
    if info is None:
        ctx.model_unknown = True
        return UNKNOWN
    name = f"{scope.prefix}{decl.name.text}"
    node = ModelNode(f"model/{name}", name, decl.role, info, locations=(ctx.location(scope, decl.name.span),))
    ctx.builder.add(node)
    model = Model(name, info, decl.role, f"{name}/forward", decl.name.span)
    ctx.models[name] = model
    return model


def _block(ctx: Context, scope: Scope, decl: ast.ModelDecl, info: ModelInfo | None) -> ModelInfo | None:
    """The model with the settings of its block; None where there is none, or something was reported."""
    for stmt in decl.body:
        if not isinstance(stmt, ast.Setting):
            continue  # The parser said so.
        if stmt.name.text == "vocabulary":
            info = vocabulary.keeping(ctx, scope, info, stmt.value) if info is not None else None
            continue
        if stmt.name.text == "adapter":
            info = adapters.adapted(ctx, scope, info, stmt.value) if info is not None else None
            continue
        if stmt.name.text == "quantize":
            info = quantising.quantised(ctx, scope, decl, info, stmt) if info is not None else None
            continue
        label, near = suggest(stmt.name.text, _SETTINGS)
        ctx.error(
            scope, "E0408", f"a model has no setting `{stmt.name.text}`", stmt.name.span, label,
            notes=[f"its settings: {', '.join(_SETTINGS)}"], fix=replace(stmt.name.span, near) if near else None,
        )  # fmt: skip
        info = None
    if info is None or not quantising.alone(ctx, scope, decl, info) or not stored.student(ctx, scope, decl, info):
        return None
    return info if adapters.finished(ctx, scope, decl, info) else None


def _info(ctx: Context, scope: Scope, expr: ast.Expr) -> ModelInfo | None:
    if isinstance(expr, ast.Missing):
        return None
    if not isinstance(expr, ast.Call) or not isinstance(expr.func, ast.Name):
        fix = replace(expr.span, f"hf({expr.span.text})") if isinstance(expr, ast.String) else None
        ctx.error(scope, "E0508", "a model is made by a call", expr.span, 'write `hf("...")`', fix=fix)
        return None
    name = expr.func.id
    if name == "cached":
        return stored.declared(ctx, scope, expr)
    if name not in _CONSTRUCTORS:
        label, near = suggest(name, _CONSTRUCTORS)
        ctx.error(
            scope, "E0508", f"a model is not made by `{name}`", expr.func.span, label,
            notes=[f"it is made by {', '.join(f'`{c}`' for c in _CONSTRUCTORS)}"],
            fix=replace(expr.func.span, near) if near else None,
        )  # fmt: skip
        return None
    base: Value | None = None
    named: dict[str, object] = {}
    spans: dict[str, ast.Expr] = {}
    for arg in expr.args:
        if arg.name is not None and arg.name.text == "task" and isinstance(arg.value, ast.Name):
            value: Value = Text(arg.value.id)
        elif name == "truncated" and arg.name is not None and arg.name.text == "layers" and _is_every(arg.value):
            value = _every(ctx, scope, base, arg.value)
        else:
            value = ctx.evaluate(scope, arg.value)
        if isinstance(value, Unknown):
            return None
        if arg.name is None:
            if base is not None:
                ctx.error(scope, "E0508", f"`{name}` takes one place, then named arguments", arg.span)
                return None
            base = value
            spans[""] = arg.value
        else:
            named[arg.name.text] = plain(value)
            spans[arg.name.text] = arg.value
            if not isinstance(value, Text | Num | Items | Numbers) and plain(value) is None:
                ctx.error(scope, "E0508", f"`{arg.name.text}` does not take {kind(value)}", arg.value.span)
                return None
    if base is None:
        ctx.error(scope, "E0508", f"`{name}` needs what it is made from", expr.span)
        return None
    return _made(ctx, scope, name, base, named, spans, expr)


def _made(
    ctx: Context,
    scope: Scope,
    name: str,
    base: Value,
    named: dict[str, object],
    spans: dict[str, ast.Expr],
    expr: ast.Call,
) -> ModelInfo | None:
    task = named.pop("task", None)
    labels = named.pop("num_labels", None)
    if task is not None and task not in TASKS:
        label, near = suggest(str(task), TASKS)
        written = spans["task"].span
        fixed = f'"{near}"' if written.text.startswith('"') else near
        ctx.error(
            scope, "E0402", f"`task` is one of {', '.join(TASKS)}", written, label,
            fix=replace(written, str(fixed)) if near else None,
        )  # fmt: skip
        return None
    common: dict = {"task": task, "num_labels": labels}
    offline = ctx.offline or offline_by_environment()
    place = {"offline": offline, "root": scope.root}
    at = spans[""].span
    if isinstance(base, Model) and not stored.base(ctx, scope, base, name, at):
        return None
    if name == "truncated":
        layers = named.pop("layers", None)
        sizes = {key: named.pop(key) for key in _WIDTHS if key in named}
        if named:
            extra = next(iter(named))
            ctx.error(
                scope, "E0234", f"`truncated` has no argument `{extra}`", _name_span(expr, extra), suggest(
                    extra, ("layers", *_WIDTHS, "task", "num_labels"))[0],
            )  # fmt: skip
            return None
        if not isinstance(base, Model):
            ctx.error(scope, "E0508", f"`truncated` takes a model of this spec, not {kind(base)}", at)
            return None
        for key, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int):
                ctx.error(scope, "E0404", f"`{key}` takes a whole number", spans[key].span)
                return None
        missing = layers is None and not sizes
        if missing or (layers is not None and not _are_layers(layers)):
            ctx.error(
                scope, "E0235", "`truncated` needs the blocks that it keeps", expr.span, "write `layers = [0, 2, 4]`"
            )
            return None
        made = lambda layers, sizes: describe.truncated(base.info, base.name, layers=layers, **sizes, **common)  # noqa: E731
        # Layers first, so that what is wrong with the width is told at the width.
        chosen = _described(ctx, scope, lambda: made(layers, {}), spans.get("layers", expr).span, "E0204")
        if chosen is None or not sizes:
            return chosen
        return _described(ctx, scope, lambda: made(layers, sizes), spans[next(iter(sizes))].span, "E0502")
    if name == "with_head":
        if named:
            extra = next(iter(named))
            ctx.error(
                scope, "E0234", f"`with_head` has no argument `{extra}`", _name_span(expr, extra),
                suggest(extra, ("task", "num_labels"))[0],
            )  # fmt: skip
            return None
        if not isinstance(base, Model):
            ctx.error(scope, "E0508", f"`with_head` takes a model of this spec, not {kind(base)}", at)
            return None
        return _described(
            ctx, scope, lambda: describe.with_head(base.info, base.name, **common), expr.span, "E0502", expr
        )
    if isinstance(base, Model) and name == "random_init":
        return _described(
            ctx, scope, lambda: describe.random_init(base.info, overrides=named, **common), expr.span, "E0502"
        )
    if not isinstance(base, Text):
        ctx.error(
            scope, "E0508", f"`{name}` takes a place, not {kind(base)}", at, 'a folder, a hub id, or "package:name"'
        )
        return None
    try:
        locate.locate(base.value, root=scope.root, offline=offline)
    except ModelError as error:
        _model_error(ctx, scope, error, at, "E0501")
        return None
    function: Callable = describe.describe if name == "hf" else describe.random_init
    return _described(
        ctx, scope, lambda: function(base.value, overrides=named, **common, **place), expr.span, "E0502", expr
    )


def _is_every(expr: ast.Expr) -> bool:
    return isinstance(expr, ast.Call) and isinstance(expr.func, ast.Name) and expr.func.id == "every"


def _every(ctx: Context, scope: Scope, base: Value | None, expr: ast.Expr) -> Value:
    """`every(2)`, `every(2, start = 1)`: one block of so many of the model that is cut."""
    assert isinstance(expr, ast.Call)
    found: dict[str, int] = {}
    for arg in expr.args:
        name = arg.name.text if arg.name is not None else "step"
        value = ctx.evaluate(scope, arg.value)
        if isinstance(value, Unknown):
            return UNKNOWN
        if name not in ("step", "start") or name in found:
            return ctx.error(scope, "E0234", "`every` takes a step, and `start`", arg.span, "write `every(2)`")
        # Below what either may be: no whole number.
        found[name] = value.value if isinstance(value, Num) and isinstance(value.value, int) else -1
    count = base.info.size("N") if isinstance(base, Model) else None
    step, start = found.get("step", -1), found.get("start", 0)
    if step < 1 or start < 0:
        return ctx.error(scope, "E0404", "`every` takes whole numbers: a step from 1, a start from 0", expr.span)
    if count is None:
        return ctx.error(scope, "E0508", "`every` counts the blocks of a model of this spec", expr.span)
    return Items(tuple(Num(n) for n in range(start, count, step)))


def _are_layers(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)


def _name_span(expr: ast.Call, name: str) -> Span:
    return next(arg.name.span for arg in expr.args if arg.name is not None and arg.name.text == name)


def _described(
    ctx: Context, scope: Scope, make: Callable[[], ModelInfo], span: Span, code: str, call: ast.Call | None = None
) -> ModelInfo | None:
    try:
        return make()
    except ModelError as error:
        fix = None
        for arg in call.args if call is not None else ():
            # The message names the argument at fault.
            if arg.name is not None and re.search(rf"\b{arg.name.text}\b", error.reason):
                span = arg.name.span if error.near else arg.value.span
                fix = replace(span, error.near[0]) if error.near else None
        ctx.error(scope, code, error.reason, span, error.hint, fix=fix)
        return None


def _model_error(ctx: Context, scope: Scope, error: ModelError, span: Span, code: str) -> None:
    fix = replace(span, f'"{error.near[0]}"') if error.near else None
    ctx.error(scope, code, error.reason, span, error.hint, fix=fix)
