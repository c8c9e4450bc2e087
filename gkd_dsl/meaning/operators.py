"""Operators: from a call to a typed node of the graph, with its mask and what it detaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from gkd_dsl import schedules
from gkd_dsl.diagnostics import Note
from gkd_dsl.graph.nodes import AttrValue, LossNode, MetricNode, OpNode
from gkd_dsl.meaning import counting, mismatch, paths, vocabulary
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    UNKNOWN,
    Atom,
    Block,
    Items,
    Loss,
    Metric,
    Num,
    PythonModule,
    Scheduled,
    TapPart,
    Tensor,
    Term,
    Text,
    Unknown,
    Value,
    as_schedule,
    kind,
    plain,
)
from gkd_dsl.ops import registry
from gkd_dsl.ops.typing import Mismatch, PairOf, Typed, bind, check_call
from gkd_dsl.syntax import ast
from gkd_dsl.types import LossType, TensorType

_COMPARE = {"==": "equal", "!=": "not_equal", "<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal"}
_ARITHMETIC = {"+": "add", "-": "sub", "*": "mul", "/": "div", "&": "and", "and": "and", "or": "or"}
_WEIGHTS = ("token_weight", "sample_weight")
_MASK = "mask"


# --- calls as written ---------------------------------------------------------------------------


def call(ctx: Context, scope: Scope, spec: registry.OpSpec, expr: ast.Call) -> Value:
    """`kl(s.logits <- t.logits, temperature = T, mask = m)`."""
    written: dict[str, ast.Expr] = {}
    positional: list[Value | PairOf[Value]] = []
    places: list[ast.Expr | PairOf[ast.Expr]] = []
    keywords: dict[str, Value] = {}
    mask: Value | None = None
    bad = False
    for arg in expr.args:
        if isinstance(arg.value, ast.Pair):
            if arg.name is not None:
                return ctx.error(scope, "E0334", "a pair is not a named argument", arg.span, "leave the name out")
            pair = _pair(ctx, scope, arg.value)
            if pair is None:
                bad = True
                continue
            positional.append(pair)
            places.append(PairOf(arg.value.left, arg.value.right))
            continue
        value = paths.as_tensor(ctx, scope, ctx.evaluate(scope, arg.value), arg.value)
        if isinstance(value, Unknown):
            bad = True
            if arg.name is not None:
                _known_name(ctx, scope, spec, arg)
            continue
        if arg.name is None:
            if isinstance(value, Items) and any(isinstance(item, Tensor | TapPart) for item in value.items):
                several = [paths.as_tensor(ctx, scope, item, arg.value) for item in value.items]
                bad = bad or any(isinstance(item, Unknown) for item in several)
                positional += several
                places += [arg.value] * len(several)
            else:
                positional.append(value)
                places.append(arg.value)
        elif arg.name.text == _MASK and (spec.kind in ("loss", "metric") or spec.masked):
            mask = counting.as_mask(ctx, scope, value, arg.value)
            bad = bad or isinstance(mask, Unknown)
        else:
            keywords[arg.name.text] = value
            written[arg.name.text] = arg.value
    if bad:
        return UNKNOWN
    kept = _takes_kept(spec, keywords)
    if spec.kind == "metric" or spec.kind == "loss":
        hint = _two_sides(ctx, scope, spec, positional, expr)
        if hint:
            return UNKNOWN
    bound = bind(spec, positional, keywords)
    if isinstance(bound, Mismatch):
        return mismatch.report(ctx, scope, bound, spec, expr, written, {})
    by_place = bind(spec, places, written)
    if not isinstance(by_place, Mismatch):
        written = by_place
    tensors: dict[str, Tensor] = {}
    values: dict[str, AttrValue] = {}
    losses: dict[str, Atom] = {}
    for name, value in bound.items():
        where = written.get(name, expr)
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Loss):
            atom = _one_atom(ctx, scope, value, where)
            if atom is None:
                return UNKNOWN
            losses[name] = atom
        else:
            plain_value = None if isinstance(value, Items) and not _is_plain(value) else plain(value)
            if plain_value is None:
                return ctx.error(scope, "E0303", f"`{name}` of `{spec.name}` does not take {kind(value)}", where.span)
            if name == "share" and isinstance(plain_value, schedules.Span) and plain_value.unit == "percent":
                plain_value = plain_value.amount / 100.0
            if isinstance(plain_value, schedules.Span):
                return mismatch.unit(ctx, scope, name, spec, value, where)
            values[name] = cast(AttrValue, plain_value)
    return _apply(ctx, scope, spec, tensors, values, expr, written, cast("Tensor | None", mask), losses, kept)


def _takes_kept(spec: registry.OpSpec, keywords: dict[str, Value]) -> bool:
    """Whether the sides are compared over the ids that one of them keeps: `align = "kept"`, of any loss over a pair."""
    align = keywords.get("align")
    if not isinstance(align, Text) or ("student", "teacher") not in registry.pair_slots(spec):
        return False
    if align.value == "kept" or (align.value == "exact" and not registry.has_argument(spec, "align")):
        del keywords["align"]
    return align.value == "kept"


def _is_plain(value: Value) -> bool:
    """Whether a value is a number, a text, a schedule, or a list of such."""
    return all(_is_plain(item) for item in value.items) if isinstance(value, Items) else plain(value) is not None


def _known_name(ctx: Context, scope: Scope, spec: registry.OpSpec, arg: ast.Arg) -> None:
    """Report a misspelt argument even where its value could not be read."""
    assert arg.name is not None
    legal = (*registry.argument_names(spec), _MASK, *_WEIGHTS)
    if arg.name.text not in legal:
        label, near = suggest(arg.name.text, legal)
        ctx.error(
            scope, "E0234", f"`{spec.name}` has no argument `{arg.name.text}`", arg.name.span, label,
            fix=replace(arg.name.span, near) if near else None,
        )  # fmt: skip


def _two_sides(ctx: Context, scope: Scope, spec: registry.OpSpec, positional: list, expr: ast.Call) -> bool:
    """`kl(s.logits, t.logits)`: two tensors where a pair is wanted. Reported with the arrow as its fix."""
    pairs = registry.pair_slots(spec)
    sides = [arg for arg in expr.args if arg.name is None]
    if not pairs or len(sides) < 2 or any(isinstance(p, PairOf) for p in positional):
        return False
    first, second = sides[0], sides[1]
    written = first.span.to(second.span)
    roles = [{ctx.models[name].role for name in p.reads} if isinstance(p, Tensor) else set() for p in positional[:2]]
    if roles == [{"teacher"}, {"student"}]:
        first, second = second, first
    ctx.error(
        scope,
        "E0336",
        f"`{spec.name}` compares two sides: write `<-` between them",
        written,
        "student side <- teacher side",
        fix=replace(written, f"{first.span.text} <- {second.span.text}"),
    )
    return True


def call_python(ctx: Context, scope: Scope, base: PythonModule, expr: ast.Call, func: ast.Attr) -> Value:
    """`ops.gram2(x)`: an operator of the user's, known by the signature in its decorator."""
    found = base.extensions.get(func.name.text)
    if found is None:
        label, near = suggest(func.name.text, base.extensions)
        return ctx.error(
            scope, "E0231", f"`{base.path}` has no operator `{func.name.text}`", func.name.span,
            label or f"it has: {', '.join(base.extensions) or 'none'}",
            fix=replace(func.name.span, near) if near else None,
        )  # fmt: skip
    spec = registry.lookup(f"{base.path}:{func.name.text}")
    if spec is None:
        return ctx.error(
            scope, "E0230", f"`{func.name.text}` is a data source, not an operator", func.name.span,
            f"write `data x = {func.span.text}(...)`",
        )  # fmt: skip
    return call(ctx, scope, spec, expr)


