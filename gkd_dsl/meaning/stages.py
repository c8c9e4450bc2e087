"""Stages: what is minimised, what is trained, on which data, for how long."""

from __future__ import annotations

from gkd_dsl import schedules
from gkd_dsl.diagnostics import Label
from gkd_dsl.graph.nodes import EvaluateSpec, OptimSpec, SourceSpec, StageNode
from gkd_dsl.meaning import counters, gradients, imports, policies, settings, stage_checks
from gkd_dsl.meaning.context import Context
from gkd_dsl.meaning.declare import named_loss, value_of
from gkd_dsl.meaning.evaluate import as_loss
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.training import Training, training
from gkd_dsl.meaning.values import (
    Atom,
    Instance,
    Length,
    Loss,
    Metric,
    NamedLoss,
    Num,
    Numbers,
    Optimiser,
    Source,
    Unknown,
    Value,
    kind,
)
from gkd_dsl.syntax import ast

_MOST = 1024
"""Stages of one family."""


def run(ctx: Context, scope: Scope, decl: ast.Run) -> None:
    """`run tb`: the stages that a used method carries, in their order."""
    value = ctx.evaluate(scope, ast.Name(decl.name.span, decl.name.text))
    if isinstance(value, Unknown):
        return
    if not isinstance(value, Instance):
        ctx.error(scope, "E0415", f"`run` takes a used method, and this is {kind(value)}", decl.name.span)
        return
    if not value.stages:
        ctx.error(
            scope, "E0415", f"`{value.name}` carries no stages", decl.name.span, "write a `stage` that minimises it"
        )
        return
    for stage in value.stages:
        elaborate(ctx, value.scope, stage, prefix=f"{value.name}.", given=value.source)


def elaborate(ctx: Context, scope: Scope, decl: ast.Stage, prefix: str = "", given: Source | None = None) -> None:
    """A stage, or one for each index of a family of stages; `given` is its data where it does not name its own."""
    if decl.each is None:
        _one(ctx, scope, decl, f"{prefix}{decl.name.text}", given)
        return
    binder, written = decl.each
    over = ctx.evaluate(scope, written)
    if isinstance(over, Unknown):
        return
    if not isinstance(over, Numbers):
        ctx.error(scope, "E0217", f"a family of stages runs over a range, not {kind(over)}", written.span)
        return
    if over.hi - over.lo > _MOST:
        ctx.error(scope, "E0218", f"{over.hi - over.lo} stages are more than {_MOST}", written.span)
        return
    if over.hi <= over.lo and scope.uses:
        # A method may have a stage for each of a number of models, and be given none.
        return
    if over.hi <= over.lo:
        ctx.error(scope, "E0219", "this runs over nothing", written.span, "empty")
        return
    for number in range(over.lo, over.hi):
        inner = scope.child(**{binder.text: Num(number)})
        _one(ctx, inner, decl, f"{prefix}{decl.name.text}.{number}", given)


def _one(ctx: Context, outer: Scope, decl: ast.Stage, name: str, given: Source | None) -> None:
    if any(stage.name == name for stage in ctx.stages):
        ctx.error(outer, "E0245", f"there is a stage `{name}` already", decl.name.span, "again here")
        return
    own = name.split(".", 1)[1] if "." in name else name
    scope = Scope(outer.source, f"{outer.prefix}{own}/", outer.uses, outer, outer.root)
    for stmt in decl.body:
        if isinstance(stmt, ast.Run):
            ctx.error(scope, "E0104", "`run` belongs at the top level", stmt.span, "not in a stage")
    imports.collect(ctx, scope, decl.body)
    for definition in list(scope.names.values()):
        value_of(ctx, scope, definition, definition.span or decl.span, scope)
    found = settings.read(
        ctx, scope, settings.STAGE, [stmt for stmt in decl.body if isinstance(stmt, ast.Setting)], "a stage"
    )
    duration = _duration(ctx, scope, decl)
    objective = _objective(ctx, scope, decl, name)
    source = _source(ctx, scope, decl, found, given)
    trained = training(ctx, scope, decl, objective)
    evaluations, best = _evaluations(ctx, scope, decl)
    if objective is None or duration is None or trained is None:
        return
    if source is None and "source" not in ctx.pending:
        return
    terms = _terms(ctx, scope, objective, name, decl)
    if gradients.kept(ctx, scope, [loss for _, loss in terms], decl.name.span):
        stage_checks.reach(ctx, scope, decl, terms, trained)
    node = _node(ctx, scope, decl, name, duration, found, terms, trained, evaluations, best, source)
    ctx.builder.add(node)
    for slot, (_, loss) in enumerate(terms):
        ctx.builder.connect(loss.key, node.key, str(slot))
    for slot, metric in enumerate(dict.fromkeys(m for spec in evaluations for m in spec.metrics)):
        ctx.builder.connect(f"metric/{metric}", node.key, f"metric.{slot}")
    policies.connect(ctx, scope, decl, node, terms)
    ctx.stages.append(node)
    counters.connect(ctx, node)
    stage_checks.held_out(ctx, scope, decl, source)
    stage_checks.batch(ctx, scope, decl, node, source)


