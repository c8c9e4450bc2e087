"""Methods checked on their own, over models made up for the purpose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import product

from gkd_dsl.diagnostics import Diagnostic, Diagnostics
from gkd_dsl.graph.build import GraphBuilder
from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.meaning import methods, parameters, stages
from gkd_dsl.meaning.context import Context
from gkd_dsl.meaning.scope import Definition, Scope
from gkd_dsl.meaning.values import Instance, Items, Model, Unknown, Value
from gkd_dsl.models.info import Build, ModelInfo, Task
from gkd_dsl.syntax import ast

_SIZES = {"H": 768, "V": 30522, "N": 12, "A": 12, "KV": 12, "D": 64, "F": 3072}
_TASKS: tuple[Task, ...] = ("classification", "masked_lm", "encoder")


def _specimen(task: Task, layers: int) -> ModelInfo:
    sizes = {**_SIZES, "N": layers}
    if task == "classification":
        sizes["C"] = 2
    return ModelInfo(
        "a BERT-like model", None, "bert", "BertModel", task, tuple(sizes.items()),
        tuple((name, "specimen") for name in sizes), Build("hf", None), has_pooler=True,
    )  # fmt: skip


def check_methods(ctx: Context, scope: Scope, found: list[ast.MethodDecl]) -> None:
    """Check each method over a twelve-layer teacher (two where it counts them) and a six-layer student, equally wide.

    A method may want classifiers or language models: the first kind that it fits decides, and where it fits
    none, what is wrong with the first kind is reported.
    """
    ctx.methods_only = True
    for decl in found:
        first: list[Diagnostic] | None = None
        for task, layers in product(_TASKS, (6, 12)):
            problems = _try(ctx, scope, decl, task, layers)
            if not any(problem.severity == "error" for problem in problems):
                first = problems
                break
            first = problems if first is None else first
        for diagnostic in first or []:
            ctx.diagnostics.add(diagnostic)


def _try(ctx: Context, outer: Scope, decl: ast.MethodDecl, task: Task, layers: int) -> list[Diagnostic]:
    held = (ctx.diagnostics, ctx.builder, ctx.models, ctx.stages, ctx.shared, ctx.deferred)
    ctx.deferred = []
    ctx.policies, ctx.rewards = {}, {}
    ctx.diagnostics, ctx.builder, ctx.models, ctx.stages, ctx.shared = Diagnostics(), GraphBuilder(), {}, [], {}
    try:
        inner = Scope(outer.source, "", (), methods.surroundings(outer), outer.root)
        counted = set(_counted(decl.body))
        for formal in decl.formals:
            _formal(ctx, inner, formal, task, layers, formal.name.text in counted)
        value = methods.instantiate(ctx, inner, decl, decl.name.text, decl.span)
        if isinstance(value, Instance):
            for stage in value.stages:
                stages.elaborate(ctx, inner, stage)
        while ctx.deferred:
            ctx.deferred.pop(0)()
        return list(ctx.diagnostics)
    finally:
        ctx.diagnostics, ctx.builder, ctx.models, ctx.stages, ctx.shared, ctx.deferred = held


def _counted(tree: object) -> Iterator[str]:
    """The names that a method counts by `teachers(ts)`."""
    match tree:
        case ast.Call(func=ast.Name(id="teachers"), args=args):
            yield from (arg.value.id for arg in args if isinstance(arg.value, ast.Name))
        case ast.Node():
            for field in fields(tree):
                yield from _counted(getattr(tree, field.name))
        case tuple():
            for item in tree:
                yield from _counted(item)


def _formal(ctx: Context, inner: Scope, formal: ast.Formal, task: Task, layers: int, several: bool) -> None:
    name = formal.name.text
    if formal.role is not None:
        info = _specimen(task, layers if formal.role == "student" else 12)
        models = []
        for each in (name, f"{name}_2") if several else (name,):
            ctx.builder.add(ModelNode(f"model/{each}", each, formal.role, info))
            ctx.models[each] = Model(each, info, formal.role, f"{each}/forward", formal.name.span)
            models.append(ctx.models[each])
        held: Value = Items(tuple(models)) if several else models[0]
        inner.names[name] = Definition(name, formal, formal.name.span, held, used=True)
        return
    value: Value | None = None
    if formal.type is not None and not parameters.known_type(ctx, inner, formal.type):
        value = Unknown()
    elif formal.default is not None and formal.type is not None:
        value = parameters.fit(
            ctx, inner, name, ctx.evaluate(inner, formal.default), formal.type, formal.within, formal.default.span
        )
    inner.names[name] = Definition(name, formal, formal.name.span, value or Unknown(), used=True)
