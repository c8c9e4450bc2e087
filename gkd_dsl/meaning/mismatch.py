"""A call that does not fit its operator, as a diagnostic with a fix."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gkd_dsl.diagnostics import Edit, Fix, Label
from gkd_dsl.meaning.context import Context, replace
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import Block, Length, Tensor, Value, digits, kind
from gkd_dsl.ops import registry
from gkd_dsl.ops.registry import OpSpec
from gkd_dsl.ops.typing import Mismatch
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span
from gkd_dsl.types import Dim

_STARTS = re.compile(r"[ \t]*(?:loss|let|metric|minimize|project|total|mask|stage|counter|policy|pass)\b")


def report(
    ctx: Context,
    scope: Scope,
    found: Mismatch,
    spec: OpSpec,
    expr: ast.Expr,
    written: Mapping[str, ast.Expr],
    tensors: Mapping[str, Tensor],
) -> Value:
    """Say why a call does not fit, at the argument that does not."""
    argument = _argument_span(found, expr, written)
    notes: list[str] = list(found.notes)
    match found.kind:
        case "unknown_argument":
            fix = None
            near = found.suggestions[0] if found.suggestions else None
            name_span = _name_span(expr, found.arg)
            if near is not None and name_span is not None:
                fix = replace(name_span, str(near))
            label = f"did you mean `{near}`?" if near is not None else "not an argument"
            return ctx.error(scope, "E0234", found.message, name_span or argument, label, notes=notes, fix=fix)
        case "repeated_argument":
            return ctx.error(scope, "E0241", found.message, argument, "a second time")
        case "missing_argument":
            return ctx.error(scope, "E0235", found.message, expr.span, found.expected or "", notes=notes)
        case "out_of_range":
            fix = None
            if found.suggestions and argument is not expr.span:
                first = found.suggestions[0]
                fix = replace(argument, f'"{first}"' if isinstance(first, str) else str(first))
            return ctx.error(scope, "E0403", found.message, argument, "", notes=notes, fix=fix)
        case "wrong_type":
            plain = found.message.endswith("is a tensor, not a plain value")
            if plain and found.arg is not None and found.arg in written:
                text = written[found.arg].span.text
                return ctx.error(
                    scope, "E0303", f"`{found.arg}` of `{spec.name}` is a tensor, and `{text}` is none", argument,
                    _example(found.arg), notes=notes,
                )  # fmt: skip
            return ctx.error(scope, "E0303", found.message, argument, "", notes=notes)
        case "rank":
            return ctx.error(scope, "E0308", found.message, argument, _shape(found, tensors), notes=notes)
        case "condition":
            return ctx.error(scope, "E0309", found.message, argument, "", notes=notes)
    return _axis(ctx, scope, found, spec, expr, written, tensors)


def _example(slot: str) -> str:
    return "such as `batch.labels`" if slot == "labels" else "such as a tap: `s.logits`"


def unit(ctx: Context, scope: Scope, name: str, spec: OpSpec, value: Value, where: ast.Expr) -> Value:
    """A duration or a percentage where a number belongs."""
    fix, hint = None, "a number has no unit"
    if isinstance(value, Length) and value.span.unit == "percent":
        text = digits(value.span.amount / 100)
        fix, hint = replace(where.span, text), f"write {text}"
    return ctx.error(
        scope, "E0401", f"`{name}` of `{spec.name}` is a number, and this is {kind(value)}", where.span, hint, fix=fix
    )


def _argument_span(found: Mismatch, expr: ast.Expr, written: Mapping[str, ast.Expr]) -> Span:
    for name in (found.arg, *found.slots):
        if name is not None and name in written:
            return written[name].span
    return expr.span


def _name_span(expr: ast.Expr, name: str | None) -> Span | None:
    if isinstance(expr, ast.Call):
        for arg in expr.args:
            if arg.name is not None and arg.name.text == name:
                return arg.name.span
    return None


def _shape(found: Mismatch, tensors: Mapping[str, Tensor]) -> str:
    slot = found.slots[-1] if found.slots else None
    return tensors[slot].type.long if slot is not None and slot in tensors else ""


def _axis(
    ctx: Context,
    scope: Scope,
    found: Mismatch,
    spec: OpSpec,
    expr: ast.Expr,
    written: Mapping[str, ast.Expr],
    tensors: Mapping[str, Tensor],
) -> Value:
    """Two axes that must agree and do not."""
    spans = [written[slot].span if slot in written else expr.span for slot in found.slots]
    if len(found.slots) < 2:
        return ctx.error(scope, "E0308", found.message, spans[0], _shape(found, tensors), notes=found.notes)
    first, second = found.dims[0], found.dims[1]
    shapes = [tensors[slot].type.long if slot in tensors else "" for slot in found.slots]
    labels = [Label(spans[1], shapes[1])]
    sources = origins(ctx, first, second)
    names = {dim.name.rsplit(".", 1)[-1] for dim in (first, second)}
    if names == {"V"}:
        trim = _trim(spec, expr)
        return ctx.error(
            scope,
            "E0320",
            f"logits have different vocabularies: {first.size} and {second.size}",
            spans[0],
            shapes[0],
            labels=labels,
            notes=[
                *sources,
                "where the sizes differ by padding only, compare the part that both have; "
                "tokenizers that differ need a loss made for them",
            ],
            fix=trim,
        )
    if names == {"C"}:
        return ctx.error(
            scope, "E0322", f"the models tell a different number of classes apart: {first.size} and {second.size}",
            spans[0], shapes[0], labels=labels,
            notes=[*sources, f"give the student as many: `num_labels = {second.name.split('.')[0]}.num_labels`"],
            fix=as_many(ctx, scope, first.name.split(".")[0], f"{second.name.split('.')[0]}.num_labels"),
        )  # fmt: skip
    if found.heads:
        return ctx.error(
            scope,
            "E0312",
            f"head counts differ: {first} and {second}",
            spans[0],
            shapes[0],
            labels=labels,
            notes=[
                *sources,
                "attention maps are compared head by head; choose models with equal heads, or compare relations "
                "of queries, keys or values: `self_relation(s.layer[i].attn.v, heads = n)`",
            ],
        )
    if {first.name, second.name} & {"L", "B"}:
        return ctx.error(scope, "E0308", found.message, spans[0], shapes[0], labels=labels)
    last = found.last_axis
    return ctx.error(
        scope,
        "E0301",
        f"sizes differ on the last axis of `{spec.name}`" if last else f"sizes differ in `{spec.name}`",
        spans[0],
        shapes[0],
        labels=labels,
        notes=sources,
        fix=_projection(ctx, scope, first, second, spans[0]) if last and "student" in found.slots else None,
    )


def origins(ctx: Context, *dims: Dim) -> list[str]:
    """Where each size comes from: the config field, and the line that declares the model."""
    return [f"{dim} from {dim.origin}{_declared(ctx, dim)}" for dim in dims if dim.origin]


def _declared(ctx: Context, dim: Dim) -> str:
    model = ctx.models.get(dim.name.split(".")[0])
    return f" (line {model.defined.line})" if model is not None and model.defined is not None else ""


def as_many(ctx: Context, scope: Scope, model: str, count: str) -> Fix | None:
    """The fix that declares a model with so many classes; None where that cannot be written at its declaration."""
    definition = ctx.root_scope.names.get(model)
    decl = definition.decl if definition is not None else None
    if scope.uses or not isinstance(decl, ast.ModelDecl) or not isinstance(decl.value, ast.Call):
        return None
    if isinstance(decl.value.func, ast.Name) and decl.value.func.id == "cached":
        return None
    title = f"give `{model}` as many classes"
    for arg in decl.value.args:
        if arg.name is not None and arg.name.text == "num_labels":
            return replace(arg.value.span, count, title)
    end = decl.value.span.end - 1
    behind = decl.span.source.text[decl.value.args[-1].span.end : end] if decl.value.args else ","
    comma = "" if "," in re.sub(r"#[^\r\n]*", "", behind) else ","
    return Fix(title, (Edit(Span(decl.span.source, end, end), f"{comma} num_labels = {count}"),))


def _trim(spec: OpSpec, expr: ast.Expr) -> Fix | None:
    """The fix that compares the ids that both sides have; None for an operator that cannot."""
    if not isinstance(expr, ast.Call) or not expr.args or not registry.has_argument(spec, "align"):
        return None
    title = "compare the common vocabulary"
    for arg in expr.args:
        if arg.name is not None and arg.name.text == "align":
            return replace(arg.value.span, '"trim"', title)
    end = expr.args[-1].span.end
    return Fix(title, (Edit(Span(expr.span.source, end, end), ', align = "trim"'),))


def _projection(ctx: Context, scope: Scope, first: Dim, second: Dim, side: Span) -> Fix | None:
    """Pipe the student's side through a declared projection that fits, else declare one above the statement."""
    if scope.uses:
        return None
    for definition in scope.visible():
        block = definition.value
        if isinstance(block, Block) and block.in_dim.agrees(first) and block.out_dim.agrees(second):
            edit = Edit(Span(side.source, side.end, side.end), f" |> {definition.name}")
            return Fix(f"project the student's side by `{definition.name}`", (edit,))
    if not re.fullmatch(r"\w+\.\w+", first.name) or not re.fullmatch(r"\w+\.\w+", second.name):
        return None
    taken = {definition.name for definition in scope.visible()}
    name = next(n for n in ("W", *(f"W{k}" for k in range(2, 100))) if n not in taken)
    source = side.source
    line_start = side.start - (side.column - 1)
    while _continues(source.text, line_start):
        if line_start == 0:
            return None
        line_start = source.text.rfind("\n", 0, line_start - 1) + 1
    indent = re.match(r"[ \t]*", source.text[line_start:])
    prefix = indent.group(0) if indent else ""
    return Fix(
        "add a projection",
        (
            Edit(
                Span(source, line_start, line_start),
                f"{prefix}project {name} = linear({first.name} -> {second.name})\n",
            ),
            Edit(Span(source, side.end, side.end), f" |> {name}"),
        ),
    )


def _continues(text: str, line_start: int) -> bool:
    """Whether the line belongs to a statement that began above: it does not start with a keyword."""
    return _STARTS.match(text, line_start) is None
