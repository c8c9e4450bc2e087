"""Declarations that nothing reads."""

from __future__ import annotations

from gkd_dsl.meaning.context import Context
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.syntax import ast

_KINDS: tuple[tuple[type, str, str], ...] = (
    (ast.LossDecl, "loss", "no stage minimises it, so it is not computed"),
    (ast.ProjectDecl, "projection", "nothing passes through it, so it is not made"),
    (ast.MetricDecl, "metric", "no stage evaluates it"),
    (ast.MaskDecl, "mask", "no loss counts by it"),
    (ast.Let, "value", "nothing reads it"),
    (ast.Param, "parameter", "nothing reads it, so setting it changes nothing"),
    (ast.ModelDecl, "model", "no loss reads it, so it is not loaded"),
    (ast.DataDecl, "data source", "no stage trains on it"),
    (ast.Use, "method", "none of its losses is minimised"),
    (ast.Pass, "pass", "no loss reads it, so it is not run"),
    (ast.Counter, "counter", "nothing reads it"),
    (ast.Policy, "policy", "no loss reads it"),
)


def warn(ctx: Context, scope: Scope) -> None:
    """Warn of each name of a spec that is declared and never used; `_name` is never used on purpose."""
    for definition in scope.names.values():
        if definition.used or definition.span is None or definition.name.startswith("_"):
            continue
        for kind, word, why in _KINDS:
            if isinstance(definition.decl, kind):
                ctx.warning(scope, "W0701", f"the {word} `{definition.name}` is never used", definition.span, why)
