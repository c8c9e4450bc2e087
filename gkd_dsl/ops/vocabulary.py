"""Tensors over a part of a vocabulary. The checker puts them in."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "gather_vocabulary",
        "tensor",
        ("gather_vocabulary(x: Float[..., V], ids: Int[K]) -> Float[..., K]",),
        'The entries of the last axis at these ids. `align = "kept"` puts it in.',
        "x[..., ids]",
    ),
    OpSpec(
        "map_ids",
        "tensor",
        ("map_ids(x: Int[...], rows: Int[V]) -> Int[...]",),
        "Each id as the row that stands for it; what is negative, such as -100, stays. Put in before labels of a "
        "model that keeps a part of its vocabulary.",
        "rows[x], x where x < 0",
    ),
)