# --- pairs --------------------------------------------------------------------------------------


def _pair(ctx: Context, scope: Scope, pair: ast.Pair) -> PairOf[Value] | None:
    left = paths.as_tensor(ctx, scope, ctx.evaluate(scope, pair.left), pair.left)
    # Each tap on the right is detached where it is read, so that a projection there still trains.
    before, ctx.detaching = ctx.detaching, True
    try:
        right = paths.as_tensor(ctx, scope, ctx.evaluate(scope, pair.right), pair.right)
    finally:
        ctx.detaching = before
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        return None
    for value, side in ((left, pair.left), (right, pair.right)):
        if not isinstance(value, Tensor | Loss):
            ctx.error(scope, "E0303", f"`<-` compares tensors, and this is {kind(value)}", side.span)
            return None
    if isinstance(left, Tensor) and isinstance(right, Tensor) and not _roles(ctx, scope, left, right, pair):
        return None
    if isinstance(right, Tensor) and right.carries & set(ctx.models):
        right = paths.detached(ctx, scope, right, pair.right)
    return PairOf(left, right)


def _roles(ctx: Context, scope: Scope, left: Tensor, right: Tensor, pair: ast.Pair) -> bool:
    """A student is on the left, a teacher on the right."""
    roles = {name: ctx.models[name].role for name in left.reads | right.reads}
    left_models, right_models = sorted(left.reads), sorted(right.reads)
    student_right = next((name for name in right_models if roles[name] == "student"), None)
    teacher_left = [name for name in left_models if roles[name] == "teacher"]
    if student_right is not None and student_right not in left_models:
        swap = f"{pair.right.span.text} <- {pair.left.span.text}"
        ctx.error(
            scope,
            "E0330",
            f"the student `{student_right}` is on the right of `<-`, where nothing is trained",
            pair.right.span,
            "a student goes on the left",
            notes=["gradient flows to the left side only; the right side is detached"],
            fix=replace(pair.span, swap, "swap the sides"),
        )
        return False
    if student_right is not None and "detach" not in pair.right.span.text:
        ctx.error(
            scope,
            "E0330",
            f"`{student_right}` is on both sides of `<-`",
            pair.right.span,
            "to learn from itself, say so",
            fix=replace(pair.right.span, f"detach({pair.right.span.text})"),
        )
        return False
    # A projection of a teacher that is detached in so many words may learn on the left: to decode, to predict.
    projected = bool(left.carries) and not left.carries & set(ctx.models)
    if teacher_left and len(teacher_left) == len(left_models) and not projected:
        ctx.error(
            scope,
            "E0337",
            f"`{teacher_left[0]}` is a teacher, and is on the left of `<-`, the side that is trained",
            pair.left.span,
            "declare it with `model` if it also learns",
        )
        return False
    return True


