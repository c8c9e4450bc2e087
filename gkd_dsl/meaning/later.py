"""What parses and is checked here, and runs in a later version: passes."""

from __future__ import annotations

from gkd_dsl.meaning import paths
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Layers,
    Model,
    TapPart,
    Tensor,
    Unknown,
    Value,
    kind,
)
from gkd_dsl.models.resolve import TOP
from gkd_dsl.syntax import ast

Change = ast.Setting | ast.Replace | ast.Swap | ast.AddTo | ast.Remap
_PASS_SETTINGS = {"grad": ("keep", "discard")}
_ADDED_TO, _REMAPPED = ("embed",), ("ids",)


# --- passes -------------------------------------------------------------------------------------


def further_pass(ctx: Context, scope: Scope, decl: ast.Pass) -> Value:
    """`pass cf = s { ... }`: a further forward with its own taps."""
    target: ast.Expr = decl.value
    if isinstance(target, ast.Call):
        for arg in target.args:
            ctx.evaluate(scope, arg.value)
        target = target.func
    base = ctx.evaluate(scope, target)
    if isinstance(base, Unknown):
        return UNKNOWN
    if not isinstance(base, Model):
        return ctx.error(scope, "E0247", f"a pass is of a model, and this is {kind(base)}", target.span)
    ctx.not_yet(scope, "a further pass", decl.name.span)
    for change in decl.body:
        _change(ctx, scope, base, change)
    prefix = f"{scope.prefix}{decl.name.text}"
    return Model(base.name, base.info, base.role, f"{prefix}/forward", decl.name.span, further=True)


def _change(ctx: Context, scope: Scope, base: Model, change: Change) -> None:
    match change:
        case ast.Setting():
            _pass_setting(ctx, scope, change)
        case ast.AddTo():
            _one_of(ctx, scope, "`add`", change.target, _ADDED_TO)
            ctx.evaluate(scope, change.value)
        case ast.Remap():
            _one_of(ctx, scope, "`remap`", change.target, _REMAPPED)
            ctx.evaluate(scope, change.value)
        case ast.Replace() | ast.Swap():
            for inner in _bound(ctx, scope, change):
                if not _exchange(ctx, inner, base, change):
                    return


def _pass_setting(ctx: Context, scope: Scope, setting: ast.Setting) -> None:
    words = _PASS_SETTINGS.get(setting.name.text)
    if words is None:
        label, near = suggest(setting.name.text, _PASS_SETTINGS)
        ctx.error(
            scope, "E0408", f"a pass has no setting `{setting.name.text}`", setting.name.span, label or "not a setting",
            notes=["its setting: grad"], fix=replace(setting.name.span, near) if near else None,
        )  # fmt: skip
        return
    word = setting.value.id if isinstance(setting.value, ast.Name) else ""
    if word not in words:
        label, near = suggest(word, words)
        ctx.error(
            scope, "E0402", f"`{setting.name.text}` is one of {', '.join(words)}", setting.value.span, label,
            fix=replace(setting.value.span, near) if near else None,
        )  # fmt: skip


def _one_of(ctx: Context, scope: Scope, what: str, word: ast.Ident, words: tuple[str, ...]) -> None:
    if word.text not in words:
        label, near = suggest(word.text, words)
        ctx.error(
            scope, "E0402", f"{what} takes {', '.join(f'`{w}`' for w in words)}, not `{word.text}`", word.span, label,
            fix=replace(word.span, near or words[0]),
        )  # fmt: skip


def _bound(ctx: Context, scope: Scope, change: ast.Replace | ast.Swap) -> list[Scope]:
    """The scope of a change for each element of its `for`."""
    from gkd_dsl.meaning.evaluate import elements, unpacked

    if change.over is None:
        return [scope]
    binders, iterable = change.over
    over = elements(ctx, scope, ctx.evaluate(scope, iterable), iterable)
    found: list[Scope] = []
    for element, _ in over or ():
        bound = unpacked(ctx, scope, binders, element)
        if bound is None:
            return []
        found.append(scope.child(**bound))
    return found


def _exchange(ctx: Context, scope: Scope, base: Model, change: ast.Replace | ast.Swap) -> bool:
    """One `replace a with b` or `swap a from b`; False where something was reported."""
    # Inside a pass a bare path is one of the model that is passed: `hidden[i]` means `s.hidden[i]`.
    own = scope.child(**{
        name: TapPart(base, ((name, None),), (change.target.span,)) for name in TOP if scope.find(name) is None
    })  # fmt: skip
    target, source = ctx.evaluate(own, change.target), ctx.evaluate(scope, change.source)
    extra = change.at if isinstance(change, ast.Swap) else change.when
    if extra is not None:
        ctx.evaluate(scope, extra)
    if isinstance(target, Unknown) or isinstance(source, Unknown):
        return False
    if isinstance(change, ast.Replace):
        for value, written in ((target, change.target), (source, change.source)):
            block = isinstance(value, TapPart) and value.parts[-1][0] == "layer" and len(value.parts) == 1
            if not block and not isinstance(value, Layers):
                ctx.error(
                    scope, "E0247", f"`replace` exchanges blocks, and this is {kind(value)}", written.span,
                    "write `layer[i]`",
                )  # fmt: skip
                return False
        return True
    left, right = paths.as_tensor(ctx, own, target, change.target), paths.as_tensor(ctx, scope, source, change.source)
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        return False
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        value, written = (left, change.target) if not isinstance(left, Tensor) else (right, change.source)
        ctx.error(scope, "E0247", f"`swap` exchanges taps, and this is {kind(value)}", written.span)
        return False
    same = len(left.type.dims) == len(right.type.dims)
    if not same or not all(a.agrees(b) for a, b in zip(left.type.dims, right.type.dims, strict=True)):
        ctx.error(
            scope, "E0247", "`swap` exchanges tensors of one shape", change.target.span, left.type.long,
            labels=[paths.shape_label(change.source.span, right.type)],
        )  # fmt: skip
        return False
    return True
