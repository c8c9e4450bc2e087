"""Tap paths: typed places inside a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class TapPath:
    """A canonical tap: indices are non-negative.

    kind    "embed", "hidden", "final", "layer", "cls", "pooled", "logits", "weight", "module"
    index   the k of `hidden[k]`, the i of `layer[i]`
    part    for `layer`: "in", "out", "mlp", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.probs", "attn.out"
            for `module`: "in" or "out"
    name    the dotted name for `weight` and `module`

    `embed` is canonically `hidden[0]`; `layer[i].in` is `hidden[i]`; `layer[i].out` is `hidden[i + 1]`.
    """

    kind: str
    index: int | None = None
    part: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        """As a user writes it: `hidden[3]`, `layer[5].attn.scores`, `module("a.b").out`."""
        text = f'{self.kind}("{self.name}")' if self.name is not None else self.kind
        if self.index is not None:
            text += f"[{self.index}]"
        return f"{text}.{self.part}" if self.part else text

    @property
    def key(self) -> str:
        """As in a graph key: `hidden.3`, `layer.5/attn.scores`, `module.a.b/out`."""
        text = self.kind if self.name is None else f"{self.kind}.{self.name}"
        if self.index is not None:
            text += f".{self.index}"
        return f"{text}/{self.part}" if self.part else text
