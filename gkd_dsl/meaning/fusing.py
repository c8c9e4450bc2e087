"""Whether the losses that a spec wants fused can be."""

from __future__ import annotations

from gkd_dsl.graph.access import nodes
from gkd_dsl.graph.nodes import OpNode
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.passes.fuse import fusions, refusals
from gkd_dsl.meaning.context import Context, replace
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.syntax import ast


def check(ctx: Context, scope: Scope, decl: ast.Runtime) -> None:
    """Refuse `fuse_logits = on` where a loss over a language model's logits cannot be fused, or there is none."""
    setting = next((s for s in decl.body if isinstance(s, ast.Setting) and s.name.text == "fuse_logits"), None)
    if setting is None or not ctx.diagnostics.ok or _word(setting) != "on":
        return
    plan = compile_plan(ctx.builder.graph)
    fix = replace(setting.value.span, "auto")
    ops = {node.key: node.op for node in nodes(ctx.builder.graph, OpNode)}
    reasons = {
        f"`{ops[key]}`, since {why}" for stage in plan.stages for key, why in refusals(stage).items() if key in ops
    }
    in_chunks = {s.name.text for s in decl.body if isinstance(s, ast.Placement) and _placed(s) == "gemini"}
    heads = {head.model for stage in plan.stages for group in fusions(stage) for head in group.teachers}
    reasons |= {f"the head of `{name}` is in Gemini's chunks" for name in heads & in_chunks}
    for reason in sorted(reasons):
        ctx.error(
            scope, "E0433", f"a loss over logits cannot be fused: {reason}", setting.span, "wanted here",
            notes=["`auto` fuses what can be and runs the others plain"], fix=fix,
        )  # fmt: skip
    if not reasons and not any(fusions(stage) for stage in plan.stages):
        ctx.error(
            scope, "E0433", "no loss of this spec is over the logits of a language model", setting.span,
            "nothing to fuse", fix=fix,
        )  # fmt: skip


def _placed(placement: ast.Placement) -> str | None:
    return next((_word(setting) for setting in placement.body if setting.name.text == "placement"), None)


def _word(setting: ast.Setting) -> str | None:
    value = setting.value
    return value.id if isinstance(value, ast.Name) else value.value if isinstance(value, ast.String) else None