# --- building nodes -----------------------------------------------------------------------------


def apply(
    ctx: Context,
    scope: Scope,
    name: str,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, AttrValue],
    expr: ast.Expr,
) -> Value:
    """An operator that the language itself applies: `detach`, `mean`, arithmetic."""
    spec = registry.lookup(name)
    assert spec is not None, name
    return _apply(ctx, scope, spec, dict(tensors), dict(values), expr, {}, None, {})


def _apply(
    ctx: Context,
    scope: Scope,
    spec: registry.OpSpec,
    tensors: dict[str, Tensor],
    values: dict[str, AttrValue],
    expr: ast.Expr,
    written: dict[str, ast.Expr],
    mask: Tensor | None,
    losses: dict[str, Atom],
    kept: bool = False,
) -> Value:
    _fit_labels(ctx, scope, tensors)
    if kept and not vocabulary.aligned(ctx, scope, tensors, expr):
        return UNKNOWN
    if vocabulary.mixed(ctx, scope, tensors, values.get("align") == "trim", expr):
        return UNKNOWN
    shifts = spec.next_token and any(tensor.next_token for tensor in tensors.values())
    causal = any(tensor.causal for tensor in tensors.values())
    if causal and registry.has_argument(spec, "causal") and "causal" not in values:
        values["causal"] = True
    if spec.name == "cls" and "last" not in values and _left_to_right(ctx, tensors["x"]):
        values["last"] = True
    if shifts and "labels" in tensors:
        tensors["labels"] = counting.next_token(ctx, scope, tensors["labels"], expr)
    if spec.name in ("equal", "not_equal") and isinstance(values.get("b"), int):
        values["b"] = float(cast(int, values["b"]))
    if values.get("align") == "trim" and "vocabulary" not in values:
        sizes = [t.type.dims[-1].size for n, t in tensors.items() if n in ("student", "teacher")]
        known = [size for size in sizes if size is not None]
        if known:
            values["vocabulary"] = min(known)
    shapes: dict[str, TensorType | LossType] = {name: tensor.type for name, tensor in tensors.items()}
    shapes.update({name: atom.type for name, atom in losses.items()})
    call = (spec.name, tuple(shapes.items()), tuple((name, type(value), value) for name, value in values.items()))
    result = ctx.typed.get(call)
    if result is None:
        result = ctx.typed[call] = check_call(spec, shapes, values)
    if isinstance(result, Mismatch):
        return mismatch.report(ctx, scope, result, spec, expr, written, tensors)
    inputs = {name: tensor.key for name, tensor in tensors.items()}
    inputs.update({name: atom.key for name, atom in losses.items()})
    if spec.masked:
        valid = counting.valid(ctx, scope, spec, result, tensors, losses, mask, shifts, expr)
        if isinstance(valid, Unknown):
            return UNKNOWN
        if valid is not None:
            inputs["valid"] = valid.key
    # What counts is read from the labels as they are; what is compared are rows.
    inputs["labels"] = vocabulary.labels(ctx, scope, tensors, expr) or inputs.get("labels", "")
    if not inputs["labels"]:
        del inputs["labels"]
    if spec.kind == "metric":
        return _metric_inputs(ctx, scope, spec, result, inputs, expr)
    assert result.type is not None
    key = ctx.builder.fresh(f"op/{scope.prefix}{spec.name.rsplit(':', 1)[-1]}")
    ctx.builder.add(OpNode(key, spec.name, result.attrs, result.type, locations=(ctx.location(scope, expr.span),)))
    for slot, source in inputs.items():
        ctx.builder.connect(source, key, slot)
    carries = frozenset().union(*(t.carries for t in tensors.values()), *(a.carries for a in losses.values()))
    if spec.name == "detach":
        carries = frozenset()
    if isinstance(result.type, LossType):
        return Loss((Term(schedules.Constant(1.0), Atom(key, result.type, carries)),))
    lengths = sum(dim.name == "L" for dim in result.type.dims)
    return Tensor(
        key,
        result.type,
        carries,
        reads=frozenset().union(*(t.reads for t in tensors.values())),
        next_token=lengths > 0 and any(tensor.next_token for tensor in tensors.values()),
        causal=lengths == 2 and causal,
        from_batch=bool(tensors) and all(tensor.from_batch for tensor in tensors.values()),
        tokens=frozenset().union(*(t.tokens for t in tensors.values())),
    )


