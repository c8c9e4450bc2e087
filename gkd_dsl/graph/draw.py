"""Drawing a graph as text of a format."""

from __future__ import annotations

from typing import Literal

import networkx as nx

from gkd_dsl.graph.access import ancestors, nodes
from gkd_dsl.graph.drawing import drawing
from gkd_dsl.graph.nodes import StageNode

Format = Literal["mermaid", "dot", "svg", "json"]


def draw(graph: nx.MultiDiGraph, format: Format | str = "mermaid", stage: str | None = None) -> str:
    """The graph, or what one stage needs of it, as `mermaid`, `dot` or `svg`; `json` is the whole truth.

    Raises KeyError for a stage that is not there and ValueError for another format.
    """
    if format == "json":
        from gkd_dsl.graph.schema import to_json

        return to_json(graph if stage is None else _of_stage(graph, stage))
    if format == "mermaid":
        from gkd_dsl.graph.draw_mermaid import to_mermaid

        return to_mermaid(drawing(graph, stage=stage))
    if format == "dot":
        from gkd_dsl.graph.draw_dot import to_dot

        return to_dot(drawing(graph, stage=stage))
    if format == "svg":
        from gkd_dsl.graph.draw_svg import to_svg

        return to_svg(drawing(graph, stage=stage))
    raise ValueError(f"no format {format!r}; formats: mermaid, dot, svg, json")


def _of_stage(graph: nx.MultiDiGraph, stage: str) -> nx.MultiDiGraph:
    for node in nodes(graph, StageNode):
        if node.name == stage:
            return graph.subgraph(ancestors(graph, [node.key])).copy()
    raise KeyError(stage)
