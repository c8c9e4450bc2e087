"""Checks of a whole stage: does every loss train something, do models and data fit together."""

from __future__ import annotations

from dataclasses import fields

import networkx as nx

from gkd_dsl import schedules
from gkd_dsl.diagnostics import Edit, Fix, Label
from gkd_dsl.graph.nodes import (
    BatchNode,
    ForwardNode,
    LossNode,
    OpNode,
    ProjectNode,
    SourceSpec,
    StageNode,
    TrainTarget,
)
from gkd_dsl.meaning import mismatch
from gkd_dsl.meaning.context import Context, replace
from gkd_dsl.meaning.reach import misses
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.training import Training
from gkd_dsl.meaning.values import Model, NamedLoss
from gkd_dsl.models.fields import positions
from gkd_dsl.models.tokenizer import same_ids
from gkd_dsl.sources import columns_of, label_count
from gkd_dsl.syntax import ast
from gkd_dsl.text import Span
from gkd_dsl.types import LossType


def reach(
    ctx: Context,
    scope: Scope,
    decl: ast.Stage,
    terms: list[tuple[schedules.Schedule, NamedLoss]],
    trained: Training,
) -> None:
    """Every minimised loss reaches something that is trained, and every trained thing is reached."""
    minimize = next(stmt for stmt in decl.body if isinstance(stmt, ast.Minimize))
    reached: frozenset[str] = frozenset()
    for weight, loss in terms:
        reached |= loss.carries
        if schedules.is_zero(weight):
            # A method offers its variants as losses of weight 0, by its parameters: nothing is doubtful there.
            if "/" not in loss.name and not ctx.methods_only:
                ctx.warning(
                    scope, "W0702", f"`{loss.name}` has the weight 0 in this stage",
                    mention(minimize.value, loss.name, minimize.value.span),
                    "it is not computed",
                )  # fmt: skip
            continue
        short = misses(ctx, loss.key, trained)
        if any(trained.trains(name) for name in loss.carries) and not short:
            continue
        teachers = [name for name in sorted(loss.carries) if name in ctx.models]
        notes: list[str] = []
        fix = None
        if short and any(trained.trains(tap.model) for tap in short):
            ends = ", ".join(dict.fromkeys(f"`{tap.model}.{tap.path}`" for tap in short))
            notes = [f"its gradient ends at {ends}, before the parts that this stage trains"]
        elif teachers and not trained.said and ctx.models[teachers[0]].role == "teacher":
            name = teachers[0]
            notes = [f"`{name}` is a teacher, which is not trained unless the stage says so"]
            fix = _train(minimize, name, trained)
        elif teachers:
            notes = [f"its gradient reaches {', '.join(teachers)}, which this stage does not train"]
        else:
            notes = ["both of its sides are detached"]
        node = ctx.builder.node(loss.key)
        at = mention(minimize.value, loss.name, minimize.value.span)
        where = node.locations[0].span if node.locations and not scope.uses else minimize.value.span
        labels = [Label(where, "defined here", primary=False)] if where != minimize.value.span else []
        ctx.error(
            scope, "E0340", f"`{loss.name}` reaches nothing that this stage trains", at,
            "its gradient goes nowhere", labels=labels, notes=notes, fix=fix,
        )  # fmt: skip
    if not trained.said:
        return
    for target in trained.targets:
        name = target.name if target.kind == "model" else f"project/{target.name}"
        if name not in reached:
            listed = [written for stmt in decl.body if isinstance(stmt, ast.Train) for written in stmt.targets]
            at = next((w.span for w in listed if w.span.text.split(".")[0] == target.name), listed[0].span)
            ctx.warning(
                scope, "W0703", f"`{target.name}` is trained in this stage, but no loss reaches it", at,
                "it stays as it is",
            )  # fmt: skip


def mention(expr: ast.Expr, name: str, otherwise: Span) -> Span:
    """Where an objective names a loss: `hard`, `k.soft`, `att[3]`."""
    plain = name.split(".")[0].replace("/", ".")
    waiting: list[object] = [expr]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Name | ast.Attr) and node.span.text == plain:
            return node.span
        if isinstance(node, ast.Node):
            waiting += [getattr(node, field.name) for field in fields(node)]
        elif isinstance(node, tuple):
            waiting += node
    return otherwise


def held_out(ctx: Context, scope: Scope, decl: ast.Stage, source: SourceSpec | None) -> None:
    """A stage that evaluates has data that it does not train on."""
    evaluate = next((stmt for stmt in decl.body if isinstance(stmt, ast.Evaluate)), None)
    if evaluate is None or source is None or "held_out" not in dict(source.args) or source.arg("held_out"):
        return
    where = source.location.span if source.location is not None else None
    labels = [Label(where, "holds out nothing", primary=False)] if where is not None and not scope.uses else []
    ctx.error(
        scope, "E0419", f"`{source.name}` holds out no rows to evaluate on", evaluate.span, "evaluated here",
        labels=labels, notes=["give it `held_out = 10%`, or a file of its own: `held_out = \"test.csv\"`"],
    )  # fmt: skip