def _left_to_right(ctx: Context, tensor: Tensor) -> bool:
    return any(ctx.models[name].info.left_to_right for name in tensor.reads if name in ctx.models)


def _fit_labels(ctx: Context, scope: Scope, tensors: dict[str, Tensor]) -> None:
    """In a spec of classifiers and language models, `batch.labels` is what the logits beside it are compared with."""
    labels, student = tensors.get("labels"), tensors.get("student")
    if labels is None or student is None or not labels.key.startswith("batch/labels"):
        return
    leading = TensorType("int", student.type.dims[:-1])
    if labels.type != leading and leading in ctx.label_types(scope):
        key = paths.column_node(ctx, "labels", leading)
        tensors["labels"] = Tensor(key, leading, from_batch=True, tokens=labels.tokens)


def _one_atom(ctx: Context, scope: Scope, loss: Loss, expr: ast.Expr) -> Atom | None:
    """The single operator behind a loss that is taken apart (`per_sample`, `mean_loss`)."""
    if loss.partial:
        return None
    term = loss.terms[0] if len(loss.terms) == 1 else None
    if term is not None and term.weight == schedules.Constant(1.0):
        if isinstance(term.loss, Atom):
            return term.loss
        inputs = ctx.builder.inputs(term.loss.key)
        node = ctx.builder.node(term.loss.key)
        assert isinstance(node, LossNode)
        if len(inputs) == 1 and node.coefficients == (schedules.Constant(1.0),):
            key = next(iter(inputs.values()))
            inside = ctx.builder.node(key)
            assert isinstance(inside, OpNode)
            return Atom(key, cast(LossType, inside.type), term.loss.carries)
    ctx.error(
        scope, "E0307", "this takes one loss operator, and this is a sum of weighted ones", expr.span,
        notes=["write the sum outside: `per_sample(a) + per_sample(b)`"],
    )  # fmt: skip
    return None


# --- metrics ------------------------------------------------------------------------------------


def _metric_inputs(
    ctx: Context, scope: Scope, spec: registry.OpSpec, typed: Typed, inputs: Mapping[str, str], expr: ast.Expr
) -> Value:
    key = ctx.builder.fresh(f"metric/{scope.prefix}{spec.name}")
    ctx.builder.add(
        MetricNode(
            key,
            key.removeprefix("metric/"),
            spec.name,
            typed.attrs,
            spec.greater_is_better,
            locations=(ctx.location(scope, expr.span),),
        )
    )
    for slot, source in inputs.items():
        ctx.builder.connect(source, key, slot)
    return Metric(key, key.removeprefix("metric/"))


def mean_loss(ctx: Context, scope: Scope, loss: Loss, expr: ast.Expr) -> Value:
    """A loss as a metric: its mean over the whole held-out set."""
    atom = _one_atom(ctx, scope, loss, expr)
    if atom is None:
        return UNKNOWN
    spec = registry.lookup("mean_loss")
    assert spec is not None
    return _apply(ctx, scope, spec, {}, {}, expr, {}, None, {"x": atom})


