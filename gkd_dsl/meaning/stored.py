"""`teacher t = cached("dir")`: a model of which only stored outputs are known."""

from __future__ import annotations

import os
from dataclasses import replace as changed
from pathlib import Path

from gkd_dsl.graph.access import nodes
from gkd_dsl.graph.nodes import AttrValue, TapNode
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.plan import StagePlan
from gkd_dsl.graph.stored import forwards_of, refusals, student_task, taps_of
from gkd_dsl.meaning.context import Context, replace
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import Model, Text, Unknown, kind
from gkd_dsl.models import stored
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.stored import Stored
from gkd_dsl.places import expanded
from gkd_dsl.sources import task_of
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span

CODE = "E0437"


def declared(ctx: Context, scope: Scope, expr: ast.Call) -> ModelInfo | None:
    """What the manifests of a folder say of their model; None where something was reported."""
    alone = len(expr.args) == 1 and expr.args[0].name is None
    value = ctx.evaluate(scope, expr.args[0].value) if alone else None
    if isinstance(value, Unknown):
        return None
    if not isinstance(value, Text):
        what = f", not {kind(value)}" if value is not None else ", and nothing else"
        ctx.error(scope, "E0508", f"`cached` takes the folder of stored outputs{what}", expr.span,
                  'write `cached("outputs/t")`')  # fmt: skip
        return None
    folder = (scope.root or ctx.root) / expanded(value.value)
    try:
        info = stored.read(folder, value.value).info
    except ModelError as error:
        near = f'"{error.near[0]}"' if error.near else None
        at = expr.args[0].span
        ctx.error(scope, CODE, error.reason, at, error.hint, fix=replace(at, near) if near else None)
        return None
    return changed(info, build=changed(info.build, stored=_from_root(ctx, folder, value.value)))


def base(ctx: Context, scope: Scope, model: Model, function: str, span: Span) -> bool:
    """Whether another model can start from a model; one of which only outputs are known has nothing to start from."""
    if model.info.build.stored is None:
        return True
    ctx.error(
        scope, CODE, f"`{function}` starts from a model, and of `{model.name}` only outputs are stored", span,
        "it has no weights and no tokenizer", notes=["name the folder of the model itself"],
    )  # fmt: skip
    return False


def student(ctx: Context, scope: Scope, decl: ast.ModelDecl, info: ModelInfo) -> bool:
    """Refuse a student of which only outputs are known. True where all is well."""
    if info.build.stored is None or decl.role != "student":
        return True
    ctx.error(
        scope, CODE, f"`{decl.name.text}` is a student, and of it only outputs are stored", decl.value.span,
        "nothing there can be trained",
    )  # fmt: skip
    return False


def is_stored(ctx: Context, name: str) -> bool:
    """Whether of a model of the spec only outputs are known."""
    return name in ctx.models and ctx.models[name].info.build.stored is not None


def places(ctx: Context, runtime: tuple[tuple[str, AttrValue], ...]) -> tuple[tuple[str, AttrValue], ...]:
    """The placements of such models, as a runtime block would write them, without what is written."""
    said = dict(runtime)
    found: dict[str, AttrValue] = {}
    for name, model in ctx.models.items():
        folder = model.info.build.stored
        if folder is not None:
            found |= {f"{name}.placement": "cached", f"{name}.cache": folder}
            found[f"{name}.top_k"] = max((s.top_k for s in _read(ctx, folder).stages.values()), default=0)
    return tuple((name, value) for name, value in found.items() if name not in said)


def check(ctx: Context, scope: Scope, file: ast.File) -> None:
    """Refuse what is not stored, and placements of what has no weights. The graph is complete here."""
    names = [name for name in ctx.models if is_stored(ctx, name)]
    if not names:
        return
    for block in file.items:
        for stmt in block.body if isinstance(block, ast.Runtime) else ():
            if isinstance(stmt, ast.Placement) and stmt.name.text in names:
                _placed(ctx, scope, stmt)
    if not ctx.diagnostics.ok:
        return
    plan = compile_plan(ctx.builder.graph)
    for name in names:
        known = _read(ctx, str(ctx.models[name].info.build.stored))
        for stage in plan.stages:
            _stage(ctx, scope, name, known, stage, _tail(file, name))