def _train(minimize: ast.Minimize, name: str, trained: Training) -> Fix | None:
    """The fix that trains a teacher beside what is trained already; None where that has no name of its own."""
    others = [target.name.split(".")[0] for target in trained.targets]
    if any("/" in other for other in others) or any(target.part is not None for target in trained.targets):
        return None
    listed = ", ".join(dict.fromkeys((*others, name)))
    span = minimize.span
    line_start = span.start - (span.column - 1)
    indent = span.source.text[line_start : span.start]
    # In a block of one line the statement stands right before.
    place, indent = (line_start, indent) if not indent.strip() else (span.start, "")
    return Fix(f"train `{name}` in this stage", (Edit(Span(span.source, place, place), f"{indent}train {listed}\n"),))


def batch(ctx: Context, scope: Scope, decl: ast.Stage, node: StageNode, source: SourceSpec | None) -> None:
    """The batch suits every model that runs, and gives the columns that the stage reads."""
    below = nx.ancestors(ctx.builder.graph, node.key)
    forwards = [ctx.builder.node(key) for key in sorted(below)]
    names = sorted({f.model for f in forwards if isinstance(f, ForwardNode)})
    models = [ctx.models[name] for name in names]
    _vocabularies(ctx, scope, decl, models)
    _teacher_projections(ctx, scope, decl, node, below)
    if source is None:
        return
    head = next((m for m in models if m.role == "student"), models[0] if models else None)
    if head is None:
        return
    shape = ctx.source_kinds[source.name]
    args = dict(source.args)
    _lengths(ctx, scope, decl, node, source, models)
    task = next((m.info.task for m in models if m.info.task != "encoder"), head.info.task)
    columns = columns_of(shape, args, task)
    for key in sorted(below):
        read = ctx.builder.node(key)
        if not isinstance(read, BatchNode):
            continue
        column = read.column
        if column not in columns:
            place = source.location.span if source.location is not None else None
            labels = [Label(place, "this source", primary=False)] if place is not None and not scope.uses else []
            ctx.error(
                scope, "E0506", f"stage `{node.name}` reads `batch.{column}`, and `{source.name}` has none",
                decl.name.span, "needs it", labels=labels,
                notes=['say which column holds the labels: `label = "..."`'] if column == "labels" else [],
            )  # fmt: skip
        elif columns[column] != read.type:
            ctx.error(
                scope, "E0506", f"`batch.{column}` of `{source.name}` is {columns[column]}, and stage `{node.name}` "
                f"reads {read.type}", decl.name.span,
            )  # fmt: skip
    read_columns = {ctx.builder.node(key).column for key in below if key.startswith("batch/")}  # type: ignore[attr-defined]
    if "labels" in read_columns and columns.get("labels") is not None and len(columns["labels"].dims) == 1:
        _labels(ctx, scope, decl, node, source, models, below)


def _lengths(
    ctx: Context, scope: Scope, decl: ast.Stage, node: StageNode, source: SourceSpec, models: list[Model]
) -> None:
    """A text has no more tokens than every model has positions for."""
    said = node.max_length if node.max_length is not None else source.arg("max_length")
    known = [
        (count, model) for model in models if not model.info.formal and (count := positions(model.info)) is not None
    ]
    if not isinstance(said, int) or not known:
        return
    most, model = min(known, key=lambda pair: pair[0])
    if said <= most:
        return
    setting = next((s for s in decl.body if isinstance(s, ast.Setting) and s.name.text == "max_length"), None)
    if setting is not None and node.max_length is not None:
        span, fix = setting.value.span, replace(setting.value.span, str(most))
    else:
        span, fix = (source.location.span if source.location is not None else decl.name.span), None
    ctx.error(
        scope, "E0403", f"`max_length` is {said}, and `{model.name}` has positions for {most} tokens", span,
        f"at most {most}", fix=fix,
    )  # fmt: skip


def _vocabularies(ctx: Context, scope: Scope, decl: ast.Stage, models: list[Model]) -> None:
    """All models of a stage read the same token ids, so their tokenizers are the same."""
    owner = next((m for m in models if m.role == "student"), models[0] if models else None)
    if owner is None or owner.info.vocabulary is None:
        return
    for model in models:
        other = model.info.vocabulary
        if model is owner or other is None or model.info.formal:
            continue
        same = same_ids(owner.info.vocabulary, other)
        if same is False:
            labels = [
                Label(m.defined, f"a tokenizer of {m.info.vocabulary.size} tokens", primary=False)
                for m in (model, owner)
                if m.defined is not None and m.info.vocabulary is not None and not scope.uses
            ]
            ctx.error(
                scope, "E0321", f"`{model.name}` and `{owner.name}` have different tokenizers", decl.name.span,
                "both read the same token ids here", labels=labels,
                notes=[
                    f"the batch is tokenised by `{owner.name}`; to `{model.name}` the ids would mean other words",
                    "choose a teacher and a student of one tokenizer",
                ],
            )  # fmt: skip


