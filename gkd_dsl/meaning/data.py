"""Declared data sources: their arguments, files and columns."""

from __future__ import annotations

from gkd_dsl.graph.nodes import SourceSpec
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import UNKNOWN, PythonModule, Source, Unknown, Value, kind, plain
from gkd_dsl.sources import SOURCES, SourceKind, SourceProblem, bind_source, check_source
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span

_LATER = ("rollout",)
_CODES = {"file": "E0503", "column": "E0504", "row": "E0505"}


def declare(ctx: Context, scope: Scope, decl: ast.DataDecl) -> Value:
    """A data source whose files and columns were looked at."""
    call = decl.value
    if isinstance(call, ast.Missing):
        return UNKNOWN
    if not isinstance(call, ast.Call):
        return ctx.error(scope, "E0510", "a data source is made by a call", call.span, 'write `csv("...")`')
    shape = _shape(ctx, scope, call)
    if shape is None:
        return UNKNOWN
    positional: list[object] = []
    named: dict[str, object] = {}
    spans: dict[str, Span] = {}
    for place, arg in enumerate(call.args):
        key = (
            arg.name.text
            if arg.name is not None
            else (shape.args[place].name if place < len(shape.args) else str(place))
        )
        spans[key] = arg.value.span
        if arg.name is not None and isinstance(arg.value, ast.Name) and arg.value.id == "none":
            named[key] = None
            continue
        value = ctx.evaluate(scope, arg.value)
        if isinstance(value, Unknown):
            return UNKNOWN
        simple = plain(value)
        if simple is None:
            return ctx.error(scope, "E0404", f"`{key}` does not take {kind(value)}", arg.value.span)
        if arg.name is None:
            positional.append(simple)
        else:
            named[key] = simple
    args, problems = bind_source(shape, positional, named)
    if not problems:
        problems = check_source(shape, args, scope.root)
    for problem in problems:
        _report(ctx, scope, call, problem, spans)
    if problems:
        return UNKNOWN
    spec = SourceSpec(
        f"{scope.prefix}{decl.name.text}",
        shape.name,
        tuple(sorted((name, value) for name, value in args.items())),
        ctx.location(scope, decl.name.span),
    )
    ctx.source_kinds[spec.name] = shape
    return Source(spec)


def _shape(ctx: Context, scope: Scope, call: ast.Call) -> SourceKind | None:
    """Which source is called."""
    func = call.func
    if isinstance(func, ast.Attr):
        base = ctx.evaluate(scope, func.base)
        if isinstance(base, PythonModule):
            found = base.extensions.get(func.name.text)
            if isinstance(found, SourceKind):
                return found
            label, near = suggest(func.name.text, base.extensions)
            ctx.error(
                scope, "E0510", f"`{base.path}` has no data source `{func.name.text}`", func.name.span, label,
                fix=replace(func.name.span, near) if near else None,
            )  # fmt: skip
        elif not isinstance(base, Unknown):
            ctx.error(scope, "E0510", f"a data source does not come from {kind(base)}", func.span)
        return None
    if not isinstance(func, ast.Name):
        ctx.error(scope, "E0510", "a data source is made by a call", call.span, 'write `csv("...")`')
        return None
    if func.id in SOURCES:
        return SOURCES[func.id]
    if func.id in _LATER:
        for arg in call.args:
            ctx.evaluate(scope, arg.value)
        ctx.not_yet(scope, f"the source `{func.id}`", call.span)
        return None
    label, near = suggest(func.id, [*SOURCES, *_LATER])
    ctx.error(
        scope, "E0510", f"there is no data source `{func.id}`", func.span, label,
        notes=[f"sources: {', '.join(SOURCES)}"], fix=replace(func.span, near) if near else None,
    )  # fmt: skip
    return None


def _report(ctx: Context, scope: Scope, call: ast.Call, problem: SourceProblem, spans: dict[str, Span]) -> None:
    span = spans.get(problem.arg, call.span)
    named = next((arg.name.span for arg in call.args if arg.name is not None and arg.name.text == problem.arg), None)
    if problem.kind == "argument":
        unknown = "has no argument" in problem.message
        span = (named or span) if unknown else span
        code = "E0234" if unknown else "E0401" if "share" in problem.message else "E0404"
        if "needs" in problem.message and problem.arg not in spans:
            code = "E0235"
        fix = replace(span, problem.near[0]) if unknown and problem.near else None
    else:
        code = _CODES[problem.kind]
        one = problem.arg in spans and span.text.startswith('"')
        fix = replace(span, f'"{problem.near[0]}"') if problem.near and one else None
    label = f"did you mean `{problem.near[0]}`?" if problem.near else ""
    ctx.error(scope, code, problem.message, span, label, notes=[problem.hint] if problem.hint else [], fix=fix)
