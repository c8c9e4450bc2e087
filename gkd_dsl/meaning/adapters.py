"""The `adapter` of a model's block: `adapter = peft("folder")`, merged into the weights when they are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gkd_dsl.meaning.context import Context
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import Text
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.syntax import ast

_CONFIG = "adapter_config.json"


def is_peft(expr: ast.Expr) -> bool:
    """Whether an adapter is a saved one of the library peft."""
    return isinstance(expr, ast.Call) and isinstance(expr.func, ast.Name) and expr.func.id == "peft"


def merged(ctx: Context, scope: Scope, info: ModelInfo, expr: ast.Expr) -> ModelInfo | None:
    """What is known of the model with the adapter; None where something was reported."""
    assert isinstance(expr, ast.Call)
    value = ctx.evaluate(scope, expr.args[0].value) if len(expr.args) == 1 and expr.args[0].name is None else None
    if not isinstance(value, Text):
        ctx.error(scope, "E0508", "`peft` takes the folder of a saved adapter", expr.span, 'write `peft("folder")`')
        return None
    if info.build.kind != "hf":
        ctx.error(scope, "E0508", "an adapter belongs to saved weights", expr.span, "the model is not made by `hf`")
        return None
    folder = Path(scope.root or ".") / value.value
    if not (folder / _CONFIG).is_file():
        ctx.error(
            scope, "E0501", f"there is no adapter in `{value.value}`", expr.args[0].span, f"no {_CONFIG} there",
            notes=["paths start at the folder of the spec"],
        )  # fmt: skip
        return None
    return replace(info, build=replace(info.build, adapter=str(folder)))
