"""Several layers as one: attention over them. `stack` puts them side by side."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "layer_attention",
        "tensor",
        ("layer_attention(query: Float[..., H], layers: Float[..., H, n], scale: bool = false) -> Float[..., H]",),
        "The mean of stacked layers, weighted by the softmax of their products with a query, without parameters: "
        "`layer_attention(x, stack(a, b, c))`. `scale` divides the products by sqrt(H); `detach(x)` keeps the "
        "gradient out of the weights.",
        "sum_j a_j layer_j, a = softmax_j(query . layer_j)",
        "Passban et al., ALP-KD, AAAI 2021, arXiv 2012.14022",
    ),
    OpSpec(
        "mean_square",
        "tensor",
        ("mean_square(x: Float[..., H]) -> Float[...]",),
        "The mean of the squares over the last axis.",
        "mean_h x_h^2",
    ),
)