def _labels(
    ctx: Context,
    scope: Scope,
    decl: ast.Stage,
    node: StageNode,
    source: SourceSpec,
    models: list[Model],
    below: set[str],
) -> None:
    """The labels of the data fit the classes of the heads that meet them."""
    # A stage of a method stands in a file elsewhere; the rows are found from the folder of the spec.
    count = label_count(ctx.source_kinds[source.name], dict(source.args), ctx.root_scope.root)
    if count is None:
        return
    met = _models_that_meet_labels(ctx, below)
    for model in models:
        classes = model.info.size("C")
        if model.name in met and classes is not None and classes < count:
            labels = (
                [Label(model.defined, f"{classes} classes", primary=False)] if model.defined and not scope.uses else []
            )
            ctx.error(
                scope, "E0323", f"`{source.name}` has {count} labels, and `{model.name}` tells {classes} apart",
                decl.name.span, "they meet here", labels=labels, notes=[f"write `num_labels = {count}`"],
                fix=mismatch.as_many(ctx, scope, model.name, str(count)),
            )  # fmt: skip


def _models_that_meet_labels(ctx: Context, below: set[str]) -> set[str]:
    met: set[str] = set()
    for key in below:
        node = ctx.builder.node(key)
        if isinstance(node, OpNode) and node.op == "cross_entropy":
            for above in nx.ancestors(ctx.builder.graph, ctx.builder.inputs(key)["student"]):
                if above.startswith("model/"):
                    met.add(above.removeprefix("model/"))
    return met


def _teacher_projections(ctx: Context, scope: Scope, decl: ast.Stage, stage: StageNode, below: set[str]) -> None:
    """A projection that trains and only ever stands on the teacher's side can make both sides constant."""
    graph = ctx.builder.graph
    known: dict[str, bool] = {}
    live = _weighed(ctx, stage)
    warned: set[Span | None] = set()
    for key in sorted(below):
        node = ctx.builder.node(key)
        if not isinstance(node, ProjectNode) or TrainTarget("project", node.name) not in stage.trains:
            continue
        uses = [consumer for _, consumer in graph.out_edges(key) if consumer in below]
        place = node.locations[0].span if node.locations else None
        if place in warned or not uses or not all(_detached(ctx, use, known) for use in uses):
            continue
        if any(_anchors(ctx, key, known) for use in uses for key in nx.descendants(graph, use) & live):
            continue
        warned.add(place)
        where = decl.name.span if place is None or scope.uses else place
        ctx.warning(
            scope, "W0704", f"`{node.name.split('.')[0]}` projects the teacher's side, and nothing anchors it",
            where, "it can learn a constant, which both sides then match",
            notes=["give it a loss of its own, such as a cross entropy on its output, or freeze it"],
        )  # fmt: skip


def _anchors(ctx: Context, key: str, known: dict[str, bool]) -> bool:
    """Whether a loss keeps a projection from a constant: it knows the labels, or no model has a part in it."""
    node = ctx.builder.node(key)
    if not isinstance(node, OpNode) or not isinstance(node.type, LossType):
        return False
    return node.op == "cross_entropy" or _constant(ctx, key, known)


def _weighed(ctx: Context, stage: StageNode) -> set[str]:
    """What the losses of a stage are made of, without those of weight 0."""
    found: set[str] = set()
    inputs = ctx.builder.inputs(stage.key)
    for slot, weight in enumerate(stage.weights):
        loss = ctx.builder.node(inputs[str(slot)])
        if schedules.is_zero(weight) or not isinstance(loss, LossNode):
            continue
        for part, atom in ctx.builder.inputs(loss.key).items():
            if not schedules.is_zero(loss.coefficients[int(part)]):
                found |= {atom, *nx.ancestors(ctx.builder.graph, atom)}
    return found


def _detached(ctx: Context, use: str, known: dict[str, bool]) -> bool:
    """Whether no gradient goes through what a projection is applied to."""
    source = ctx.builder.inputs(use).get("x")
    return source is not None and _constant(ctx, source, known)


def _constant(ctx: Context, key: str, known: dict[str, bool]) -> bool:
    if key not in known:
        node = ctx.builder.node(key)
        known[key] = isinstance(node, BatchNode) or (
            isinstance(node, OpNode)
            and (
                node.op == "detach"
                or all(
                    _constant(ctx, source, known) for slot, source in ctx.builder.inputs(key).items() if slot != "block"
                )
            )
        )
    return known[key]