def _node(
    ctx: Context,
    scope: Scope,
    decl: ast.Stage,
    name: str,
    duration: schedules.Span,
    found: dict[str, Value],
    terms: list[tuple[schedules.Schedule, NamedLoss]],
    trained: Training,
    evaluations: list[EvaluateSpec],
    best: str | None,
    source: SourceSpec | None,
) -> StageNode:
    def number(key: str, default: int | None) -> int | None:
        value = found.get(key)
        return int(value.value) if isinstance(value, Num) else default

    optim = found.get("optim")
    every = found.get("checkpoint_every")
    return StageNode(
        f"stage/{name}",
        name,
        len(ctx.stages),
        duration,
        source,
        tuple(weight for weight, _ in terms),
        trained.targets,
        optim.spec if isinstance(optim, Optimiser) else OptimSpec(),
        batch_size=number("batch_size", 32) or 32,
        accumulate=number("accumulate", 1) or 1,
        seed=number("seed", 0) or 0,
        evaluate=tuple(evaluations),
        keep_best=best,
        checkpoint_every=every.span if isinstance(every, Length) else None,
        max_length=number("max_length", None),
        locations=(ctx.location(scope, decl.name.span),),
    )


def _duration(ctx: Context, scope: Scope, decl: ast.Stage) -> schedules.Span | None:
    if decl.duration is None:
        ctx.error(
            scope, "E0409", f"stage `{decl.name.text}` does not say for how long", decl.name.span,
            f"write `stage {decl.name.text} for 3 epochs`",
        )  # fmt: skip
        return None
    value = ctx.evaluate(scope, decl.duration)
    if isinstance(value, Unknown):
        return None
    if not isinstance(value, Length) or value.span.unit == "percent":
        hint = "of what?" if isinstance(value, Length) else "a duration such as `3 epochs`, or the name of one"
        ctx.error(
            scope, "E0401", f"a stage lasts for steps, epochs or tokens, and this is {kind(value)}", decl.duration.span,
            hint,
        )  # fmt: skip
        return None
    if value.span.amount <= 0:
        ctx.error(scope, "E0403", "a stage lasts for more than nothing", decl.duration.span)
        return None
    return value.span


def _objective(ctx: Context, scope: Scope, decl: ast.Stage, name: str) -> Loss | None:
    found = [stmt for stmt in decl.body if isinstance(stmt, ast.Minimize)]
    if not found:
        ctx.error(
            scope, "E0410", f"stage `{name}` minimises nothing", decl.name.span, "write `minimize ...` in its block"
        )
        return None
    if len(found) > 1:
        ctx.error(
            scope, "E0416", "a stage has one objective", found[1].span, "a second one",
            labels=[Label(found[0].span, "the first", primary=False)], notes=["add them: `minimize a + b`"],
        )  # fmt: skip
        return None
    value = as_loss(ctx, scope, ctx.evaluate(scope, found[0].value), found[0].value)
    return value if isinstance(value, Loss) and (value.terms or value.partial) else None


