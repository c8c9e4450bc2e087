"""The check of a spec: from its text to a typed graph, or to what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import networkx as nx

from gkd_dsl.diagnostics import Diagnostics, Label
from gkd_dsl.graph.nodes import AttrValue, StageNode
from gkd_dsl.meaning import (
    adapters,
    fusing,
    gemini,
    imports,
    parameters,
    placements,
    quantising,
    settings,
    specimens,
    stages,
    stored,
    unused,
)
from gkd_dsl.meaning.context import Context, ResolvedParam
from gkd_dsl.meaning.declare import value_of
from gkd_dsl.meaning.evaluate import evaluate
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import Instance, Model
from gkd_dsl.syntax import ast, parse
from gkd_dsl.text import Source, Span


@dataclass(frozen=True)
class Checked:
    """A checked spec.

    diagnostics  what is wrong or doubtful; `ok` where no error is among them
    later        what checks but does not run in this version
    graph        the typed graph (complete only where `ok`)
    unset        parameters without a value, which a run needs
    """

    file: ast.File
    diagnostics: Diagnostics
    later: Diagnostics
    graph: nx.MultiDiGraph
    stages: tuple[StageNode, ...]
    models: Mapping[str, Model]
    params: Mapping[str, ResolvedParam]
    unset: Mapping[str, Span]
    instances: Mapping[str, Instance]
    runtime: tuple[tuple[str, AttrValue], ...]
    root: Path
    python: tuple[str, ...] = ()
    scope: Scope | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """Whether no error was found."""
        return self.diagnostics.ok


def check_path(
    path: str | Path,
    *,
    params: Mapping[str, str] | None = None,
    offline: bool = True,
    trust: bool = False,
) -> Checked:
    """Check a file. `params` are texts as on the command line (`{"T": "2.0"}`).

    Hub ids are looked up in the local cache; with `offline=False` a config that is not there is fetched.
    `trust` also runs the Python files that the spec imports.

    Raises OSError or UnicodeDecodeError where the file itself cannot be read.
    """
    path = Path(path)
    text = path.read_bytes().decode("utf-8-sig")
    return check_text(
        text, str(path), path=path, params=params, offline=offline, trust=trust, root=path.resolve().parent
    )


def check_text(
    text: str,
    name: str = "<text>",
    *,
    path: Path | None = None,
    params: Mapping[str, str] | None = None,
    offline: bool = True,
    trust: bool = False,
    root: Path | None = None,
) -> Checked:
    """Check a text; relative paths in it start at `root` (the current folder)."""
    source = Source(name, text, path)
    file, found = parse(source)
    ctx = Context(root or Path.cwd(), overrides=dict(params or {}), offline=offline, trust=trust, evaluator=evaluate)
    for diagnostic in found:
        ctx.diagnostics.add(diagnostic)
    scope = Scope(source, root=ctx.root)
    ctx.root_scope = scope
    if path is not None:
        ctx.loading.append((path.resolve(), None))
    imports.collect(ctx, scope, file.items)
    imports.load_all(ctx, scope)
    runtime = _elaborate(ctx, scope, file)
    parameters.unknown_overrides(ctx, scope)
    return Checked(
        file,
        ctx.diagnostics,
        ctx.later,
        ctx.builder.graph,
        tuple(ctx.stages),
        ctx.models,
        ctx.params,
        ctx.unset_params,
        ctx.instances,
        runtime,
        ctx.root,
        tuple(i.path.value for i in file.items if isinstance(i, ast.ImportPython)),
        scope,
    )


def _elaborate(ctx: Context, scope: Scope, file: ast.File) -> tuple[tuple[str, AttrValue], ...]:
    models = [d for d in scope.names.values() if isinstance(d.decl, ast.ModelDecl)]
    rest = [d for d in scope.names.values() if not isinstance(d.decl, ast.ModelDecl)]
    for definition in (*models, *rest):
        value_of(ctx, scope, definition, definition.span or file.items[0].span, scope)
    steps = [item for item in file.items if isinstance(item, ast.Stage | ast.Run)]
    methods = [item for item in file.items if isinstance(item, ast.MethodDecl)]
    if methods and not models and not steps:
        specimens.check_methods(ctx, scope, methods)
    elif not steps and not any(d.severity == "error" for d in ctx.diagnostics):
        ctx.error(
            scope, "E0418", "this spec has no stage", _end(file), "nothing would be trained",
            notes=["write `stage main for 3 epochs { minimize ... }`"],
        )  # fmt: skip
    for item in steps:
        if isinstance(item, ast.Stage):
            stages.elaborate(ctx, scope, item)
        else:
            stages.run(ctx, scope, item)
    while ctx.deferred:
        ctx.deferred.pop(0)()
    runtime: tuple[tuple[str, AttrValue], ...] = ()
    _once(ctx, scope, [item for item in file.items if isinstance(item, ast.Runtime)])
    for block in file.items:
        if isinstance(block, ast.Runtime):
            runtime += settings.runtime(ctx, scope, block)
            if steps:
                placements.check(ctx, scope, block)
                fusing.check(ctx, scope, block)
                gemini.check(ctx, scope, block)
    runtime += stored.places(ctx, runtime)
    if steps:
        quantising.check(ctx, scope, dict(runtime))
        stored.check(ctx, scope, file)
    if steps and ctx.diagnostics.ok:
        adapters.unused(ctx, scope, ctx.stages)
        unused.warn(ctx, scope)
    return runtime


def _once(ctx: Context, scope: Scope, blocks: list[ast.Runtime]) -> None:
    """Report a second runtime block, and a second place of one model: it would change the first unseen."""
    first: dict[str, Span] = {}
    placed = [stmt for block in blocks for stmt in block.body if isinstance(stmt, ast.Placement)]
    found = [("the `runtime` block", _word(block.span, len("runtime"))) for block in blocks]
    found += [(f"the place of `{stmt.name.text}`", stmt.name.span) for stmt in placed]
    for what, span in found:
        if what in first:
            ctx.error(
                scope, "E0245", f"{what} stands twice", span, "again here",
                labels=[Label(first[what], "the first", primary=False)], notes=["write all settings in one"],
            )  # fmt: skip
        first.setdefault(what, span)


def _word(span: Span, length: int) -> Span:
    return Span(span.source, span.start, span.start + length)


def _end(file: ast.File) -> Span:
    span = file.items[-1].span if file.items else (file.header.span if file.header else None)
    if span is None:
        return Span(file.source, 0, 0)
    return span
