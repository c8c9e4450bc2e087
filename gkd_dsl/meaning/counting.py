"""Which positions of an operator count: valid tokens, masks, labels that are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from gkd_dsl.graph.nodes import BatchNode, OpNode
from gkd_dsl.meaning import operators, paths
from gkd_dsl.meaning.context import Context
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import Atom, Tensor, Unknown, Value, kind
from gkd_dsl.ops import registry
from gkd_dsl.ops.typing import Typed
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span
from gkd_dsl.types import BATCH, LENGTH, TensorType


def valid(
    ctx: Context,
    scope: Scope,
    spec: registry.OpSpec,
    typed: Typed,
    tensors: Mapping[str, Tensor],
    losses: Mapping[str, Atom],
    mask: Tensor | None,
    shifts: bool,
    expr: ast.Expr,
) -> Tensor | Unknown | None:
    """The positions that count: valid tokens, narrowed by `mask` and by labels that are there."""
    ours, given = tensors.get("student"), tensors.get("labels")
    if ours is not None and given is not None and ours.tokens and given.tokens and not ours.tokens & given.tokens:
        return cast(
            Unknown,
            ctx.error(
                scope, "E0275", f"`{spec.name}` compares a pass over other texts with labels that are not theirs",
                expr.span, "labels of other texts", notes=["the labels of a rolled batch are `roll(batch).labels`"],
            ),
        )  # fmt: skip
    dims = dict(typed.attrs).get("dims")
    names = (
        cast("tuple[str, ...]", dims)
        if isinstance(dims, tuple)
        else tuple(dim.name for tensor in tensors.values() for dim in tensor.type.dims)
    )
    for atom in losses.values():
        # A loss as an argument (`per_sample`, `mean_loss`) brings its own positions.
        if mask is not None:
            return cast(
                Unknown,
                ctx.error(
                    scope, "E0234", f"`{spec.name}` of a loss has no argument `mask`", _mask_span(expr),
                    "give the mask to the loss inside",
                ),
            )  # fmt: skip
        own = ctx.builder.inputs(atom.key).get("valid")
        if own is not None:
            node = ctx.builder.node(own)
            assert isinstance(node, OpNode | BatchNode)
            return Tensor(own, cast(TensorType, node.type), from_batch=True)
        return None
    tokens = frozenset().union(*(tensor.tokens for tensor in tensors.values()))
    over_tokens = "L" in names
    valid: Tensor | None = valid_tokens(ctx, scope, tokens, expr) if over_tokens else None
    if mask is not None:
        if not over_tokens and any(dim.name == "L" for dim in mask.type.dims):
            return cast(
                Unknown,
                ctx.error(
                    scope, "E0306", f"`mask` speaks of tokens, and `{spec.name}` has one value for each text here",
                    _mask_span(expr), f"the mask is {mask.type}",
                ),
            )  # fmt: skip
        valid = mask if valid is None else both(ctx, scope, valid, mask, expr)
    if shifts and valid is not None:
        # The pad before a text that is padded on the left stands before its first token, and predicts nothing.
        valid = both(ctx, scope, valid_tokens(ctx, scope, tokens, expr), next_token(ctx, scope, valid, expr), expr)
    labels = tensors.get("labels")
    if labels is not None and labels.type.dtype == "int":
        there = operators.apply(ctx, scope, "not_equal", {"a": labels}, {"b": -100.0}, expr)
        assert isinstance(there, Tensor)
        valid = there if valid is None else both(ctx, scope, valid, there, expr)
    return valid


def _mask_span(expr: ast.Expr) -> Span:
    for arg in expr.args if isinstance(expr, ast.Call) else ():
        if arg.name is not None and arg.name.text == "mask":
            return arg.value.span
    return expr.span


def both(ctx: Context, scope: Scope, left: Tensor, right: Tensor, expr: ast.Expr) -> Tensor:
    """Where two masks hold, Bool[B, L] or Bool[B]."""
    if left.type.dims == (BATCH,) and right.type.dims != (BATCH,):
        left, right = right, left
    made = operators.apply(ctx, scope, "and", {"a": left, "b": right}, {}, expr)
    assert isinstance(made, Tensor), made
    return made


def next_token(ctx: Context, scope: Scope, tensor: Tensor, expr: ast.Expr) -> Tensor:
    """A column or a mask moved to the position that predicts it."""
    shifted = operators.apply(ctx, scope, "next_token", {"x": tensor}, {}, expr)
    assert isinstance(shifted, Tensor)
    return shifted


def valid_tokens(ctx: Context, scope: Scope, tokens: frozenset[str], expr: ast.Expr) -> Tensor:
    """Where the attention masks of these keys (none: the batch's) hold a token, as Bool[B, L].

    A tensor from a pass over other texts counts the tokens of those; one that is made of two counts where both have.
    """
    found: Tensor | None = None
    for column in sorted(tokens or {paths.column_node(ctx, "attention_mask")}):
        made = ctx.shared.get(("valid_tokens", column))
        if made is None:
            mask = Tensor(column, TensorType("int", (BATCH, LENGTH)), from_batch=True)
            made = cast(Tensor, operators.apply(ctx, scope, "valid_tokens", {"x": mask}, {}, expr))
            ctx.shared["valid_tokens", column] = made
        found = made if found is None else both(ctx, scope, found, made, expr)
    assert found is not None
    return found


def as_mask(ctx: Context, scope: Scope, value: Value, expr: ast.Expr) -> Value:
    """The value of a mask, Bool, computed from the batch alone."""
    if not isinstance(value, Tensor) or value.type.dtype == "float":
        what = str(value.type) if isinstance(value, Tensor) else kind(value)
        return ctx.error(
            scope,
            "E0304",
            f"`mask` is true or false for each position, and this is {what}",
            expr.span,
            "compare with something: `batch.labels != -100`",
        )
    if not value.from_batch:
        return ctx.error(
            scope,
            "E0305",
            "a mask is made of the batch, and this one depends on a model",
            expr.span,
            notes=[
                "the number of positions that count must be known before the first forward;"
                " weight them instead: `token_weight = ...` or `select(...)`"
            ],
        )
    if value.type.dtype == "int":
        return operators.apply(ctx, scope, "not_equal", {"a": value}, {"b": 0.0}, expr)
    return value
