"""A drawing as Mermaid text, which GitHub renders in Markdown."""

from __future__ import annotations

from gkd_dsl.graph.drawing import Box, Drawing

# Fills of middling lightness with a text colour of their own are readable on light and dark pages.
_CLASSES = {
    "frozen": "fill:#cfe0f3,stroke:#3b6ea5,color:#10243a",
    "trained": "fill:#fbd9b5,stroke:#b86a14,color:#3a2203",
    "plain": "fill:#e6e6e6,stroke:#777777,color:#1d1d1d",
    "loss": "fill:#f6cfd6,stroke:#b03a55,color:#3a0a15",
    "stage": "fill:#d4ecd2,stroke:#3d8b37,color:#0f2a0c",
}
_ENDS = {
    "forward": ("[[", "]]"),
    "tap": ("(", ")"),
    "op": ("[", "]"),
    "project": ("[/", "/]"),
    "policy": ("[/", "/]"),
    "batch": ("[(", ")]"),
    "loss": ("([", "])"),
    "metric": ("([", "])"),
    "counter": ("[\\", "\\]"),
    "stage": ("{{", "}}"),
}


def to_mermaid(drawing: Drawing) -> str:
    """The text of a `flowchart LR`. Arrows along which no gradient flows are dotted."""
    names = {box.key: f"n{number}" for number, box in enumerate(drawing.boxes)}
    lines = ["flowchart LR"]
    if drawing.note:
        lines.append(f"  %% {drawing.note}")
    for number, group in enumerate(drawing.groups):
        lines.append(f'  subgraph g{number}["{_text(group.title)}"]')
        lines += [f"    {_box(names, box)}" for box in drawing.boxes if box.group == group.key]
        lines.append("  end")
    lines += [f"  {_box(names, box)}" for box in drawing.boxes if not box.group]
    for arrow in drawing.arrows:
        shaft = "-.->" if arrow.detached else "-->"
        label = f'|"{_text(arrow.label)}"|' if arrow.label else ""
        lines.append(f"  {names[arrow.source]} {shaft}{label} {names[arrow.target]}")
    lines += [f"  classDef {name} {style}" for name, style in _CLASSES.items()]
    for name in _CLASSES:
        chosen = [names[box.key] for box in drawing.boxes if _class(box) == name]
        if chosen:
            lines.append(f"  class {','.join(chosen)} {name}")
    if drawing.note:
        lines.append(f'  note["{_text(drawing.note)}"]')
    return "\n".join(lines)


def _class(box: Box) -> str:
    return {"loss": "loss", "metric": "loss", "stage": "stage"}.get(box.shape, box.tone)


def _box(names: dict[str, str], box: Box) -> str:
    start, end = _ENDS[box.shape]
    return f'{names[box.key]}{start}"{"<br/>".join(_text(line) for line in box.lines)}"{end}'


def _text(text: str) -> str:
    """Text inside quotes: Mermaid reads `#...;` as a character."""
    for mark, name in (("#", "#35;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;")):
        text = text.replace(mark, name)
    return text
