"""Methods: hygienic functions from models to named losses."""

from __future__ import annotations

from dataclasses import replace as with_changes

from gkd_dsl.diagnostics import Edit, Fix, SpecError
from gkd_dsl.meaning import imports, parameters
from gkd_dsl.meaning.context import Context, ResolvedParam, replace, suggest
from gkd_dsl.meaning.scope import Definition, Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Directed,
    Instance,
    Items,
    Loss,
    Method,
    Model,
    Source,
    Unknown,
    Value,
    kind,
    plain,
)
from gkd_dsl.syntax import ast, parse_expression
from gkd_dsl.text import Span

_VISIBLE = (ast.Param, ast.MethodDecl, ast.ImportAs, ast.ImportUse, ast.ImportPython, ast.DimDecl)
SOURCE = "source"
_DEPTH = 16
_USES = 1024


def declared(scope: Scope, decl: ast.MethodDecl) -> Method:
    """A method with the scope of the file that declares it."""
    return Method(decl, scope)


def surroundings(scope: Scope) -> Scope:
    """What the body of a method sees of its file: parameters, methods and imports, but no models or losses."""
    outer = Scope(scope.source, scope.prefix, scope.uses, None, scope.root)
    for definition in scope.visible():
        if isinstance(definition.decl, _VISIBLE):
            outer.names.setdefault(definition.name, definition)
    return outer


def _not_imported(ctx: Context, scope: Scope, decl: ast.Use) -> Value | None:
    """A method of the library that is used without its import: the import is the fix."""
    if not isinstance(decl.target, ast.Name) or scope.find(decl.target.id) is not None:
        return None
    name = decl.target.id
    if name not in imports.library():
        return None
    source = decl.span.source
    line = source.position(decl.span.start)[0]
    start = decl.span.start - (source.position(decl.span.start)[1] - 1)
    edit = Edit(Span(source, start, start), f'import "{imports.LIBRARY}{name}" use {name}\n')
    fix = None if scope.uses or source.line(line)[:1].isspace() else Fix("import it from the library", (edit,))
    return ctx.error(
        scope, "E0203", f"nothing is called `{name}` here", decl.target.span, "a method of the library, not imported",
        fix=fix,
    )  # fmt: skip


def use(ctx: Context, scope: Scope, decl: ast.Use) -> Value:
    """`use kd(t -> s, T = 4.0) as k`: the method's losses, projections, metrics and stages."""
    target = _not_imported(ctx, scope, decl) or ctx.evaluate(scope, decl.target)
    if isinstance(target, Unknown):
        for arg in decl.args:
            if not isinstance(arg.value, ast.Arrow):
                ctx.evaluate(scope, arg.value)
        return UNKNOWN
    if not isinstance(target, Method):
        return ctx.error(scope, "E0248", f"`use` takes a method, and this is {kind(target)}", decl.target.span)
    if any(target.decl is held for held in ctx.using):
        return ctx.error(
            scope, "E0249", f"the method `{target.decl.name.text}` uses itself", decl.span, "it comes back here"
        )
    if len(scope.uses) >= _DEPTH or len(ctx.instances) >= _USES:
        what = f"more than {_DEPTH} deep" if len(scope.uses) >= _DEPTH else f"more than {_USES} times"
        return ctx.error(scope, "E0249", f"methods use each other {what}", decl.span)
    inner = Scope(
        target.scope.source,
        f"{scope.prefix}{decl.alias.text}/",
        (*scope.uses, decl.span),
        surroundings(target.scope),
        target.scope.root,
    )
    if not _bind(ctx, scope, inner, target.decl, decl):
        return UNKNOWN
    ctx.using.append(target.decl)
    try:
        source = _source(ctx, scope, target.decl, decl)
        if isinstance(source, Unknown):
            return UNKNOWN
        instance = instantiate(ctx, inner, target.decl, decl.alias.text, decl.span)
        if isinstance(instance, Instance) and source is not None:
            instance = ctx.instances[inner.prefix.rstrip("/")] = with_changes(instance, source=source)
        return instance
    finally:
        ctx.using.pop()


