"""Passes over the graph: pure functions, each with a check of its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import networkx as nx

from gkd_dsl.graph.access import nodes
from gkd_dsl.graph.nodes import StageNode
from gkd_dsl.graph.passes.drop import drop
from gkd_dsl.graph.passes.share import share
from gkd_dsl.graph.plan import SpecPlan
from gkd_dsl.graph.verify import verify

Pass = Callable[[nx.MultiDiGraph], nx.MultiDiGraph]

PASSES: dict[str, Pass] = {"share": share, "drop": drop}
"""The passes over the whole graph, in their order. `forwards`, `liveness`, `fuse` and `emit` work on one stage."""


def run_passes(
    graph: nx.MultiDiGraph, *, until: str | None = None, on_dump: Callable[[str, nx.MultiDiGraph], None] | None = None
) -> nx.MultiDiGraph:
    """The graph after every pass up to `until`; `on_dump` sees it after each. Raises KeyError for an unknown pass."""
    if until is not None and until not in PASSES:
        raise KeyError(until)
    verify(graph)
    for name, function in PASSES.items():
        graph = function(graph)
        verify(graph)
        if on_dump is not None:
            on_dump(name, graph)
        if name == until:
            break
    return graph


def compile_plan(graph: nx.MultiDiGraph, *, optimise: bool = True, runtime: tuple = ()) -> SpecPlan:
    """The plan of every stage, in order. Without `optimise` nothing is shared, dropped, stopped or let go early."""
    from gkd_dsl.graph.passes.emit import emit

    if optimise:
        graph = run_passes(graph)
    else:
        verify(graph)
    stages = sorted(nodes(graph, StageNode), key=lambda stage: stage.order)
    settings = dict(runtime)
    fuse_logits = settings.get("fuse_logits", "auto")
    return SpecPlan(
        tuple(replace(emit(graph, stage, optimise=optimise), fuse_logits=fuse_logits) for stage in stages),
        settings.get("backend", "local"),
        tuple(runtime),
    )
