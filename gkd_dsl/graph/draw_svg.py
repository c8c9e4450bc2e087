"""A drawing as SVG: no scripts, no fonts from elsewhere, its own ground, so that it reads on light and dark pages."""

from __future__ import annotations

from itertools import pairwise
from xml.sax.saxutils import escape

from gkd_dsl.graph.draw_layout import FRAME, LINE, TITLE, WORDS, Layout, Rectangle, layout
from gkd_dsl.graph.drawing import Box, Drawing

_FILLS = {
    "frozen": ("#dbe8f6", "#3b6ea5"),
    "trained": ("#fde3c6", "#b86a14"),
    "plain": ("#eeeeee", "#777777"),
    "loss": ("#f8dbe1", "#b03a55"),
    "stage": ("#dcefdb", "#3d8b37"),
}
_FONT = "ui-sans-serif, system-ui, Helvetica, Arial, sans-serif"
_FOOT = 30.0
_LEGEND = (
    ("trained", "trained"),
    ("frozen", "frozen"),
    ("plain", "operator or column"),
    ("loss", "loss or metric"),
    ("stage", "stage"),
)


def to_svg(drawing: Drawing) -> str:
    """The text of an SVG image. Arrows along which no gradient flows are dashed."""
    found = layout(drawing)
    width = max(found.width, 640.0)
    height = found.height + _FOOT + (LINE if drawing.note else 0.0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="{_FONT}" font-size="12">',
        "  <title>graph of a distillation</title>",
        '  <defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#5f6670"/></marker></defs>',
        f'  <rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#ffffff"/>',
    ]
    for group in drawing.groups:
        if group.key in found.frames:
            lines += _frame(found.frames[group.key], group.title, _FILLS[group.tone][1])
    lines += _arrows(drawing, found)
    lines += [line for box in drawing.boxes for line in _box(box, found.boxes[box.key])]
    lines += _legend(found.height + _FOOT / 2)
    if drawing.note:
        lines.append(_label(2 * FRAME, height - 8, drawing.note, "#444444"))
    return "\n".join([*lines, "</svg>"])


def _frame(place: Rectangle, title: str, line: str) -> list[str]:
    return [
        f'  <rect x="{place.x:.1f}" y="{place.y:.1f}" width="{place.width:.1f}" height="{place.height:.1f}" rx="8" '
        f'fill="#fafafa" stroke="{line}" stroke-opacity="0.5"/>',
        f'  <text x="{place.x + FRAME:.1f}" y="{place.y + TITLE:.1f}" font-weight="600" fill="#333333">'
        f"{escape(title)}</text>",
    ]


def _box(box: Box, place: Rectangle) -> list[str]:
    fill, line = _FILLS[_tone(box)]
    corner = {"op": 2, "batch": 2, "project": 2}.get(box.shape, 8)
    found = [
        f'  <rect x="{place.x:.1f}" y="{place.y:.1f}" width="{place.width:.1f}" height="{place.height:.1f}" '
        f'rx="{corner}" fill="{fill}" stroke="{line}" stroke-width="{2.4 if box.count > 1 else 1.2}"/>'
    ]
    top = place.middle - LINE * (len(box.lines) - 1) / 2 + 4
    for number, text in enumerate(box.lines):
        weight = ' font-weight="600"' if number == 0 else ' font-size="11"'
        found.append(
            f'  <text x="{place.x + place.width / 2:.1f}" y="{top + number * LINE:.1f}" text-anchor="middle"{weight} '
            f'fill="#1d1d1d">{escape(text)}</text>'
        )
    return found


def _tone(box: Box) -> str:
    return {"loss": "loss", "metric": "loss", "stage": "stage"}.get(box.shape, box.tone)


def _arrows(drawing: Drawing, found: Layout) -> list[str]:
    starts = _ports(drawing, found, outgoing=True)
    ends = _ports(drawing, found, outgoing=False)
    lines = []
    labels = []
    for number, (arrow, bends) in enumerate(zip(drawing.arrows, found.bends, strict=True)):
        source, target = found.boxes[arrow.source], found.boxes[arrow.target]
        points = [(source.x + source.width, starts[number]), *bends, (target.x - 1, ends[number])]
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for (x0, y0), (x1, y1) in pairwise(points):
            half = max(abs(x1 - x0) / 2, 18.0)
            path += f" C{x0 + half:.1f} {y0:.1f} {x1 - half:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
        dash = ' stroke-dasharray="5 4"' if arrow.detached else ""
        lines.append(
            f'  <path d="{path}" fill="none" stroke="#5f6670" stroke-width="1.2"{dash} marker-end="url(#tip)"/>'
        )
        if arrow.label:
            (x0, y0), (x1, y1) = points[-2], points[-1]
            labels += _tag((x0 + x1) / 2, (y0 + y1) / 2, arrow.label)
    return lines + labels


def _tag(x: float, y: float, text: str) -> list[str]:
    """A label on an arrow, on a ground of its own; a long one is cut."""
    shown = text if len(text) <= WORDS else text[: WORDS - 1] + "…"
    width = len(shown) * 6.0 + 6
    return [
        f'  <rect x="{x - width / 2:.1f}" y="{y - 8:.1f}" width="{width:.1f}" height="15" rx="3" fill="#ffffff" '
        'fill-opacity="0.9"/>',
        f'  <text x="{x:.1f}" y="{y + 3.5:.1f}" text-anchor="middle" font-size="11" fill="#333333">'
        f"<title>{escape(text)}</title>{escape(shown)}</text>",
    ]


def _ports(drawing: Drawing, found: Layout, *, outgoing: bool) -> dict[int, float]:
    """Where each arrow leaves or meets its box: spread over the side, in the order of the other ends."""
    sides: dict[str, list[int]] = {}
    for number, arrow in enumerate(drawing.arrows):
        sides.setdefault(arrow.source if outgoing else arrow.target, []).append(number)
    ports = {}
    for key, numbers in sides.items():
        place = found.boxes[key]
        ranked = sorted(numbers, key=lambda number: (_other(drawing, found, number, outgoing), number))
        step = place.height / (len(ranked) + 1)
        for count, number in enumerate(ranked, 1):
            ports[number] = place.y + step * count
    return ports


def _other(drawing: Drawing, found: Layout, number: int, outgoing: bool) -> float:
    """How high an arrow comes from, or goes to, beside a box."""
    arrow, bends = drawing.arrows[number], found.bends[number]
    if bends:
        return bends[0][1] if outgoing else bends[-1][1]
    return found.boxes[arrow.target if outgoing else arrow.source].middle


def _legend(y: float) -> list[str]:
    x = 2 * FRAME
    found = []
    for tone, text in _LEGEND:
        fill, line = _FILLS[tone]
        found.append(
            f'  <rect x="{x:.0f}" y="{y - 8:.1f}" width="14" height="11" rx="2" fill="{fill}" stroke="{line}"/>'
        )
        found.append(_label(x + 20, y + 2, text, "#333333"))
        x += 34 + len(text) * 6.3
    found.append(f'  <path d="M{x:.0f} {y - 2:.1f} h26" stroke="#5f6670" stroke-width="1.2" stroke-dasharray="5 4"/>')
    found.append(_label(x + 32, y + 2, "no gradient", "#333333"))
    return found


def _label(x: float, y: float, text: str, colour: str) -> str:
    return f'  <text x="{x:.1f}" y="{y:.1f}" font-size="11" fill="{colour}">{escape(text)}</text>'