def instantiate(ctx: Context, inner: Scope, method: ast.MethodDecl, name: str, span: Span) -> Value:
    """The body of a method in a scope that binds its formals."""
    from gkd_dsl.meaning.declare import value_of
    from gkd_dsl.meaning.evaluate import as_loss

    imports.collect(ctx, inner, method.body)
    for definition in list(inner.names.values()):
        if definition.value is None and definition.decl is not None:
            value_of(ctx, inner, definition, definition.span or span, inner)
    total: Loss | None = None
    stages: list[ast.Stage] = []
    for stmt in method.body:
        if isinstance(stmt, ast.Total):
            value = as_loss(ctx, inner, ctx.evaluate(inner, stmt.value), stmt.value)
            total = value if isinstance(value, Loss) else Loss((), partial=True)
            inner.names["total"] = Definition("total", None, stmt.span, total, used=True)
        elif isinstance(stmt, ast.Stage):
            stages.append(stmt)
        elif isinstance(stmt, ast.Run):
            ctx.error(inner, "E0104", "`run` belongs at the top level", stmt.span, "not in a method")
    instance = Instance(name, inner, total, tuple(stages), ctx.location(inner, span))
    ctx.instances[inner.prefix.rstrip("/")] = instance
    return instance


def _source_is_free(method: ast.MethodDecl) -> bool:
    """Whether `source = ...` is for the stages of a method: it has some, and no parameter of that name."""
    stages = any(isinstance(stmt, ast.Stage) for stmt in method.body)
    return stages and all(formal.name.text != SOURCE for formal in method.formals)


def _source(ctx: Context, scope: Scope, method: ast.MethodDecl, decl: ast.Use) -> Source | Unknown | None:
    """The data that the stages of a used method train on, where they do not name their own."""
    for arg in decl.args:
        if arg.name is None or arg.name.text != SOURCE or not _source_is_free(method):
            continue
        value = ctx.evaluate(scope, arg.value)
        if isinstance(value, Source | Unknown):
            return value
        ctx.error(
            scope, "E0404", f"`source` takes a data source, and this is {kind(value)}", arg.value.span,
            f"the stages of `{method.name.text}` train on it",
        )  # fmt: skip
        return UNKNOWN
    return None


def _bind(ctx: Context, scope: Scope, inner: Scope, method: ast.MethodDecl, decl: ast.Use) -> bool:
    """Give every formal its value; False where something was reported."""
    name = method.name.text
    roles = [formal for formal in method.formals if formal.role is not None]
    plain_formals = {formal.name.text: formal for formal in method.formals if formal.role is None}
    given: dict[str, tuple[Value, ast.Expr]] = {}
    good = True
    # Models that are given by name are no longer free for those that are not.
    for arg in sorted(decl.args, key=lambda arg: arg.name is None):
        if arg.name is None:
            good = _bind_models(ctx, scope, roles, arg, given, method) and good
            continue
        if arg.name.text == SOURCE and _source_is_free(method):
            continue  # Read by `use`.
        formal = plain_formals.get(arg.name.text) or next(
            (role for role in roles if role.name.text == arg.name.text), None
        )
        if formal is None:
            legal = [formal.name.text for formal in method.formals]
            label, near = suggest(arg.name.text, legal)
            ctx.error(
                scope, "E0234", f"`{name}` has no parameter `{arg.name.text}`", arg.name.span,
                label or "not a parameter",
                notes=[f"its parameters: {', '.join(legal)}"], fix=replace(arg.name.span, near) if near else None,
            )  # fmt: skip
            good = False
            continue
        given[arg.name.text] = (ctx.evaluate(scope, arg.value), arg.value)
    for formal in method.formals:
        key = formal.name.text
        override = ctx.overrides.get(f"{inner.prefix.rstrip('/').replace('/', '.')}.{key}")
        if formal.role is None and override is not None:
            value = _overridden(ctx, scope, formal, override, inner)
            origin = "--set"
        elif key in given:
            value = given[key][0]
            origin = f"use at {decl.span}"
            if formal.type is not None:
                value = parameters.fit(ctx, scope, key, value, formal.type, formal.within, given[key][1].span)
            elif not isinstance(value, Unknown):
                value = _checked_role(ctx, scope, formal, value, given[key][1])
        elif formal.default is not None:
            value = ctx.evaluate(inner, formal.default)
            if formal.type is not None:
                value = parameters.fit(ctx, inner, key, value, formal.type, formal.within, formal.default.span)
            origin = "default of the method"
        elif formal.role is not None and not good:
            continue  # The models that were given do not fit, which was said.
        else:
            what = "the " + formal.role if formal.role else "a value for"
            ctx.error(
                scope, "E0235", f"`{name}` needs {what} `{key}`", decl.span,
                f"write `use {name}(t -> s) as {decl.alias.text}`" if formal.role else f"write `{key} = ...`",
            )  # fmt: skip
            good = False
            continue
        if isinstance(value, Unknown):
            good = False
        elif formal.role is None:
            dotted = f"{inner.prefix.rstrip('/').replace('/', '.')}.{key}"
            ctx.params[dotted] = ResolvedParam(dotted, plain(value), origin, formal.name.span)
        inner.names[key] = Definition(key, formal, formal.name.span, value, used=True)
    return good


