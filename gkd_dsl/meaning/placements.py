"""Whether the models of the runtime block can live where it places them."""

from __future__ import annotations

from gkd_dsl.graph.nodes import ReplaceBlock
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.plan import SpecPlan, StagePlan
from gkd_dsl.graph.stored import refusals, student_task
from gkd_dsl.meaning import stored
from gkd_dsl.meaning.context import Context, replace
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.sources import task_of
from gkd_dsl.syntax import ast

_STREAMED = ("offload", "disk", "gemini")
_IN_CHUNKS = ("shard_param_frac", "offload_param_frac")


def check(ctx: Context, scope: Scope, decl: ast.Runtime) -> None:
    """Refuse placements that the stages do not allow. The graph is complete here."""
    placed = [s for s in decl.body if isinstance(s, ast.Placement) and not stored.is_stored(ctx, s.name.text)]
    blocks = [(stmt, {setting.name.text: setting for setting in stmt.body}) for stmt in placed]
    wanted = [(stmt, settings) for stmt, settings in blocks if _word(settings, "placement") not in (None, "resident")]
    backend = _word({stmt.name.text: stmt for stmt in decl.body if isinstance(stmt, ast.Setting)}, "backend")
    for stmt, settings in blocks:
        _folder(ctx, scope, stmt, settings)
        _chunks(ctx, scope, stmt, settings, backend)
    if not wanted or not ctx.diagnostics.ok:
        return
    plan = compile_plan(ctx.builder.graph)
    for stmt, settings in wanted:
        place = _word(settings, "placement")
        if place == "cached":
            _cached(ctx, scope, stmt, settings, plan)
        elif place in _STREAMED:
            _streamed(ctx, scope, stmt, settings, plan)


def _folder(ctx: Context, scope: Scope, stmt: ast.Placement, settings: dict[str, ast.Setting]) -> None:
    """A stored model has a folder, and a folder is for a stored model."""
    name, cached = stmt.name.text, _word(settings, "placement") == "cached"
    cache = settings.get("cache")
    folder = cache is not None and isinstance(cache.value, ast.String) and cache.value.value not in ("off", "auto", "")
    if cached and not folder:
        at = cache.value.span if cache is not None else settings["placement"].span
        fix = replace(cache.value.span, '"cache"') if cache is not None else None
        ctx.error(
            scope, "E0431", f"`{name}` is placed as cached, and no folder holds its outputs", at,
            'write `cache = "..."`', fix=fix,
        )  # fmt: skip
    elif folder and not cached and cache is not None:
        ctx.error(
            scope, "E0431", f"a folder of stored outputs is for `placement = cached`, and `{name}` has another place",
            cache.value.span, "not read", fix=replace(cache.value.span, "auto"),
        )  # fmt: skip


def _chunks(
    ctx: Context, scope: Scope, stmt: ast.Placement, settings: dict[str, ast.Setting], backend: str | None
) -> None:
    """Chunks are the gemini backend's, and their settings are for models in chunks."""
    name = stmt.name.text
    written = [settings[key] for key in _IN_CHUNKS if key in settings]
    if _word(settings, "placement") != "gemini":
        for setting in written:
            ctx.error(
                scope, "E0421", f"`{setting.name.text}` is read with `placement = gemini` alone", setting.span,
                f"`{name}` has another place",
            )  # fmt: skip
    elif backend != "gemini":
        ctx.error(
            scope, "E0421", f"`{name}` is placed in Gemini's chunks, and the backend is {backend or 'local'}",
            settings["placement"].span, "chunks are the gemini backend's", notes=["or write `backend = gemini`"],
            fix=replace(settings["placement"].value.span, "offload") if not written else None,
        )  # fmt: skip
    elif len(written) == 2:
        shard, offload = (setting.value for setting in written)
        if not isinstance(shard, ast.Number) or not isinstance(offload, ast.Number):
            return
        if shard.value < 1 and offload.value > 0:
            ctx.error(
                scope, "E0421", "Gemini offloads parameters only where all of them are shared out", written[1].span,
                f"`shard_param_frac` is {shard.value:g}", fix=replace(offload.span, "0.0"),
            )  # fmt: skip


def _cached(ctx: Context, scope: Scope, stmt: ast.Placement, settings: dict[str, ast.Setting], plan: SpecPlan) -> None:
    asked = settings["top_k"].value if "top_k" in settings else None
    top_k = int(asked.value) if isinstance(asked, ast.Number) else None
    tasks = [_task(stage) for stage in plan.stages]
    why = refusals(plan.stages, stmt.name.text, tasks=tasks, top_k=top_k, tail=_word(settings, "tail") or "bucket")
    for reason in dict.fromkeys(why):
        ctx.error(
            scope, "E0430", f"the outputs of `{stmt.name.text}` cannot be stored: {reason}",
            settings["placement"].span, "placed here", notes=_help(reason),
        )  # fmt: skip


def _help(reason: str) -> list[str]:
    if "largest" in reason or reason.startswith("the metric"):
        return ["`top_k = 0` stores all logits"]
    if "renormalise" in reason:
        return ["`tail = bucket` keeps the mass of the other classes"]
    return ["with `placement = resident` it is run in each step"]


def _streamed(
    ctx: Context, scope: Scope, stmt: ast.Placement, settings: dict[str, ast.Setting], plan: SpecPlan
) -> None:
    name, chunks = stmt.name.text, _word(settings, "placement") == "gemini"
    how = "held in Gemini's chunks" if chunks else "streamed by block"
    made_from = _bases(plan, name) if chunks else set()
    in_chunks = any(key in settings for key in _IN_CHUNKS)
    for stage in plan.stages:
        forwards = [*stage.forwards, *(forward for item in stage.metrics for forward in item.forwards)]
        reason = None
        if any(target.kind == "model" and target.name == name for target in stage.stage.trains):
            reason = f"stage `{stage.name}` trains it"
        elif any(isinstance(c, ReplaceBlock) and name in (c.model, f.model) for f in forwards for c in f.changes):
            reason = f"stage `{stage.name}` exchanges blocks with another model"
        elif any(forward.grad and forward.model == name for forward in forwards):
            reason = f"stage `{stage.name}` takes a gradient through it"
        elif base := next((t.name for t in stage.stage.trains if t.kind == "model" and t.name in made_from), None):
            reason = f"it is made from `{base}`, which stage `{stage.name}` trains"
        if reason is not None:
            ctx.error(
                scope, "E0432", f"`{name}` cannot be {how}: {reason}", settings["placement"].span,
                "placed here", fix=replace(settings["placement"].value.span, "resident") if not in_chunks else None,
            )  # fmt: skip
            return


def _bases(plan: SpecPlan, name: str) -> set[str]:
    """The models of a spec that a model starts from. Not saved, it is made anew when a run goes on."""
    infos = {node.name: node.info for stage in plan.stages for node in stage.models}
    found: set[str] = set()
    info = infos.get(name)
    while info is not None and (base := info.build.base) is not None:
        found.add(base)
        info = infos.get(base, info.build.origin)
    return found


def _task(stage: StagePlan) -> str:
    head = student_task(stage)
    return task_of(dict(stage.stage.source.args), head) if stage.stage.source is not None else head


def _word(settings: dict[str, ast.Setting], name: str) -> str | None:
    value = settings[name].value if name in settings else None
    if isinstance(value, ast.Name):
        return value.id
    return value.value if isinstance(value, ast.String) else None
