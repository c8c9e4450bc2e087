"""A drawing as DOT text, for Graphviz."""

from __future__ import annotations

from gkd_dsl.graph.drawing import Box, Drawing

_FILLS = {
    "frozen": ("#cfe0f3", "#3b6ea5"),
    "trained": ("#fbd9b5", "#b86a14"),
    "plain": ("#e6e6e6", "#777777"),
    "loss": ("#f6cfd6", "#b03a55"),
    "metric": ("#f6cfd6", "#b03a55"),
    "stage": ("#d4ecd2", "#3d8b37"),
}


def to_dot(drawing: Drawing) -> str:
    """A `digraph` with a cluster for each model and stage. Arrows along which no gradient flows are dashed."""
    lines = [
        "digraph gkd {",
        '  graph [rankdir=LR, fontname="Helvetica", fontsize=12, bgcolor="white", nodesep=0.25, ranksep=0.9];',
        '  node [fontname="Helvetica", fontsize=12, style="filled,rounded", shape=box];',
        '  edge [fontname="Helvetica", fontsize=10, color="#666666", fontcolor="#444444"];',
    ]
    if drawing.note:
        lines.append(f"  label={_text(drawing.note)};")
    for number, group in enumerate(drawing.groups):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_text(group.title)};", '    color="#999999";']
        lines += [f"    {_box(box)}" for box in drawing.boxes if box.group == group.key]
        lines.append("  }")
    lines += [f"  {_box(box)}" for box in drawing.boxes if not box.group]
    for arrow in drawing.arrows:
        options = [f"label={_text(arrow.label)}"] if arrow.label else []
        if arrow.detached:
            options.append("style=dashed")
        tail = f" [{', '.join(options)}]" if options else ""
        lines.append(f"  {_text(arrow.source)} -> {_text(arrow.target)}{tail};")
    return "\n".join([*lines, "}"])


def _box(box: Box) -> str:
    fill, line = _FILLS[box.shape if box.shape in _FILLS else box.tone]
    label = _text("\n".join(box.lines))
    return f'{_text(box.key)} [label={label}, fillcolor="{fill}", color="{line}"];'


def _text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