def _overridden(ctx: Context, scope: Scope, formal: ast.Formal, text: str, inner: Scope) -> Value:
    assert formal.type is not None
    if formal.type.name.text == "text":
        expr: ast.Expr = ast.String(formal.name.span, text.strip('"'))
    else:
        try:
            expr = parse_expression(text, f"--set {formal.name.text}")
        except SpecError as error:
            for diagnostic in error.diagnostics:
                ctx.diagnostics.add(diagnostic)
            return UNKNOWN
    value = ctx.evaluate(scope, expr)
    return parameters.fit(ctx, scope, formal.name.text, value, formal.type, formal.within, expr.span)


def _bind_models(
    ctx: Context,
    scope: Scope,
    roles: list[ast.Formal],
    arg: ast.Arg,
    given: dict[str, tuple[Value, ast.Expr]],
    method: ast.MethodDecl,
) -> bool:
    """`t -> s`, `[a, b] -> s`, or models one by one."""
    free = [formal for formal in roles if formal.name.text not in given]
    if isinstance(arg.value, ast.Arrow):
        sides = [arg.value.left, arg.value.right]
        # Teachers are left of the arrow, the student is right of it, in whatever order the method names them.
        order = {"teacher": 0, "model": 1, "student": 2}
        free = sorted(free, key=lambda formal: order[formal.role or "model"])
    else:
        sides = [arg.value]
    if len(free) < len(sides):
        models = ", ".join(f"{formal.role} {formal.name.text}" for formal in roles) or "no model"
        ctx.error(scope, "E0232", f"`{method.name.text}` takes {models}", arg.span, "one model too many")
        return False
    values = [ctx.evaluate(scope, side) for side in sides]
    if len(values) == 2 and [_role(value) for value in values] == ["student", "teacher"]:
        text = f"{sides[1].span.text} -> {sides[0].span.text}"
        ctx.error(
            scope, "E0244", "the student is on the left of `->`, where the teacher belongs", arg.value.span,
            f"write `{text}`", fix=replace(arg.value.span, text, "swap the models"),
        )  # fmt: skip
        return False
    for formal, side, value in zip(free, sides, values, strict=False):
        given[formal.name.text] = (value, side)
    return not any(isinstance(value, Unknown) for value in values)


def _role(value: Value) -> str | None:
    return value.role if isinstance(value, Model) else None


def _checked_role(ctx: Context, scope: Scope, formal: ast.Formal, value: Value, expr: ast.Expr) -> Value:
    models = value.items if isinstance(value, Items) else (value,)
    for model in models:
        if isinstance(model, Directed) or not isinstance(model, Model):
            return ctx.error(
                scope,
                "E0233",
                f"the method wants a {formal.role} here, and this is {kind(model)}",
                expr.span,
                f"it is the method's `{formal.name.text}`",
            )
        wrong = {("teacher", "student"), ("student", "teacher")}
        if (formal.role, model.role) in wrong:
            return ctx.error(
                scope, "E0244", f"the method wants a {formal.role} here, and `{model.name}` is a {model.role}",
                expr.span, "write `use ...(teacher -> student)`",
            )  # fmt: skip
    return value
