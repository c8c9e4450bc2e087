"""Places for the boxes of a drawing: ranks from left to right, order by barycentres, frames that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from gkd_dsl.graph.access import natural
from gkd_dsl.graph.drawing import Box, Drawing

CHARACTER = 6.7
LINE = 15.0
PADDING = 9.0
GAP = 14.0
BETWEEN = 66.0
FRAME = 12.0
WORDS = 30
TITLE = 16.0
_SWEEPS = 8


@dataclass(frozen=True)
class Rectangle:
    """A place: the upper left corner and the size, in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """Half way down."""
        return self.y + self.height / 2


@dataclass(frozen=True)
class Layout:
    """Rectangles of boxes and frames by their keys, and for each arrow the points between its ends."""

    boxes: dict[str, Rectangle]
    frames: dict[str, Rectangle]
    bends: tuple[tuple[tuple[float, float], ...], ...]
    width: float
    height: float


def size(box: Box) -> tuple[float, float]:
    """Width and height of a box that holds its lines."""
    return max(len(line) for line in box.lines) * CHARACTER + 2 * PADDING, len(box.lines) * LINE + PADDING


def layout(drawing: Drawing) -> Layout:
    """Places for all of a drawing.

    Models stand on the left (forward, then taps, projections and columns), operators in the middle by the
    longest way to them, losses and metrics in one column, stages last. Long arrows keep a lane in each column
    that they cross.
    """
    ranks = _ranks(drawing)
    lanes: dict[str, tuple[float, float]] = {box.key: size(box) for box in drawing.boxes}
    home = {box.key: box.group for box in drawing.boxes}
    edges: list[tuple[str, str]] = []
    chains: list[list[str]] = []
    for number, arrow in enumerate(drawing.arrows):
        chain = [arrow.source]
        for rank in range(ranks[arrow.source] + 1, ranks[arrow.target]):
            lane = f"~{number}.{rank}"
            lanes[lane], ranks[lane], home[lane] = (0.0, 4.0), rank, ""
            chain.append(lane)
        chain.append(arrow.target)
        edges += pairwise(chain)
        chains.append(chain)
    around: dict[str, list[str]] = {key: [] for key in lanes}
    for source, target in edges:
        around[source].append(target)
        around[target].append(source)
    middle = _heights(drawing, ranks, lanes, home, around)
    return _placed(drawing, ranks, lanes, middle, chains)


def _ranks(drawing: Drawing) -> dict[str, int]:
    graph = nx.DiGraph()
    graph.add_nodes_from(box.key for box in drawing.boxes)
    graph.add_edges_from((arrow.source, arrow.target) for arrow in drawing.arrows)
    shapes = {box.key: box.shape for box in drawing.boxes}
    if not nx.is_directed_acyclic_graph(graph):
        # Families drawn as one can close a circle; its arrows then run inside a column.
        condensed = nx.condensation(graph)
        generations = [
            [key for part in generation for key in condensed.nodes[part]["members"]]
            for generation in nx.topological_generations(condensed)
        ]
    else:
        generations = [list(generation) for generation in nx.topological_generations(graph)]
    ranks = {key: rank for rank, generation in enumerate(generations) for key in generation}
    for key, shape in shapes.items():
        if shape == "forward":
            ranks[key] = 0
        elif shape in ("tap", "project", "policy", "batch"):
            ranks[key] = 1
        elif shape == "op":
            ranks[key] = max(2, ranks[key])
    last = max((ranks[key] for key, shape in shapes.items() if shape == "op"), default=1)
    for key, shape in shapes.items():
        if shape in ("loss", "metric"):
            ranks[key] = last + 1
        elif shape == "counter":
            ranks[key] = last + 2
        elif shape == "stage":
            ranks[key] = last + (3 if "counter" in shapes.values() else 2)
    return ranks


def _heights(
    drawing: Drawing,
    ranks: dict[str, int],
    lanes: dict[str, tuple[float, float]],
    home: dict[str, str],
    around: dict[str, list[str]],
) -> dict[str, float]:
    """The vertical middle of every box and lane."""
    last = max((ranks[box.key] for box in drawing.boxes if box.shape == "op"), default=1)
    columns = [[key for key in lanes if ranks[key] in (0, 1)]]
    columns += [[key for key in lanes if ranks[key] == rank] for rank in range(2, last + 1)]
    columns.append([key for key in lanes if ranks[key] > last])
    order = {group.key: place for place, group in enumerate(drawing.groups)}
    middle = dict.fromkeys(lanes, 0.0)
    for sweep in range(_SWEEPS):
        for zone in columns if sweep % 2 == 0 else columns[::-1]:
            _zone(zone, ranks, lanes, home, around, order, middle, first=sweep == 0)
    return middle


