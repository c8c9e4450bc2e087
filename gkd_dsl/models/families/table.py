"""The form of a family table: where the config keeps each size, where the modules keep each tap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gkd_dsl.models.info import Task

Transform = Literal["none", "heads", "swap", "fused.0", "fused.1", "fused.2"]


@dataclass(frozen=True)
class Place:
    """A tensor at a module: `path` relative to a block or to the base model.

    `transform` gives the tap from what the module gives: `heads` splits `[B, L, heads * D]` into
    `[B, heads, L, D]`; `fused.i` does so with the i-th third; `swap` exchanges axes 1 and 2.
    """

    path: str
    side: Literal["input", "output"] = "output"
    transform: Transform = "none"


@dataclass(frozen=True)
class Family:
    """One model family as plain data.

    fields      size -> config field (H V N A KV D F; E and I where the family has them, see `inside`)
    inside      (flag, field): where the flag is set, attention and feed-forward work at the width of the field (I),
                not at that of the residual stream; `E` is the width of the word embeddings where it is not H
    computed    fields that the config class computes itself: what a saved config says of them is not read
    defaults    every config field of the family and what it is when config.json leaves it out
    aliases     other spellings that config.json may use -> field
    classes     task -> transformers class
    accepts     further class -> the task it is loaded for
    prefix      the attribute that holds the base model in a model with a head
    blocks      the list of blocks, relative to the base model
    embed       where the residual stream begins
    embeddings  modules of the part `embed`
    final_norm  the norm after the last block; None where blocks end in a norm
    pooler      the pooler, and `pooled`, the tasks whose class has it
    attention   the module, inside a block, that calls the attention function
    heads       task -> modules of the head, relative to the whole model
    row_heads   tasks whose head modules see one row per sequence
    words       the parameter that holds the word embeddings
    decoder     a token sees those before it and itself alone, whatever the head
    causal      config fields that make a causal language model of a family of encoders
    """

    name: str
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    classes: Mapping[Task, str]
    prefix: str
    blocks: str
    embed: Place
    embeddings: tuple[str, ...]
    words: str
    attention: str
    q: Place
    k: Place
    v: Place
    attn_out: Place
    mlp: Place
    heads: Mapping[Task, tuple[str, ...]]
    final_norm: str | None = None
    pooler: str | None = None
    pooled: tuple[Task, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    accepts: Mapping[str, Task] = field(default_factory=dict)
    row_heads: tuple[Task, ...] = ()
    causal: Mapping[str, Any] = field(default_factory=dict)
    no_pooler: str = "this family has no pooler"
    inside: tuple[str, str] | None = None
    computed: tuple[str, ...] = ()
    decoder: bool = False

    @property
    def post_norm(self) -> bool:
        """Whether each block ends in a norm (then there is none after the last block)."""
        return self.final_norm is None
