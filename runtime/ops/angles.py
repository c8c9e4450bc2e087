"""Losses between the angles of triples, cubic in what they relate, in memory that a budget bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_dsl.runtime.ops.common import default_dims, full, mask_for, zero_where_not
from gkd_dsl.runtime.ops.registry import function

BUDGET = 1 << 20
"""How many numbers the edges and the angles of one chunk may hold on both sides together: what a cache holds is the
fastest on a CPU. On other devices it is 16 times as many, so that there are fewer calls."""


def _angles(edges: Tensor) -> Tensor:
    """Cosines between the edges at each vertex: [r, m, F] -> [r, m, m]; 0 for an edge of length 0.

    The products are divided, not the edges: those are the large tensor, and would be there once more.
    """
    products = edges @ edges.transpose(-1, -2)
    squares = products.diagonal(dim1=-2, dim2=-1)
    held = squares > 1e-24
    inverse = zero_where_not(held, torch.where(held, squares, torch.ones_like(squares)).rsqrt())
    return products * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def _errors(student: Tensor, teacher: Tensor, counted: Tensor, error: str) -> Tensor:
    """The error summed over the pairs a != b of edges that count: [r, m, F], [r, m, K], Bool[r, m] -> [r]."""
    s, t = _angles(student), _angles(teacher)
    each = (s - t).square() if error == "squared" else F.smooth_l1_loss(s, t, reduction="none")
    pairs = counted.unsqueeze(-1) & counted.unsqueeze(-2)
    pairs = pairs & ~torch.eye(counted.shape[-1], dtype=torch.bool, device=counted.device)
    return zero_where_not(pairs, each).sum((-1, -2))


class _AngleErrors(torch.autograd.Function):
    """The summed errors at each vertex, chunk by chunk; the backward makes each chunk again.

    points [p, F] and [p, K]; vertex Int[r], members Int[r, m] indices of points; counted Bool[r, m] -> [r].
    Only the points are kept for the backward, and one chunk's edges and angles live at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        vertex: Tensor,
        members: Tensor,
        counted: Tensor,
        error: str,
        budget: int,
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, vertex, members, counted)
        ctx.error, ctx.budget = error, budget
        found = student.new_empty(len(vertex))
        for rows in _chunks(members, student.shape[-1] + teacher.shape[-1], budget):
            ours, theirs = (_edges(x, vertex[rows], members[rows]) for x in (student, teacher))
            found[rows] = _errors(ours, theirs, counted[rows], error).to(found.dtype)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, vertex, members, counted = ctx.saved_tensors
        points, needed = (student, teacher), ctx.needs_input_grad[:2]
        found = [torch.zeros_like(x) if need else None for x, need in zip(points, needed, strict=True)]
        for rows in _chunks(members, student.shape[-1] + teacher.shape[-1], ctx.budget):
            edges = [_edges(x, vertex[rows], members[rows]) for x in points]
            sides = [edge.requires_grad_() for edge, need in zip(edges, needed, strict=True) if need]
            with torch.enable_grad():
                values = _errors(edges[0], edges[1], counted[rows], ctx.error)
            given = iter(torch.autograd.grad(values, sides, gradient[rows].to(values.dtype)))
            for total in found:
                if total is not None:
                    part = next(given).to(total.dtype)
                    total.index_add_(0, vertex[rows], part.sum(1))
                    total.index_add_(0, members[rows].flatten(), part.flatten(0, 1).neg_())
        return (*found, None, None, None, None, None)


def _edges(points: Tensor, vertex: Tensor, members: Tensor) -> Tensor:
    return points[vertex].unsqueeze(1) - points[members]