def _zone(
    zone: list[str],
    ranks: dict[str, int],
    lanes: dict[str, tuple[float, float]],
    home: dict[str, str],
    around: dict[str, list[str]],
    order: dict[str, int],
    middle: dict[str, float],
    *,
    first: bool,
) -> None:
    """Stack the frames and free boxes of some columns near what they are joined to."""
    inside = set(zone)

    def wish(key: str) -> float:
        near = [middle[other] for other in around[key] if other not in inside or home[other] == home[key] != ""]
        return sum(near) / len(near) if near else middle[key]

    frames: dict[str, list[str]] = {}
    for key in zone:
        frames.setdefault(home[key] or f"={key}", []).append(key)
    items = []
    for name, keys in frames.items():
        framed = not name.startswith("=")
        stacks = {rank: [key for key in keys if ranks[key] == rank] for rank in {ranks[key] for key in keys}}
        height = max(sum(lanes[key][1] for key in stack) + GAP * (len(stack) - 1) for stack in stacks.values())
        outside = [middle[other] for key in keys for other in around[key] if other not in inside]
        desired = sum(outside) / len(outside) if outside else sum(middle[key] for key in keys) / len(keys)
        margin = 2 * FRAME + TITLE if framed else 0.0
        items.append((name, stacks, height + margin, desired, framed))
    if first:
        items.sort(key=lambda item: (order.get(item[0], -1), natural(item[0])))
    else:
        # Frames keep their order, so that the student stays above the teacher and stages follow each other.
        items.sort(key=lambda item: (order.get(item[0], len(order)), round(item[3], 3), natural(item[0])))
    centres = spread([item[3] for item in items], [item[2] for item in items], GAP)
    for (_, stacks, _, _, framed), centre in zip(items, centres, strict=True):
        shift = TITLE / 2 if framed else 0.0
        for stack in stacks.values():
            ranked = sorted(stack, key=lambda key: (round(wish(key), 3), natural(key)))
            heights = [lanes[key][1] for key in ranked]
            total = sum(heights) + GAP * (len(ranked) - 1)
            top = centre + shift - total / 2
            for key, tall in zip(ranked, heights, strict=True):
                middle[key] = top + tall / 2
                top += tall + GAP


def spread(wishes: Sequence[float], heights: Sequence[float], gap: float) -> list[float]:
    """Middles in the given order, a gap apart, as near to the wishes as can be (least squares)."""
    offsets = [0.0]
    for before, after in pairwise(heights):
        offsets.append(offsets[-1] + before / 2 + after / 2 + gap)
    pools: list[tuple[float, int]] = []
    for wish, offset in zip(wishes, offsets, strict=False):
        value, count = wish - offset, 1
        while pools and pools[-1][0] > value:
            before, members = pools.pop()
            value, count = (before * members + value * count) / (members + count), members + count
        pools.append((value, count))
    flat = [value for value, count in pools for _ in range(count)]
    return [value + offset for value, offset in zip(flat, offsets, strict=False)]


def _placed(
    drawing: Drawing,
    ranks: dict[str, int],
    lanes: dict[str, tuple[float, float]],
    middle: dict[str, float],
    chains: list[list[str]],
) -> Layout:
    widths = {
        rank: max((lanes[key][0] for key in lanes if ranks[key] == rank), default=0.0)
        for rank in range(max(ranks.values(), default=0) + 1)
    }
    left, x = {}, FRAME * 2
    for rank, width in widths.items():
        left[rank] = x
        words = [len(arrow.label) for arrow in drawing.arrows if ranks[arrow.target] == rank + 1]
        x += width + (max(BETWEEN, min(max(words, default=0), WORDS) * CHARACTER + 34) if width else 0.0)
    top = min((middle[key] - lanes[key][1] / 2 for key in lanes), default=0.0) - 2 * FRAME - TITLE
    boxes = {}
    for box in drawing.boxes:
        width, height = lanes[box.key]
        column = widths[ranks[box.key]]
        boxes[box.key] = Rectangle(
            left[ranks[box.key]] + (column - width) / 2, middle[box.key] - height / 2 - top, width, height
        )
    frames = {}
    for group in drawing.groups:
        inside = [boxes[box.key] for box in drawing.boxes if box.group == group.key]
        if not inside:
            continue
        x0, y0 = min(r.x for r in inside) - FRAME, min(r.y for r in inside) - FRAME - TITLE
        x1, y1 = max(r.x + r.width for r in inside) + FRAME, max(r.y + r.height for r in inside) + FRAME
        x1 = max(x1, x0 + len(group.title) * CHARACTER + 2 * FRAME)
        frames[group.key] = Rectangle(x0, y0, x1 - x0, y1 - y0)
    bends = tuple(
        tuple(
            point
            for key in chain[1:-1]
            for point in (
                (left[ranks[key]], middle[key] - top),
                (left[ranks[key]] + widths[ranks[key]], middle[key] - top),
            )
        )
        for chain in chains
    )
    everything = [*boxes.values(), *frames.values()]
    width = max((r.x + r.width for r in everything), default=0.0) + 2 * FRAME
    height = max((r.y + r.height for r in everything), default=0.0) + FRAME
    return Layout(boxes, frames, bends, width, height)
