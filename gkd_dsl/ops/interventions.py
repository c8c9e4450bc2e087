"""What passes over other texts and interventions need: samples exchanged, spans of tokens drawn."""

from __future__ import annotations

from gkd_dsl.ops.spec import OpSpec

_SHARE = "share: float = 0.3 in 0.0 ..= 1.0"

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "roll",
        "tensor",
        ("roll(x: Tensor[B, ...], by: int = 1) -> Tensor[B, ...]",),
        "The rows of other samples: each gets that of the sample `by` places after it, the last ones the first.",
        "y_b = x_((b + by) mod B)",
        across_samples=True,
    ),
    OpSpec(
        "random_spans",
        "tensor",
        (
            f"random_spans(x: Tensor[B, L], source: Tensor[B, L], {_SHARE}) -> Int[B, L]",
            f"random_spans(x: Tensor[B, L], {_SHARE}) -> Bool[B, L]",
        ),
        "One run of tokens of each text, drawn at each step. With two masks, the position in the second text that each"
        " token of the run is paired with, -1 for the others: the runs are equally long and start independently.",
        "a run of max(1, floor(share n)) tokens, n the tokens of the text, or of the shorter of the two",
        random=True,
    ),
)