def _chunks(members: Tensor, features: int, budget: int) -> Iterator[slice]:
    """Slices of rows whose edges (m each) and angles (m by m on each side) stay within the budget."""
    count, width = members.shape
    size = max(1, budget // max(1, width * (features + 2 * width)))
    return (slice(start, start + size) for start in range(0, count, size))


def angle_errors(
    student: Tensor,
    teacher: Tensor,
    vertex: Tensor,
    members: Tensor,
    counted: Tensor,
    error: str,
    budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed errors of the angles at each vertex and the number of pairs that they are of: [r], Int[r].

    student [p, F], teacher [p, K]; vertex Int[r] and members Int[r, m] index their rows; counted Bool[r, m]. A pair
    is of two different members that count. Rows with fewer than two are not computed. It can be differentiated once.
    """
    number = counted.sum(-1)
    pairs = number * (number - 1)
    rows = (pairs > 0).nonzero().squeeze(-1)
    with torch.autocast(student.device.type, enabled=False):
        values = _AngleErrors.apply(
            full(student),
            full(teacher),
            vertex[rows],
            members[rows],
            counted[rows],
            error,
            budget if budget is not None else BUDGET * (1 if student.device.type == "cpu" else 16),
        )
    return values.new_zeros(len(vertex)).index_copy(0, rows, values), pairs


def _as_points(x: Tensor, counted: Tensor) -> Tensor:
    """[..., F] as rows, zero where they do not count."""
    return zero_where_not(counted.unsqueeze(-1), full(x)).flatten(0, -2)


def _mean(values: Tensor, pairs: Tensor) -> Tensor:
    return values / pairs.clamp_min(1)


@function("token_angle")
def token_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    window: int | None = None,
    error: str = "squared",
    denominator: str = "pairs",
    dims: Sequence[str] | None = None,
) -> Tensor:
    """Errors of the angles that two tokens make at a third, its mean over them: [B, L, H], [B, L, K] -> [B, L].

    Vertex and both ends are valid tokens, with `window` (odd) at most half of it away from the vertex; a window is
    cut at the ends of the text. Fewer than two ends give 0. With denominator "window" the sum is divided by
    window^2, or by L^2 without one. arXiv 2109.08359.
    """
    batch, length, _ = student.shape
    mask = mask_for((batch, length), dims, valid, False, student.device)
    at = torch.ones((), dtype=torch.bool, device=student.device) if mask is None else mask
    at = at.expand(batch, length)
    places = torch.arange(length, device=student.device)
    if window is None or window >= 2 * length - 1:
        ends = places.expand(length, length)
    else:
        half = window // 2
        ends = places.unsqueeze(-1) + torch.arange(-half, half + 1, device=student.device)
    # A vertex is none of its own ends: the edge to it has no direction.
    there = (ends >= 0) & (ends < length) & (ends != places.unsqueeze(-1))
    ends = ends.clamp(0, length - 1)
    rows = at.flatten().nonzero().squeeze(-1)
    # Places of the valid vertices alone, so that padding costs nothing.
    texts, vertices = rows // length, rows % length
    members = texts.unsqueeze(-1) * length + ends[vertices]
    counted = there[vertices] & at.flatten()[members]
    values, pairs = angle_errors(_as_points(student, at), _as_points(teacher, at), rows, members, counted, error)
    if denominator == "window":
        values = values / float(length if window is None else window) ** 2
    else:
        values = _mean(values, pairs)
    return values.new_zeros(batch * length).index_copy(0, rows, values).reshape(batch, length)


@function("layer_angle")
def layer_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    error: str = "squared",
    dims: Sequence[str] | None = None,
) -> Tensor:
    """Errors of the angles of all triples of layers at one place, their mean: [..., H, n], [..., K, n] -> [...].

    arXiv 2109.08359.
    """
    shape, layers = student.shape[:-2], student.shape[-1]
    names = tuple(dims) if dims is not None else default_dims(len(shape))
    mask = mask_for(shape, names, valid, False, student.device)
    counted = torch.ones(shape, dtype=torch.bool, device=student.device) if mask is None else mask.expand(shape)
    rows = counted.flatten().nonzero().squeeze(-1)
    ours, theirs = (x.flatten(0, -3)[rows].transpose(-1, -2).flatten(0, 1) for x in (student, teacher))
    order = torch.arange(layers, device=student.device)
    places = torch.arange(len(rows), device=student.device).unsqueeze(-1) * layers
    vertex = (places + order).flatten()
    members = (places + order).unsqueeze(1).expand(-1, layers, -1).flatten(0, 1)
    values, pairs = angle_errors(ours, theirs, vertex, members, members != vertex.unsqueeze(-1), error)
    values = _mean(values, pairs).reshape(len(rows), layers).mean(-1)
    return values.new_zeros(counted.numel()).index_copy(0, rows, values).reshape(shape)


@function("sample_angle")
def sample_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    heads: int = 1,
    error: str = "smooth_l1",
    dims: Sequence[str] | None = None,
) -> Tensor:
    """Errors of the angles that two samples make at a third, the mean over them and heads: [B, H], [B, K] -> [B]."""
    batch = len(student)
    mask = mask_for((batch,), dims, valid, False, student.device)
    at = torch.ones(batch, dtype=torch.bool, device=student.device) if mask is None else mask.expand(batch)
    ours, theirs = (
        _as_points(x.unflatten(-1, (heads, -1)).transpose(0, 1), at.expand(heads, batch)) for x in (student, teacher)
    )
    order = torch.arange(heads * batch, device=student.device).reshape(heads, batch)
    members = order.unsqueeze(1).expand(-1, batch, -1).flatten(0, 1)
    others = at.unsqueeze(-1) & at & ~torch.eye(batch, dtype=torch.bool, device=student.device)
    counted = others.expand(heads, batch, batch).flatten(0, 1)
    values, pairs = angle_errors(ours, theirs, order.flatten(), members, counted, error)
    return _mean(values, pairs).reshape(heads, batch).mean(0)


@function("anchor_angle")
def anchor_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    anchors: Tensor,
    neighbours: Tensor,
    valid: Tensor | None = None,
    error: str = "smooth_l1",
    dims: Sequence[str] | None = None,
) -> Tensor:
    """Errors of the angles at anchors between their neighbours, the mean in each text: [B, L, H], [B, L, K] -> [B].

    `anchors` Int[B, n] and `neighbours` Int[B, n, m] are tokens; -1 is none.
    """
    batch, length, _ = student.shape
    mask = mask_for((batch,), dims, valid, False, student.device)
    vertex, members = anchors.unsqueeze(-1), neighbours
    counted = (vertex >= 0) & (vertex < length) & (members >= 0) & (members < length) & (members != vertex)
    if mask is not None:
        counted = counted & mask.expand(batch)[:, None, None]
    first = (torch.arange(batch, device=student.device) * length)[:, None, None]
    vertex, members = (first + places.clamp(0, length - 1) for places in (vertex, members))
    values, pairs = angle_errors(
        student.flatten(0, 1),
        teacher.flatten(0, 1),
        vertex.flatten(),
        members.flatten(0, 1),
        counted.flatten(0, 1),
        error,
    )
    return _mean(values.reshape(batch, -1).sum(1), pairs.reshape(batch, -1).sum(1))
