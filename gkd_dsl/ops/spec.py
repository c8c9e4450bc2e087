"""One operator as data: its name, its signatures and what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["loss", "tensor", "mask", "metric"]


@dataclass(frozen=True)
class OpSpec:
    """An operator of the language.

    name                as written in a spec
    kind                `loss` (values per position), `tensor`, `mask` (Bool of batch columns), `metric`
    signatures          overloads in the type language, tried in order
    doc                 one line
    formula             what is computed, in plain text
    source              paper, venue, arXiv id
    positions           what one value of the result stands for
    next_token          over the logits of a causal language model, position i speaks of token i + 1
    masked              takes the slot `valid` (Bool[B, L] or Bool[B]) besides its signature
    carries_dims        gets the attribute `dims`: the per-batch names of its positions, `*` for other axes
    random              draws numbers
    across_samples      one sample's result hangs on the other samples of the micro-batch
    greater_is_better   for a metric
    """

    name: str
    kind: Kind
    signatures: tuple[str, ...]
    doc: str
    formula: str = ""
    source: str = ""
    positions: str = ""
    next_token: bool = False
    masked: bool = False
    carries_dims: bool = False
    random: bool = False
    across_samples: bool = False
    greater_is_better: bool = True
