"""A part of a vocabulary: `vocabulary = kept(8000, source = corpus)`, and tensors over it."""

from __future__ import annotations

from dataclasses import replace as with_changes

from gkd_dsl.graph.nodes import OpNode
from gkd_dsl.meaning import paths
from gkd_dsl.meaning.context import Context, suggest
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import (
    Items,
    Length,
    Model,
    Num,
    Source,
    TapPart,
    Tensor,
    Text,
    Unknown,
    Value,
    kind,
)
from gkd_dsl.models import describe
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.info import Kept, ModelInfo
from gkd_dsl.syntax import ast
from gkd_dsl.types import TensorType

ARGUMENTS = ("source", "words", "similarity", "like")
SIMILARITIES = ("inner", "cosine")


def keeping(ctx: Context, scope: Scope, info: ModelInfo, expr: ast.Expr) -> ModelInfo | None:
    """The model with the part of its vocabulary that a setting asks for; None where something was reported."""
    if not isinstance(expr, ast.Call) or not isinstance(expr.func, ast.Name) or expr.func.id != "kept":
        ctx.error(scope, "E0404", "`vocabulary` takes `kept(...)`", expr.span, "write `kept(8000, source = corpus)`")
        return None
    full = info.size("V")
    if full is None:
        ctx.error(scope, "E0502", f'the vocabulary of "{info.location}" has no known size', expr.span)
        return None
    found: dict[str, Value] = {}
    count: Value | None = None
    for arg in expr.args:
        if arg.name is None:
            if count is not None:
                ctx.error(scope, "E0234", "`kept` takes one number, then named arguments", arg.span)
                return None
            count = ctx.evaluate(scope, arg.value)
            continue
        name = arg.name.text
        if name not in ARGUMENTS:
            ctx.error(
                scope, "E0234", f"`kept` has no argument `{name}`", arg.name.span, suggest(name, ARGUMENTS)[0],
                notes=[f"its arguments: {', '.join(ARGUMENTS)}"],
            )  # fmt: skip
            return None
        if isinstance(arg.value, ast.Name) and name == "similarity":
            found[name] = Text(arg.value.id)
        else:
            found[name] = ctx.evaluate(scope, arg.value)
        if not _fits(name, found[name]):
            if not isinstance(found[name], Unknown):
                ctx.error(scope, "E0404", f"`{name}` does not take {kind(found[name])}", arg.value.span, _WANTED[name])
            return None
    source = found.get("source")
    if count is None or not isinstance(source, Source):
        what = "how many ids it keeps" if count is None else "the data whose tokens are counted"
        ctx.error(scope, "E0235", f"`kept` needs {what}", expr.span, "write `kept(8000, source = corpus)`")
        return None
    wanted = _count(count, full)
    if wanted is None:
        if not isinstance(count, Unknown):
            ctx.error(
                scope, "E0404", f"`kept` takes a whole number of ids or a share, not {kind(count)}", expr.args[0].span
            )
        return None
    like, words, similarity = found.get("like"), found.get("words"), found.get("similarity")
    kept = Kept(
        wanted,
        full,
        source.spec.name,
        source.spec.kind,
        source.spec.args,
        tuple(item.value for item in words.items if isinstance(item, Text)) if isinstance(words, Items) else (),
        similarity.value if isinstance(similarity, Text) else "inner",  # type: ignore[arg-type]
        like.name if isinstance(like, Model) else info.build.base,
        like.info if isinstance(like, Model) else info.build.origin,
    )
    if kept.like_info is not None and (kept.like_info.size("V") != full or kept.like_info.kept is not None):
        ctx.error(
            scope, "E0320", f"`{kept.like}` has another vocabulary: which ids are alike is read from its embeddings",
            expr.span, f"{kept.like_info.size('V')} ids, and this model has {full}",
        )  # fmt: skip
        return None
    try:
        return describe.keeping(info, kept)
    except ModelError as error:
        ctx.error(scope, "E0403", error.reason, expr.span, error.hint)
        return None


_WANTED = {
    "source": "a data source",
    "words": 'texts: `["good", "bad"]`',
    "similarity": "inner or cosine",
    "like": "a model of this spec",
}


def _fits(name: str, value: Value) -> bool:
    if name == "source":
        return isinstance(value, Source)
    if name == "words":
        return isinstance(value, Items) and all(isinstance(item, Text) for item in value.items)
    if name == "similarity":
        return isinstance(value, Text) and value.value in SIMILARITIES
    return isinstance(value, Model)


def _count(value: Value, full: int) -> int | None:
    if isinstance(value, Num) and isinstance(value.value, int):
        return value.value
    if isinstance(value, Length) and value.span.unit == "percent":
        return max(1, round(full * value.span.amount / 100)) if value.span.amount <= 100 else full + 1
    return None


