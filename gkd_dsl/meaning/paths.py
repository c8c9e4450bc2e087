"""Paths into models: sizes, layers, taps."""

from __future__ import annotations

from dataclasses import replace as replace_fields

from gkd_dsl.diagnostics import Label, Note
from gkd_dsl.graph.nodes import BatchNode, ForwardNode, OpNode, TapNode
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Items,
    Layers,
    Model,
    Num,
    Numbers,
    Passed,
    TapPart,
    Tensor,
    Text,
    Unknown,
    Value,
    gated,
    kind,
    shown,
)
from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.resolve import ResolvedTap, TapError, resolve_tap
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span
from gkd_dsl.types import BATCH, LENGTH, TensorType

SIZES = ("H", "V", "N", "A", "KV", "D", "F", "E", "I", "C")
PARTS = ("body", "embed", "head")
_INPUTS = ("input_ids", "attention_mask")


def member(ctx: Context, scope: Scope, base: Model | TapPart, expr: ast.Attr) -> Value:
    """`s.H`, `s.hidden`, `s.layer[3].attn`."""
    name = expr.name.text
    if isinstance(base, Model):
        if name in SIZES or name == "num_labels":
            return _size(ctx, scope, base, "C" if name == "num_labels" else name, expr)
        return TapPart(base, ((name, None),), (expr.name.span,))
    return TapPart(base.model, (*base.parts, (name, None)), (*base.spans, expr.name.span))


def _size(ctx: Context, scope: Scope, model: Model, name: str, expr: ast.Attr) -> Value:
    dim = model.info.dim(name, model.name)
    if dim.size is not None:
        return Num(dim.size, dim)
    return ctx.error(
        scope,
        "E0222",
        f"`{model.name}` has no size `{name}`",
        expr.name.span,
        f"it is a {model.info.architecture}",
        notes=[f"its sizes: {', '.join(f'{k} = {v}' for k, v in model.info.sizes)}", *defined(model)],
    )


def defined(model: Model) -> list[Note]:
    """The note that shows where a model is declared."""
    if model.defined is None:
        return []
    return [Note(f"`{model.name}` is a {model.info.architecture}, defined here", model.defined)]


def called(ctx: Context, scope: Scope, base: Model | TapPart, call: ast.Call, callee: ast.Attr) -> Value:
    """`s.module("a.b")`, `s.weight("name")`."""
    if callee.name.text not in ("module", "weight") or not isinstance(base, Model):
        return ctx.error(
            scope, "E0228", f"`{callee.name.text}` of a model is not called", callee.name.span,
            'only `module("...")` and `weight("...")` are',
        )  # fmt: skip
    if len(call.args) != 1 or call.args[0].name is not None:
        return ctx.error(scope, "E0224", f"`{callee.name.text}` takes one text", call.span)
    value = ctx.evaluate(scope, call.args[0].value)
    if isinstance(value, Unknown):
        return UNKNOWN
    if not isinstance(value, Text):
        return ctx.error(
            scope, "E0224", f"`{callee.name.text}` takes a text, not {kind(value)}", call.args[0].value.span
        )
    return TapPart(base, ((callee.name.text, (value.value,)),), (callee.name.span.to(call.span),))


def indexed(ctx: Context, scope: Scope, base: TapPart, expr: ast.Index) -> Value:
    """`s.hidden[-1]`, `s.layer[3]`, `s.layer[1 ..< 4]`."""
    name, already = base.parts[-1]
    if already is not None:
        return ctx.error(scope, "E0206", f"`{base.model.name}.{_text(base)}` is not indexed again", expr.span)
    if len(expr.args) != 1:
        return ctx.error(scope, "E0211", f"`{name}` takes one index, not {len(expr.args)}", expr.span)
    value = ctx.evaluate(scope, expr.args[0])
    if isinstance(value, Unknown):
        return UNKNOWN
    if isinstance(value, Numbers) and name == "layer":
        count = base.model.info.size("N") or 0
        if not 0 <= value.lo <= value.hi <= count:
            return ctx.error(
                scope, "E0204", f"layers {value.lo} to {value.hi - 1} are outside `{base.model.name}`",
                expr.args[0].span, f"it has layers 0 to {count - 1}", notes=defined(base.model),
            )  # fmt: skip
        return Layers(base.model, tuple(range(value.lo, value.hi)))
    if isinstance(value, Items) and name == "layer":
        return _some_layers(ctx, scope, base.model, value, expr.args[0].span)
    if not isinstance(value, Num) or not isinstance(value.value, int):
        return ctx.error(
            scope, "E0210", f"an index is a whole number, not {shown(value)}", expr.args[0].span, gated(value)
        )
    spans = (*base.spans[:-1], base.spans[-1].to(expr.args[0].span))
    part = TapPart(base.model, (*base.parts[:-1], (name, (value.value,))), spans)
    if name == "layer" and len(part.parts) == 1:
        blocks = base.model.info.size("N")
        if blocks is not None and not -blocks <= value.value < blocks:
            return _bad_layer(ctx, scope, base.model, value.value, blocks, expr.args[0].span)
    return part


