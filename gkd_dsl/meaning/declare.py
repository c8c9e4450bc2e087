"""Declarations: from a name to its value, when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace as with_changes

from gkd_dsl import schedules
from gkd_dsl.graph.nodes import LossNode, MetricNode, ProjectNode
from gkd_dsl.meaning import (
    counters,
    counting,
    data,
    gradients,
    imports,
    methods,
    modelling,
    operators,
    parameters,
    passes,
    paths,
    policies,
)
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Definition, Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Atom,
    Block,
    Directed,
    Family,
    Loss,
    LossFunction,
    Metric,
    NamedLoss,
    Num,
    Tensor,
    Term,
    Text,
    Truth,
    Unknown,
    Value,
    kind,
)
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span
from gkd_dsl.types import Dim

_INITS = ("default", "identity", "zeros")
_DEPTH = 32


def value_of(ctx: Context, home: Scope, definition: Definition, span: Span, asked_from: Scope) -> Value:
    """The value of a definition in the scope that holds it; `span` is where it is asked for."""
    if definition.value is not None:
        return _on_this_side(ctx, home, definition)
    if definition.busy:
        return ctx.error(
            asked_from, "E0242", f"`{definition.name}` is defined by itself", span, "it comes back to its own name here"
        )
    definition.busy = True
    detaching, ctx.detaching = ctx.detaching, False
    try:
        definition.value = _declare(ctx, home, definition)
    finally:
        definition.busy, ctx.detaching = False, detaching
    return _on_this_side(ctx, home, definition)


def _on_this_side(ctx: Context, home: Scope, definition: Definition) -> Value:
    """The value of a definition, which right of `<-` has its taps detached and its projections not."""
    assert definition.value is not None
    if not ctx.detaching or not _mixed(ctx, definition.value):
        return definition.value
    if definition.detached is None:
        definition.detached = _declare(ctx, home, definition)
    return definition.detached


def _mixed(ctx: Context, value: Value) -> bool:
    """Whether the gradient of a tensor reaches both a model and a projection."""
    if not isinstance(value, Tensor) or value.carries <= set(ctx.models):
        return False
    return bool(value.carries & set(ctx.models))


def _declare(ctx: Context, scope: Scope, definition: Definition) -> Value:
    decl = definition.decl
    match decl:
        case ast.Param():
            return parameters.declare(ctx, scope, decl)
        case ast.Let():
            return _family(ctx, scope, decl.name, decl.indices, lambda inner, _suffix: _let(ctx, inner, decl.value))
        case ast.ModelDecl():
            return modelling.declare(ctx, scope, decl)
        case ast.DataDecl():
            return data.declare(ctx, scope, decl)
        case ast.MaskDecl():
            return _mask(ctx, scope, decl)
        case ast.ProjectDecl():
            return _family(
                ctx, scope, decl.name, decl.indices, lambda inner, suffix: _project(ctx, inner, decl, suffix)
            )
        case ast.LossDecl():
            if decl.formals is not None:
                types = [formal.type for formal in decl.formals if formal.type is not None]
                known = [parameters.known_type(ctx, scope, type_) for type_ in types]
                return LossFunction(decl, scope) if all(known) else UNKNOWN
            return _family(
                ctx, scope, decl.name, decl.indices,
                lambda inner, suffix: loss_value(ctx, inner, decl.value, name=f"{decl.name.text}{suffix}"),
            )  # fmt: skip
        case ast.MetricDecl():
            return _metric(ctx, scope, decl)
        case ast.MethodDecl():
            return methods.declared(scope, decl)
        case ast.Use():
            return methods.use(ctx, scope, decl)
        case ast.ImportAs():
            return imports.module(ctx, scope, decl)
        case ast.ImportUse():
            return imports.member(ctx, scope, decl, definition)
        case ast.ImportPython():
            return imports.python_module(ctx, scope, decl)
        case ast.Pass():
            return passes.declare(ctx, scope, decl)
        case ast.Counter():
            return counters.declare(ctx, scope, decl)
        case ast.Policy():
            return policies.declare(ctx, scope, decl)
        case ast.DimDecl():
            return UNKNOWN
    raise AssertionError(decl)


def _family(
    ctx: Context,
    scope: Scope,
    name: ast.Ident,
    indices: tuple[ast.Ident, ...],
    make: Callable[[Scope, str], Value],
) -> Value:
    """A single value, or one for each index, made when it is first asked for."""
    if not indices:
        return make(scope, "")
    made: dict[tuple[int, ...], Value] = {}
    busy: set[tuple[int, ...]] = set()

    detached: dict[tuple[int, ...], Value] = {}

    def suffix(key: tuple[int, ...]) -> str:
        return "".join(f".{k}" for k in key)

    def bound(key: tuple[int, ...]) -> Scope:
        return scope.child(**{i.text: Num(k) for i, k in zip(indices, key, strict=True)})

    def member(key: tuple[int, ...], span: Span) -> Value:
        if key in made:
            if not ctx.detaching or not _mixed(ctx, made[key]):
                return made[key]
            if key not in detached:
                detached[key] = make(bound(key), suffix(key))
            return detached[key]
        written = f"{name.text}[{', '.join(str(k) for k in key)}]"
        if key in busy:
            return ctx.error(
                scope, "E0242", f"`{written}` is defined by itself", span, "it comes back to its own name here"
            )
        busy.add(key)
        made[key] = nested(ctx, scope, written, span, lambda: make(bound(key), suffix(key)))
        busy.discard(key)
        return member(key, span)

    return Family(name.text, len(indices), member)


def nested(ctx: Context, scope: Scope, name: str, span: Span, make: Callable[[], Value]) -> Value:
    """A value that is made of others of its kind; one that comes back to itself without an end is reported."""
    if ctx.depth >= _DEPTH:
        return ctx.error(scope, "E0242", f"`{name}` is defined by itself", span, "it comes back to its own name here")
    ctx.depth += 1
    detaching, ctx.detaching = ctx.detaching, False
    try:
        return make()
    finally:
        ctx.depth, ctx.detaching = ctx.depth - 1, detaching


def _let(ctx: Context, scope: Scope, expr: ast.Expr) -> Value:
    value = ctx.evaluate(scope, expr)
    tensor = paths.as_tensor(ctx, scope, value, expr)
    return value if isinstance(tensor, Unknown) and not isinstance(value, Unknown) else tensor


def _mask(ctx: Context, scope: Scope, decl: ast.MaskDecl) -> Value:
    value = paths.as_tensor(ctx, scope, ctx.evaluate(scope, decl.value), decl.value)
    if isinstance(value, Unknown):
        return UNKNOWN
    return counting.as_mask(ctx, scope, value, decl.value)


# --- losses -------------------------------------------------------------------------------------


def loss_value(ctx: Context, scope: Scope, expr: ast.Expr, name: str | None) -> Value:
    """A loss; with a name it becomes a node of the graph, whose parts are the operators that make it up."""
    from gkd_dsl.meaning.evaluate import as_loss

    loss = as_loss(ctx, scope, ctx.evaluate(scope, expr), expr)
    if not isinstance(loss, Loss):
        return UNKNOWN
    if loss.partial and not loss.terms:
        return UNKNOWN
    if name is None:
        return loss
    node = named_loss(ctx, scope, loss, name, expr)
    return Loss((Term(schedules.Constant(1.0), node),), loss.partial)


def named_loss(ctx: Context, scope: Scope, loss: Loss, name: str, expr: ast.Expr) -> NamedLoss:
    """The LossNode of a loss, its named parts taken apart into operators."""
    full = f"{scope.prefix}{name}"
    key = f"loss/{full}"
    if key in ctx.builder:
        key = ctx.builder.fresh(key)
    parts = list(atoms(ctx, loss))
    ctx.builder.add(
        LossNode(
            key,
            key.removeprefix("loss/"),
            tuple(weight for weight, _ in parts),
            " ".join(expr.span.text.split()),
            locations=(ctx.location(scope, expr.span),),
        )
    )
    for slot, (_, atom) in enumerate(parts):
        ctx.builder.connect(atom, key, str(slot))
    return NamedLoss(key, key.removeprefix("loss/"), loss.carries)


def atoms(ctx: Context, loss: Loss) -> Iterator[tuple[schedules.Schedule, str]]:
    """The operators of a loss with the product of the weights on the way to each."""
    for term in loss.terms:
        if isinstance(term.loss, Atom):
            yield term.weight, term.loss.key
            continue
        node = ctx.builder.node(term.loss.key)
        assert isinstance(node, LossNode)
        for weight, key in zip(node.coefficients, ctx.builder.inputs(node.key).values(), strict=True):
            yield schedules.combine("*", term.weight, weight), key


# --- metrics ------------------------------------------------------------------------------------


def _metric(ctx: Context, scope: Scope, decl: ast.MetricDecl) -> Value:
    value = ctx.evaluate(scope, decl.value)
    if isinstance(value, Unknown):
        return UNKNOWN
    if isinstance(value, Loss):
        value = operators.mean_loss(ctx, scope, value, decl.value)
        if isinstance(value, Unknown):
            return UNKNOWN
    if not isinstance(value, Metric):
        return ctx.error(
            scope, "E0243", f"a metric is a measure such as `accuracy(...)` or a loss, not {kind(value)}",
            decl.value.span,
        )  # fmt: skip
    name = f"{scope.prefix}{decl.name.text}"
    old = ctx.builder.node(value.key)
    assert isinstance(old, MetricNode)
    inputs = ctx.builder.inputs(value.key)
    ctx.builder.graph.remove_node(value.key)
    node = with_changes(old, key=f"metric/{name}", name=name)
    ctx.builder.add(node)
    for slot, source in inputs.items():
        ctx.builder.connect(source, node.key, slot)
    return Metric(node.key, name) if gradients.measured(ctx, scope, node.key, decl.value.span) else UNKNOWN


# --- projections --------------------------------------------------------------------------------


def _project(ctx: Context, scope: Scope, decl: ast.ProjectDecl, suffix: str) -> Value:
    call = decl.value
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "linear":
        written = call.func.span.text if isinstance(call, ast.Call) else "this"
        return ctx.error(
            scope, "E0313", f"a projection is `linear(from -> to)`, not `{written}`", decl.value.span,
            "write `linear(s.H -> t.H)`",
        )  # fmt: skip
    dims: list[Dim] = []
    bias, init = True, "default"
    for arg in call.args:
        value = ctx.evaluate(scope, arg.value)
        if isinstance(value, Unknown):
            return UNKNOWN
        if arg.name is None and isinstance(value, Directed) and not dims:
            for end in (value.left, value.right):
                if isinstance(end, Unknown):
                    return UNKNOWN
                if not isinstance(end, Num) or not isinstance(end.value, int) or end.value < 1:
                    return ctx.error(
                        scope, "E0313", f"a projection goes between whole sizes, and this is {kind(end)}",
                        arg.value.span,
                    )  # fmt: skip
                dims.append(end.dim or Dim("", end.value))
        elif arg.name is not None and arg.name.text == "bias" and isinstance(value, Truth):
            bias = value.value
        elif arg.name is not None and arg.name.text == "init" and isinstance(value, Text) and value.value in _INITS:
            init = value.value
        else:
            sides = [a for a in call.args if a.name is None]
            if len(sides) == 2 and arg.name is None and not isinstance(value, Directed):
                both, text = sides[0].span.to(sides[1].span), f"{sides[0].span.text} -> {sides[1].span.text}"
                return ctx.error(
                    scope, "E0313", "`linear` goes from one size to another", both, f"write `{text}`",
                    fix=replace(both, text),
                )  # fmt: skip
            label, near = ("", None) if arg.name is None else suggest(arg.name.text, ("bias", "init"))
            return ctx.error(
                scope, "E0313", "`linear` takes `from -> to`, `bias = true` and `init = \"default\"`", arg.span,
                label or f'init is one of {", ".join(_INITS)}',
                fix=replace(arg.name.span, near) if near and arg.name and near != arg.name.text else None,
            )  # fmt: skip
    if not dims:
        return ctx.error(scope, "E0313", "`linear` needs its two sizes", call.span, "write `linear(s.H -> t.H)`")
    if init == "identity" and not dims[0].agrees(dims[1]):
        return ctx.error(
            scope, "E0313", f"an identity needs equal sizes, and these are {dims[0]} and {dims[1]}", call.span
        )
    name = f"{scope.prefix}{decl.name.text}{suffix}"
    key = f"project/{name}"
    ctx.builder.add(
        ProjectNode(
            key, name, dims[0].size or 0, dims[1].size or 0, bias, init,
            locations=(ctx.location(scope, decl.name.span),),
        )
    )  # fmt: skip
    return Block(key, name, dims[0], dims[1], decl.name.span)