def _terms(
    ctx: Context, scope: Scope, objective: Loss, name: str, decl: ast.Stage
) -> list[tuple[schedules.Schedule, NamedLoss]]:
    """The named losses of an objective with their weights; a loss that comes twice has the sum of its weights."""
    minimize = next(stmt for stmt in decl.body if isinstance(stmt, ast.Minimize))
    terms: dict[str, tuple[schedules.Schedule, NamedLoss]] = {}
    for term in objective.terms:
        loss = term.loss
        if isinstance(loss, Atom):
            short = loss.key.rsplit("/", 1)[-1]
            loss = named_loss(ctx, scope, Loss((term.__class__(schedules.Constant(1.0), loss),)), short, minimize.value)
        held = terms.get(loss.key)
        weight = term.weight if held is None else schedules.combine("+", held[0], term.weight)
        terms[loss.key] = (weight, loss)
    return list(terms.values())


def _source(
    ctx: Context, scope: Scope, decl: ast.Stage, found: dict[str, Value], given: Source | None
) -> SourceSpec | None:
    ctx.pending.discard("source")
    if "source" in found:
        value = found["source"]
        assert isinstance(value, Source)
        return value.spec
    written = [stmt for stmt in decl.body if isinstance(stmt, ast.Setting) and stmt.name.text == "source"]
    if written:
        # It was reported, or is a source of a later version.
        ctx.pending.add("source")
        return None
    if given is not None:
        return given.spec
    sources = [d for d in ctx.root_scope.names.values() if isinstance(d.decl, ast.DataDecl)]
    if len(sources) == 1:
        value = value_of(ctx, ctx.root_scope, sources[0], decl.span, scope)
        sources[0].used = True
        if isinstance(value, Source):
            return value.spec
        ctx.pending.add("source")
        return None
    names = ", ".join(d.name for d in sources)
    if ctx.methods_only:
        ctx.pending.add("source")
        return None
    ctx.error(
        scope, "E0412", f"stage `{decl.name.text}` does not say which data it trains on", decl.name.span,
        f"write `source = {sources[0].name}`" if sources else "declare one: `data d = csv(...)`",
        notes=[f"declared: {names}"] if names else [],
    )  # fmt: skip
    return None


def _metrics(scope: Scope) -> list[str]:
    names = [d.name for d in scope.visible() if isinstance(d.decl, ast.MetricDecl)]
    return [f"declared metrics: {', '.join(names)}"] if names else []


def _evaluations(ctx: Context, scope: Scope, decl: ast.Stage) -> tuple[list[EvaluateSpec], str | None]:
    evaluations: list[EvaluateSpec] = []
    best: str | None = None
    for stmt in decl.body:
        if not isinstance(stmt, ast.Evaluate):
            continue
        names: list[str] = []
        for written in stmt.metrics:
            value = ctx.evaluate(scope, written)
            if isinstance(value, Metric):
                names.append(value.name)
            elif not isinstance(value, Unknown):
                ctx.error(
                    scope, "E0411", f"`evaluate` takes a metric, and this is {kind(value)}", written.span,
                    f"declare one: `metric m = {written.span.text}`", notes=_metrics(scope),
                )  # fmt: skip
        every = None
        if stmt.every is not None:
            every = schedules.Span(stmt.every.value, stmt.every.unit)
        if names:
            evaluations.append(EvaluateSpec(tuple(names), every))
    kept: ast.KeepBest | None = None
    for stmt in decl.body:
        if isinstance(stmt, ast.KeepBest):
            if kept is not None:
                ctx.error(
                    scope, "E0245", "`keep best by` stands twice", stmt.span, "again here",
                    labels=[Label(kept.span, "the first", primary=False)],
                )  # fmt: skip
            kept = stmt
            value = ctx.evaluate(scope, ast.Name(stmt.metric.span, stmt.metric.text))
            if isinstance(value, Metric):
                if not any(value.name in spec.metrics for spec in evaluations):
                    ctx.error(
                        scope, "E0411", f"`{value.name}` is kept by, but never evaluated in this stage",
                        stmt.metric.span, f"write `evaluate {stmt.metric.text} every 100 steps`",
                    )  # fmt: skip
                best = value.name
            elif not isinstance(value, Unknown):
                ctx.error(scope, "E0411", f"`keep best by` takes a metric, and this is {kind(value)}", stmt.metric.span)
    return evaluations, best