def _some_layers(ctx: Context, scope: Scope, model: Model, chosen: Items, span: Span) -> Value:
    """`t.layer[js]`, `js` a list of indices."""
    count = model.info.size("N") or 0
    indices: list[int] = []
    for item in chosen.items:
        if not isinstance(item, Num) or not isinstance(item.value, int):
            return ctx.error(scope, "E0210", f"an index is a whole number, not {shown(item)}", span)
        if not -count <= item.value < count:
            return _bad_layer(ctx, scope, model, item.value, count, span)
        indices.append(item.value % count)
    return Layers(model, tuple(indices))


def _bad_layer(ctx: Context, scope: Scope, model: Model, index: int, count: int, span: Span) -> Value:
    return ctx.error(
        scope,
        "E0204",
        f"`{model.name}` has no layer {index}",
        span,
        f"layers run from 0 to {count - 1}, or -{count} to -1",
        notes=defined(model),
    )


def block(ctx: Context, scope: Scope, base: Layers, index: int, expr: ast.Index) -> Value:
    """The block of a set of layers."""
    if not -len(base.indices) <= index < len(base.indices):
        return ctx.error(scope, "E0204", f"index {index} is outside {len(base.indices)} layers", expr.args[0].span)
    return TapPart(base.model, (("layer", (base.indices[index],)),), (expr.span,))


def block_prefix(info: ModelInfo) -> str:
    """The dotted path of a model's blocks, as in `encoder.layer`; "" where it is not known."""
    family = FAMILIES.get(info.family or "")
    return family.blocks if family is not None else ""


def shape_label(span: Span, type_: TensorType) -> Label:
    """The label that shows the shape of a tensor."""
    return Label(span, type_.long)


def as_layers(value: Value) -> Layers | None:
    """`s.layer` or a part of it as layers; None for anything else."""
    if isinstance(value, Layers):
        return value
    if isinstance(value, TapPart) and value.parts == (("layer", None),):
        return Layers(value.model, tuple(range(value.model.info.size("N") or 0)))
    return None


def _text(part: TapPart) -> str:
    return ".".join(name if index is None else f"{name}[{index[0]}]" for name, index in part.parts)


def as_tensor(ctx: Context, scope: Scope, value: Value, expr: ast.Expr) -> Value:
    """A path as the tensor it names; every other value as it is."""
    if not isinstance(value, TapPart):
        return value
    model = value.model
    found = resolved(ctx, scope, value, expr)
    if found is None:
        return UNKNOWN
    forward(ctx, scope, model, expr.span)
    prefix = model.forward.removesuffix("/forward")
    key = f"{prefix}/{found.path.key}"
    ctx.builder.add(TapNode(key, model.name, found.path, found.type, locations=(ctx.location(scope, expr.span),)))
    ctx.builder.connect(model.forward, key, "forward")
    lengths = sum(dim.name == "L" for dim in found.type.dims)
    passed = model.passed or Passed("", "")
    tensor = Tensor(
        key,
        found.type,
        carries=frozenset() if passed.discard else frozenset({model.name}) | passed.carries,
        reads=frozenset({model.name}) | passed.reads,
        next_token=model.info.causal and found.path.kind == "logits",
        causal=lengths == 2 and model.info.left_to_right,
        tokens=frozenset({dict(passed.columns).get("attention_mask") or column_node(ctx, "attention_mask")}),
    )
    return detached(ctx, scope, tensor, expr) if ctx.detaching else tensor