# --- tensors over a part of a vocabulary --------------------------------------------------------


def owner(ctx: Context, tensor: Tensor | None) -> Model | None:
    """The model of whose kept ids the last axis of a tensor is."""
    if tensor is None or not tensor.type.dims:
        return None
    name, _, size = tensor.type.dims[-1].name.rpartition(".")
    model = ctx.models.get(name)
    return model if model is not None and size == "V" and model.info.kept is not None else None


def aligned(ctx: Context, scope: Scope, tensors: dict[str, Tensor], expr: ast.Expr) -> bool:
    """Take of the whole vocabulary what the other side keeps (`align = "kept"`); False where it was reported."""
    sides = {slot: owner(ctx, tensors.get(slot)) for slot in ("student", "teacher")}
    held = {slot: model for slot, model in sides.items() if model is not None}
    if not held:
        ctx.error(
            scope, "E0320", "neither side keeps a part of its vocabulary", expr.span,
            "write `{ vocabulary = kept(...) }` behind a model, or leave `align` out",
        )  # fmt: skip
        return False
    if len(held) == 2:
        return True  # Of one part or, as `mixed` finds, of two.
    ((slot, model),) = held.items()
    other = "teacher" if slot == "student" else "student"
    ids = _map_of(ctx, scope, model, "kept_ids", expr)
    whole = tensors[other]
    kept = model.info.kept
    assert kept is not None
    if whole.type.dims[-1].size != kept.full:
        ctx.error(
            scope, "E0320", f"`{model.name}` keeps {kept.count} of {kept.full} ids, and the other side has "
            f"{whole.type.dims[-1].size}", expr.span,
        )  # fmt: skip
        return False
    type_ = TensorType(whole.type.dtype, (*whole.type.dims[:-1], tensors[slot].type.dims[-1]))
    key = _node(ctx, scope, "gather_vocabulary", type_, {"x": whole.key, "ids": ids}, expr)
    tensors[other] = with_changes(whole, key=key, type=type_)
    return True


def mixed(ctx: Context, scope: Scope, tensors: dict[str, Tensor], trim: bool, expr: ast.Expr) -> bool:
    """Whether two sides are over different parts of a vocabulary, which was reported then."""
    sides = [owner(ctx, tensors.get(slot)) for slot in ("student", "teacher")]
    held = [model for model in sides if model is not None]
    if not held or "teacher" not in tensors or tensors["teacher"].type.dims[-1:] == tensors["student"].type.dims[-1:]:
        return False
    if len(held) == 2 and held[0].info.kept != held[1].info.kept:
        ctx.error(
            scope, "E0320", f"`{held[0].name}` and `{held[1].name}` keep parts of the vocabulary of their own",
            expr.span, "their rows stand for different ids",
        )  # fmt: skip
        return True
    if len(held) == 1 and (trim or held[0].info.size("V") != held[0].info.kept.full):  # type: ignore[union-attr]
        ctx.error(
            scope, "E0320", f"`{held[0].name}` keeps a part of its vocabulary, and the other side has all of it",
            expr.span, 'write `align = "kept"`',
        )  # fmt: skip
        return True
    return False


def labels(ctx: Context, scope: Scope, tensors: dict[str, Tensor], expr: ast.Expr) -> str | None:
    """The key of the labels as rows of the model that they meet; None where they are its ids."""
    model = owner(ctx, tensors.get("student"))
    if model is None or "labels" not in tensors:
        return None
    rows = _map_of(ctx, scope, model, "id_map", expr)
    held = tensors["labels"]
    return _node(ctx, scope, "map_ids", held.type, {"x": held.key, "rows": rows}, expr)


def _map_of(ctx: Context, scope: Scope, model: Model, name: str, expr: ast.Expr) -> str:
    """The key of a map of a model, detached."""
    before, ctx.detaching = ctx.detaching, False
    try:
        found = paths.as_tensor(ctx, scope, TapPart(model, (("weight", (name,)),), (expr.span,)), expr)
    finally:
        ctx.detaching = before
    assert isinstance(found, Tensor)
    return paths.detached(ctx, scope, found, expr).key


def _node(ctx: Context, scope: Scope, op: str, type_: TensorType, inputs: dict[str, str], expr: ast.Expr) -> str:
    key = ctx.builder.fresh(f"op/{scope.prefix}{op}")
    ctx.builder.add(OpNode(key, op, (), type_, locations=(ctx.location(scope, expr.span),)))
    for slot, source in inputs.items():
        ctx.builder.connect(source, key, slot)
    return key
