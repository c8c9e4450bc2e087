"""The settings of the gemini backend, and what it cannot do."""

from __future__ import annotations

from gkd_dsl.graph.access import nodes
from gkd_dsl.graph.nodes import ModelNode, OpNode, StageNode
from gkd_dsl.meaning.context import Context, replace
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.settings import GEMINI
from gkd_dsl.syntax import ast

_CODE = "E0421"
# Of the two placements, each reads settings of its own.
_STATIC = ("shard_param_frac", "offload_optim_frac", "offload_param_frac")
_SCALE = (
    "initial_scale", "min_scale", "max_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis",
)  # fmt: skip
_SCALES = {"initial_scale": 2.0**16, "min_scale": 1.0, "max_scale": 2.0**32}
_AUTO = ("warmup_non_model_data_ratio", "steady_cuda_cap_ratio", "gpu_margin_mem_ratio")


def check(ctx: Context, scope: Scope, block: ast.Runtime) -> None:
    """Report settings of Gemini without it, and with it what it cannot run."""
    written = {stmt.name.text: stmt for stmt in block.body if isinstance(stmt, ast.Setting)}
    words = {name: _word(stmt.value) for name, stmt in written.items()}
    backend = written.get("backend")
    if backend is not None and words["backend"] not in ("local", "ddp", "gemini"):
        return
    if backend is None or words["backend"] != "gemini":
        for name, stmt in written.items():
            if name in GEMINI:
                ctx.error(
                    scope, _CODE, f"`{name}` is a setting of the gemini backend", stmt.span,
                    "nothing reads it", fix=replace(backend.value.span, "gemini") if backend is not None else None,
                )  # fmt: skip
        if words.get("precision") == "fp16":
            stmt = written["precision"]
            ctx.error(
                scope, _CODE, "fp16 needs a loss scale, which the gemini backend has alone", stmt.span,
                "bf16 needs none", fix=replace(stmt.value.span, "bf16"),
            )  # fmt: skip
        return
    policy = words.get("placement_policy", "static")
    for name in _AUTO if policy == "static" else _STATIC:
        if name in written:
            other = "auto" if policy == "static" else "static"
            ctx.error(
                scope, _CODE, f"`{name}` is read with `placement_policy = {other}` alone", written[name].span,
                f"this is {policy}",
            )  # fmt: skip
    if policy == "static" and _number(written, "offload_param_frac", 0.0) > 0:
        whole = [("shard_param_frac", 1.0), ("offload_optim_frac", 0.0)]
        missing = [f"`{name} = 1.0`" for name, default in whole if _number(written, name, default) < 1]
        if missing:
            ctx.error(
                scope, _CODE, "Gemini offloads parameters only where all are shared out and the optimiser is offloaded",
                written["offload_param_frac"].span, "nothing reads it", notes=[f"write {' and '.join(missing)} too"],
            )  # fmt: skip
    for name in _SCALE:
        if name in written and words.get("precision") != "fp16":
            ctx.error(
                scope, _CODE, f"`{name}` is read with `precision = fp16` alone", written[name].span,
                "no loss is scaled here",
            )  # fmt: skip
    if words.get("precision") == "fp16":
        _scales(ctx, scope, written)
    if words.get("precision") == "fp32":
        stmt = written["precision"]
        ctx.error(
            scope, _CODE, "Gemini holds parameters in half precision, with masters in fp32", stmt.span,
            "it has no fp32", fix=replace(stmt.value.span, "bf16"),
        )  # fmt: skip
    if words.get("device") == "cpu":
        stmt = written["device"]
        ctx.error(
            scope, _CODE, "Gemini needs a GPU", stmt.span, "the host is where it offloads to",
            fix=replace(stmt.value.span, "auto"),
        )  # fmt: skip
    for stage in nodes(ctx.builder.graph, StageNode):
        if policy == "auto" and stage.evaluate:
            ctx.error(
                scope, _CODE, f"stage `{stage.name}` evaluates before its first step", written["placement_policy"].span,
                "with this, Gemini runs nothing before its first whole step",
                fix=replace(written["placement_policy"].value.span, "static"),
            )  # fmt: skip
        if stage.optim.name != "adamw":
            ctx.error(
                scope, _CODE, f"Gemini has AdamW alone, and stage `{stage.name}` has {stage.optim.name}", backend.span,
                notes=["write `optim = adamw(lr = ...)` in the stage"],
            )  # fmt: skip
    for model in nodes(ctx.builder.graph, ModelNode):
        if model.info.build.lora is not None:
            ctx.error(
                scope, _CODE, f"Gemini has no LoRA, and `{model.name}` has an adapter", backend.span,
                "its chunks hold parameters that are all trained, or all frozen",
                notes=["the ddp backend trains adapters"], fix=replace(backend.value.span, "ddp"),
            )  # fmt: skip
    if any(node.op == "gradient" for node in nodes(ctx.builder.graph, OpNode)):
        ctx.error(
            scope, _CODE, "Gemini cannot take `gradient(...)` inside a step", backend.span,
            "a parameter is there once for the forward and once for the backward",
            notes=["the ddp backend can"], fix=replace(backend.value.span, "ddp"),
        )  # fmt: skip


def _scales(ctx: Context, scope: Scope, written: dict[str, ast.Setting]) -> None:
    """The least loss scale is at most the first, and the largest at least."""
    first, least, most = (_number(written, name, default) for name, default in _SCALES.items())
    if least <= first <= most:
        return
    name = next(name for name in ("initial_scale", "min_scale", "max_scale") if name in written)
    ctx.error(
        scope, _CODE, f"the loss scale starts at {first:g}, and has to be between {least:g} and {most:g}",
        written[name].span, "set here",
    )  # fmt: skip


def _number(written: dict[str, ast.Setting], name: str, default: float) -> float:
    """A setting as it is written; its default where it is not, or is no number."""
    value = written[name].value if name in written else None
    return value.value if isinstance(value, ast.Number) else default


def _word(value: ast.Expr) -> str:
    return value.id if isinstance(value, ast.Name) else value.value if isinstance(value, ast.String) else ""