# --- arithmetic, indexing, projections, columns ---------------------------------------------------


def arithmetic(ctx: Context, scope: Scope, expr: ast.Binary, left: Value, right: Value) -> Value:
    """`a op b` where at least one side is a tensor."""
    name = _COMPARE.get(expr.op) or _ARITHMETIC.get(expr.op)
    if name is None:
        return ctx.error(scope, "E0213", f"`{expr.op}` does not take tensors", expr.op_span)
    tensors: dict[str, Tensor] = {}
    values: dict[str, AttrValue] = {}
    for slot, value, written in (("a", left, expr.left), ("b", right, expr.right)):
        if isinstance(value, Tensor):
            tensors[slot] = value
        elif isinstance(value, Num):
            values[slot] = value.value
        elif isinstance(value, Scheduled):
            values[slot] = value.schedule
        else:
            return ctx.error(
                scope, "E0213", f"`{expr.op}` does not go between {kind(left)} and {kind(right)}", written.span
            )
    if name in ("equal", "not_equal") and "a" in values:
        tensors, values = {"a": tensors["b"]}, {"b": values["a"]}
    spec = registry.lookup(name)
    assert spec is not None
    return _apply(ctx, scope, spec, tensors, values, expr, {"a": expr.left, "b": expr.right}, None, {})


def sum_tensors(ctx: Context, scope: Scope, items: list[Tensor], share: float, expr: ast.Expr) -> Value:
    """The sum of equal tensors, times `share`."""
    total: Value = items[0]
    for item in items[1:]:
        assert isinstance(total, Tensor)
        total = apply(ctx, scope, "add", {"a": total, "b": item}, {}, expr)
        if isinstance(total, Unknown):
            return UNKNOWN
    if share != 1.0:
        assert isinstance(total, Tensor)
        return apply(ctx, scope, "mul", {"a": total}, {"b": share}, expr)
    return total


def index(ctx: Context, scope: Scope, base: Tensor, number: int, expr: ast.Index) -> Value:
    """`w[0]`: one entry of the last axis."""
    return apply(ctx, scope, "index", {"x": base}, {"i": number}, expr)


def project(ctx: Context, scope: Scope, value: Tensor, block: Block, expr: ast.Pipe) -> Value:
    """`x |> W`."""
    last = value.type.dims[-1]
    if not last.agrees(block.in_dim):
        return ctx.error(
            scope,
            "E0302",
            f"`{block.name}` takes {block.in_dim}, and this has {last} on its last axis",
            expr.value.span,
            value.type.long,
            labels=(),
            notes=[
                *mismatch.origins(ctx, last, block.in_dim),
                *([Note(f"`{block.name}` is declared here", block.defined)] if block.defined is not None else []),
            ],
        )
    type_ = TensorType("float", (*value.type.dims[:-1], block.out_dim))
    key = ctx.builder.fresh(f"op/{scope.prefix}project")
    ctx.builder.add(OpNode(key, "project", (), type_, locations=(ctx.location(scope, expr.span),)))
    ctx.builder.connect(value.key, key, "x")
    ctx.builder.connect(block.key, key, "block")
    return Tensor(
        key, type_, value.carries | {block.key}, value.reads, value.next_token, value.causal, tokens=value.tokens
    )


def batch_column(ctx: Context, scope: Scope, expr: ast.Attr) -> Value:
    """`batch.labels`, `batch.attention_mask`."""
    name = expr.name.text
    columns = ctx.batch_columns(scope)
    if name not in columns:
        label, near = suggest(name, columns)
        if name == "labels" and ctx.model_unknown:
            return UNKNOWN
        if name == "labels":
            return ctx.error(
                scope,
                "E0227",
                "there are no labels here: no model of this spec has a head",
                expr.name.span,
                notes=['give a model a head: hf("...", task = "classification", num_labels = 2)'],
            )
        return ctx.error(
            scope, "E0240", f"a batch has no column `{name}`", expr.name.span, label or "not a column",
            notes=[f"its columns: {', '.join(columns)}"], fix=replace(expr.name.span, near) if near else None,
        )  # fmt: skip
    key = paths.column_node(ctx, "labels" if name == "token_labels" else name, columns[name])
    return Tensor(key, columns[name], from_batch=True, tokens=frozenset({paths.column_node(ctx, "attention_mask")}))


__all__ = ["apply", "arithmetic", "as_schedule", "batch_column", "call", "call_python", "index", "project"]