def _stage(ctx: Context, scope: Scope, name: str, known: Stored, plan: StagePlan, tail: str) -> None:
    model, at = ctx.models[name], ctx.models[name].defined
    found = known.stage(plan.name)
    if found is None and (forwards_of(plan, name) or any(node.name == name for node in plan.models)):
        ctx.error(
            scope, CODE, f"no outputs of `{name}` are stored for stage `{plan.name}`", at, "declared here",
            notes=[f"{model.info.location} has those for {', '.join(known.stages)}; "
                   "the folder of one stage serves all"],
        )  # fmt: skip
        return
    if found is None:
        return
    why = refusals([plan], name, tasks=[_task(plan)], top_k=found.top_k, tail=tail)
    for reason in dict.fromkeys(why):
        ctx.error(
            scope, "E0430", f"the outputs of `{name}` cannot be stored: {reason}", at, "only outputs of it are known"
        )
    for path in taps_of(plan, name):
        if path.key not in found.keys:
            ctx.error(
                scope, CODE, f"`{name}.{path}` is not among the stored outputs", _tap(ctx, name, path.key) or at,
                "read here", notes=[f"stored for stage `{plan.name}`: {', '.join(found.taps)}"],
            )  # fmt: skip
    if found.stored < found.rows:
        ctx.error(
            scope, CODE, f"of `{name}` {found.stored} of {found.rows} rows are stored", at, "declared here",
            notes=["go on with `gkd cache --resume` where it was begun"],
        )  # fmt: skip
    elif not found.held_out and any(forward.model == name for item in plan.metrics for forward in item.forwards):
        ctx.error(
            scope, CODE, f"a metric of stage `{plan.name}` reads `{name}`, and no rows held out are stored", at,
            "declared here", notes=["`gkd cache` stores them where a metric reads the model"],
        )  # fmt: skip


def _placed(ctx: Context, scope: Scope, stmt: ast.Placement) -> None:
    name = stmt.name.text
    for setting in stmt.body:
        place = setting.value.id if isinstance(setting.value, ast.Name) else None
        if setting.name.text == "placement" and place == "cached":
            continue
        if setting.name.text in ("placement", "cache", "top_k"):
            ctx.error(
                scope, CODE, f"of `{name}` only outputs are known, and `{setting.name.text}` is for a model",
                setting.span, "its folder says it", labels=[],
            )  # fmt: skip


def _tail(file: ast.File, name: str) -> str:
    for block in file.items:
        for stmt in block.body if isinstance(block, ast.Runtime) else ():
            if isinstance(stmt, ast.Placement) and stmt.name.text == name:
                for setting in stmt.body:
                    if setting.name.text == "tail" and isinstance(setting.value, ast.Name):
                        return setting.value.id
    return "bucket"


def _tap(ctx: Context, model: str, key: str) -> Span | None:
    for node in nodes(ctx.builder.graph, TapNode):
        if node.model == model and node.path.key == key and node.locations:
            return node.locations[0].span
    return None


def _read(ctx: Context, folder: str) -> Stored:
    return stored.read(ctx.root / folder, folder)


def _task(plan: StagePlan) -> str:
    head = student_task(plan)
    return task_of(dict(plan.stage.source.args), head) if plan.stage.source is not None else head


def _from_root(ctx: Context, folder: Path, written: str) -> str:
    """A folder as a runtime block of the spec names it: in another file paths start elsewhere."""
    if (ctx.root / expanded(written)).resolve() == folder.resolve():
        return written
    return os.path.relpath(folder.resolve(), ctx.root.resolve())