def resolved(ctx: Context, scope: Scope, part: TapPart, expr: ast.Expr) -> ResolvedTap | None:
    """The tap that a path names; None where it was reported that there is none."""
    from gkd_dsl.meaning import passes

    model = part.model
    if part.parts[-1] == ("layer", None):
        ctx.error(scope, "E0226", f"`{model.name}.layer` is every layer: say which", expr.span, "write `layer[i]`")
        return None
    try:
        found = resolve_tap(model.info, model.name, list(part.parts))
    except TapError as error:
        _tap_error(ctx, scope, part, expr, error)
        return None
    if model.passed is not None and passes.inside_replaced(ctx, scope, model, found, expr):
        return None
    return found


def detached(ctx: Context, scope: Scope, tensor: Tensor, expr: ast.Expr) -> Tensor:
    """The same tensor with no gradient through it."""
    made = ctx.shared.get(("detach", tensor.key))
    if made is None:
        key = ctx.builder.fresh(f"op/{scope.prefix}detach")
        ctx.builder.add(OpNode(key, "detach", (), tensor.type, locations=(ctx.location(scope, expr.span),)))
        ctx.builder.connect(tensor.key, key, "x")
        made = replace_fields(tensor, key=key, carries=frozenset())
        ctx.shared["detach", tensor.key] = made
    return made


def forward(ctx: Context, scope: Scope, model: Model, span: Span) -> None:
    """Put the forward of a model (or of a pass) into the graph."""
    if model.forward in ctx.builder.graph:
        return
    passed = model.passed or Passed("", "batch")
    place = ctx.location(scope, model.defined if model.passed is not None and model.defined is not None else span)
    ctx.builder.add(
        ForwardNode(
            model.forward,
            model.name,
            passed.inputs,
            True,
            passed.changes,
            passed.discard,
            passed.shift,
            locations=(place,),
        )
    )
    ctx.builder.connect(f"model/{model.name}", model.forward, "model")
    given = {column: column_node(ctx, column) for column in _INPUTS} | dict(passed.columns)
    for column, key in given.items():
        ctx.builder.connect(key, model.forward, column)
    for key, slot in passed.edges:
        ctx.builder.connect(key, model.forward, slot)


def column_node(ctx: Context, column: str, type_: TensorType | None = None) -> str:
    """The graph key of a batch column, made when it is first asked for.

    Labels may be classes in one stage and tokens in another: the second kind has a node of its own.
    """
    key = f"batch/{column}"
    if key in ctx.builder.graph and type_ is not None:
        held = ctx.builder.node(key)
        if isinstance(held, BatchNode) and held.type != type_:
            key = f"{key}.{'tokens' if len(type_.dims) == 2 else 'classes'}"
    if key not in ctx.builder.graph:
        ctx.builder.add(BatchNode(key, column, type_ or TensorType("int", (BATCH, LENGTH))))
    return key


def _tap_error(ctx: Context, scope: Scope, part: TapPart, expr: ast.Expr, error: TapError) -> Value:
    model = part.model
    at = min(error.at, len(part.spans) - 1) if part.spans else 0
    span = part.spans[at] if part.spans else expr.span
    name, index = part.parts[at]
    notes: list[Note | str] = list(defined(model))
    if index is not None and error.kind == "index":
        hint, _, more = error.hint.partition(": ")
        return ctx.error(scope, "E0204", error.reason, span, hint, notes=[*notes, more] if more else notes)
    if error.kind == "headless":
        return ctx.error(
            scope,
            "E0205",
            f"no tap `logits`: `{model.name}` is a headless {model.info.architecture}",
            span,
            "it gives hidden states only",
            notes=[
                *notes,
                'point it at a model with a head, or add one: hf("...", task = "classification", num_labels = 2)',
            ],
        )
    label, near = suggest(name, error.near or error.taps_here)
    if error.kind == "unavailable":
        reason = error.reason.removesuffix(f": {error.hint}")
        return ctx.error(scope, "E0202", reason, span, error.hint, notes=notes)
    if error.taps_here:
        notes.append(f"taps at this level: {', '.join(error.taps_here)}")
    span = Span(span.source, span.start, span.start + len(name))
    fix = replace(span, near) if near is not None and not scope.uses else None
    return ctx.error(
        scope,
        "E0201",
        f"model `{model.name}` has no tap `{name}`"
        if at == 0
        else f"`{_text(TapPart(model, part.parts[:at]))}` has no tap `{name}`",
        span,
        label or error.reason,
        notes=notes,
        fix=fix,
        labels=(),
    )


__all__ = ["as_layers", "as_tensor", "block", "called", "column_node", "defined", "forward", "indexed", "member"]
