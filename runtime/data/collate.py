"""Rows of token ids to a batch of tensors: padding, and the labels of masked and causal models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gkd_dsl.runtime.data.errors import DataError

IGNORED = -100


@dataclass(frozen=True)
class Masking:
    """Masked-LM masking: of each token that is not special, with `probability`, 80 % become the mask token,
    10 % a random token and 10 % stay; these are predicted (BERT, arXiv 1810.04805, section 3.1).

    What is drawn for a row is a function of (seed, epoch, row) and of its length, and of nothing else.
    """

    probability: float
    mask_id: int
    special: frozenset[int]
    ordinary: np.ndarray
    seed: int

    def apply(self, ids: np.ndarray, epoch: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The masked ids and the labels (-100 where nothing is predicted) of one row, both `[L]`."""
        random = np.random.default_rng([self.seed, epoch, row])
        drawn, kind = random.random(len(ids)), random.random(len(ids))
        other = self.ordinary[random.integers(0, len(self.ordinary), len(ids))]
        special = np.fromiter((int(token) in self.special for token in ids), bool, len(ids))
        chosen = (drawn < self.probability) & ~special
        labels = np.where(chosen, ids, IGNORED)
        masked = np.where(chosen & (kind < 0.8), self.mask_id, ids)
        return np.where(chosen & (kind >= 0.9), other, masked), labels


def masking_for(tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> Masking:
    """Masking with the mask token of a tokenizer; random tokens are drawn among those that are not special."""
    special = frozenset(int(token) for token in tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(len(tokenizer)) if token not in special], dtype=np.int64)
    if not len(ordinary):
        raise DataError(
            f"all {len(tokenizer)} tokens of the tokenizer are special, and none is left to mask",
            hint="a tokenizer's special tokens are those it adds itself, such as [CLS] and [MASK]",
        )
    return Masking(probability, int(tokenizer.mask_token_id), special, ordinary, seed)


@dataclass(frozen=True)
class Collator:
    """Pads to the longest row of a batch, on the side of the tokenizer.

    Gives `input_ids`, `attention_mask`, `token_type_ids` where the rows have them (int64 `[B, L]`) and `labels`:
    int64 `[B]`, float32 `[B]` for regression, or int64 `[B, L]` with -100 on padding, prompts and what is not masked.
    Causal labels are the ids themselves; nothing is shifted.
    """

    task: str
    pad_id: int
    pad_type_id: int
    left: bool
    masking: Masking | None = None

    def __call__(self, rows: Mapping[str, Sequence[Any]], epoch: int, places: Sequence[int]) -> dict[str, Tensor]:
        """`rows` as columns; `places` are their numbers in the training rows."""
        ids = [np.asarray(row, dtype=np.int64) for row in rows["input_ids"]]
        length = max(len(row) for row in ids)
        labels: list[np.ndarray] | None = None
        attention = self._padded([np.ones(len(row), dtype=np.int64) for row in ids], length, 0)
        if self.masking is not None:
            drawn = [self.masking.apply(row, epoch, place) for row, place in zip(ids, places, strict=True)]
            ids, labels = [masked for masked, _ in drawn], [label for _, label in drawn]
        elif self.task == "causal_lm":
            prompts = rows["prompt_length"]
            labels = [np.where(np.arange(len(row)) < n, IGNORED, row) for row, n in zip(ids, prompts, strict=True)]
        batch = {"input_ids": self._padded(ids, length, self.pad_id), "attention_mask": attention}
        if "token_type_ids" in rows:
            types = [np.asarray(row, dtype=np.int64) for row in rows["token_type_ids"]]
            batch["token_type_ids"] = self._padded(types, length, self.pad_type_id)
        if labels is not None:
            batch["labels"] = self._padded(labels, length, IGNORED)
        elif "labels" in rows:
            kind = torch.float32 if self.task == "regression" else torch.int64
            batch["labels"] = torch.tensor(list(rows["labels"]), dtype=kind)
        return batch

    def _padded(self, rows: Sequence[np.ndarray], length: int, fill: int) -> Tensor:
        table = np.full((len(rows), length), fill, dtype=np.int64)
        for place, row in enumerate(rows):
            start = length - len(row) if self.left else 0
            table[place, start : start + len(row)] = row
        return torch.from_numpy(table)


def collator_for(tokenizer: PreTrainedTokenizerBase, task: str, masking: Masking | None) -> Collator:
    """The collator of a tokenizer. One without a padding token pads with its end token, which the mask hides."""
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    types = getattr(tokenizer, "pad_token_type_id", 0) or 0
    return Collator(task, int(pad or 0), int(types), tokenizer.padding_side == "left", masking)
