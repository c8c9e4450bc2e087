"""Batches of a stage, in an order that is a pure function of seed and epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gkd_dsl.graph.nodes import AttrValue, SourceSpec, StageNode
from gkd_dsl.models.info import Task
from gkd_dsl.runtime.data.collate import Collator, collator_for, masking_for
from gkd_dsl.runtime.data.encode import Encoded, encode, recipe_for
from gkd_dsl.runtime.data.errors import DataError, named
from gkd_dsl.runtime.data.quiet import quiet
from gkd_dsl.runtime.data.rows import Chosen, choose, labels_map, split
from gkd_dsl.runtime.data.table import Table, kind_of, read_table
from gkd_dsl.sources import LabelMap, bind_source, task_of, used_columns

# Epochs count from 0; held-out rows are masked as in an epoch that never comes.
_HELD_OUT_EPOCH = 2**31
_AHEAD = 3


@dataclass(frozen=True)
class Sizes:
    """How many rows there are; `left_out` says why rows of the source are not used."""

    train: int
    held_out: int
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Loader:
    """The batches of one stage. A micro-batch has `batch_size` rows; the last of an epoch may have fewer.

    `label_names` are the labels by class where the source has texts for them. With `numbered`, batches have a column
    `_row` with the number of each row: the training rows first, then those held out.
    """

    train_rows: datasets.Dataset = field(repr=False)
    held_out_rows: datasets.Dataset = field(repr=False)
    held_out_texts: datasets.Dataset = field(repr=False)
    collator: Collator = field(repr=False)
    batch_size: int
    seed: int
    shuffle: bool
    sizes: Sizes
    task: str
    label_names: tuple[str, ...] = ()
    numbered: bool = False

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in an epoch, the short last one included."""
        return -(-self.sizes.train // self.batch_size)

    def steps_per_epoch(self, accumulate: int = 1) -> int:
        """Optimiser steps in an epoch; the last one may have fewer micro-batches than `accumulate`."""
        return -(-self.batches_per_epoch // accumulate)

    def order(self, epoch: int) -> np.ndarray:
        """The places of the training rows in the order of this epoch."""
        if not self.shuffle:
            return np.arange(self.sizes.train)
        return np.random.default_rng([self.seed, epoch]).permutation(self.sizes.train)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The micro-batches of an epoch from number `start` on; the ones before it are not read."""
        order = self.order(epoch)
        return self._batches(self.train_rows, order, epoch, range(start, self.batches_per_epoch))

    def rows(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """The rows of these numbers, ascending, in batches of training rows and then of rows held out."""
        apart = self.sizes.train
        for rows, first, epoch in ((self.train_rows, 0, 0), (self.held_out_rows, apart, _HELD_OUT_EPOCH)):
            end = first + rows.num_rows
            places = np.array([n - first for n in numbers if first <= n < end], dtype=np.int64)
            yield from self._batches(rows, places, epoch, range(-(-len(places) // self.batch_size)))

    def held_out(self) -> Iterator[dict[str, Tensor]]:
        """The held-out rows in the order of the file; the same tensors at every call."""
        count = self.sizes.held_out
        numbers = range(-(-count // self.batch_size))
        return self._batches(self.held_out_rows, np.arange(count), _HELD_OUT_EPOCH, numbers)

    def held_out_sentences(self, count: int | None = None) -> list[str]:
        """The first held-out rows as they were written (their completions for a causal model with prompts)."""
        rows = self.held_out_texts
        column = "completion" if "completion" in rows.column_names else "text"
        chosen = rows.select(range(min(count, rows.num_rows))) if count is not None else rows
        return [str(text) for text in chosen[column]]

    @staticmethod
    def tokens(batch: Mapping[str, Tensor]) -> int:
        """The tokens of a batch, without padding."""
        return int(batch["attention_mask"].sum())

    def _batches(
        self, rows: datasets.Dataset, order: np.ndarray, epoch: int, numbers: range
    ) -> Iterator[dict[str, Tensor]]:
        def make(number: int) -> dict[str, Tensor]:
            places = order[number * self.batch_size : (number + 1) * self.batch_size].tolist()
            batch = self.collator(rows[places], epoch, places)
            if self.numbered:
                first = self.sizes.train if epoch == _HELD_OUT_EPOCH else 0
                batch["_row"] = torch.tensor(places, dtype=torch.int64) + first
            return batch

        return _ahead(make, numbers)


def _ahead(make: Callable[[int], dict[str, Tensor]], numbers: range) -> Iterator[dict[str, Tensor]]:
    """`make` of each number in turn, a few of them made beforehand by one thread."""
    if not numbers:
        return
    waiting: deque[Future[dict[str, Tensor]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def make_loader(
    stage: StageNode,
    source: SourceSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Task,
    columns: Sequence[str] = (),
    seed: int,
    root: Path,
    classes: int | None = None,
) -> Loader:
    """Read, split and tokenise a source for a stage.

    task     the head of the student, which `task = "auto"` of the source follows
    columns  the batch columns that the stage reads; one that the source does not give is an error
    seed     of the order of rows and of masking; the held-out rows follow the source's own seed
    root     the folder that relative paths start from
    classes  how many the model tells apart, to refuse labels beyond

    Raises DataError, in the user's terms, for all that can be wrong with files, columns, labels and sizes.
    """
    with named(source.name), quiet():
        kind, function = kind_of(source, root)
        args, problems = bind_source(kind, (), dict(source.args))
        if problems:
            raise DataError(problems[0].message, arg=problems[0].arg, hint=problems[0].hint)
        if function is not None and isinstance(args["held_out"], str):
            raise DataError("a source of your own holds out a share of its rows, not a file", arg="held_out")
        made = task_of(args, task)
        recipe = recipe_for(tokenizer, args, made, stage.max_length)
        workers = args.get("workers")
        workers = workers if isinstance(workers, int) else None

        table = read_table(kind, function, args, root)
        mapping = labels_map(table, args, made)
        chosen = choose(table, args, mapping, classes)
        encoded = encode(chosen, _digest(table, args), tokenizer, recipe, workers)
        apart = args.get("held_out")
        if isinstance(apart, str):
            other = {**args, ("split" if kind.name == "hf_dataset" else "path"): apart, "limit": None}
            held_table = read_table(kind, None, other, root)
            held_chosen = choose(held_table, other, mapping, classes)
            held = encode(held_chosen, _digest(held_table, other), tokenizer, recipe, workers)
            train_rows, held_rows = encoded.rows, held.rows
            held_texts = held_chosen.rows.select(held_rows["row"])
        else:
            train, out = split(encoded.rows.num_rows, args)
            train_rows, held_rows = encoded.rows.select(train), encoded.rows.select(out)
            held_texts = chosen.rows.select(held_rows["row"])
        sizes = Sizes(train_rows.num_rows, held_rows.num_rows, _left_out(chosen, encoded))
        _check(sizes, stage, encoded, recipe.max_length)
        masking = None
        if made == "masked_lm":
            masking = masking_for(tokenizer, _share(args), seed)
        loader = Loader(
            train_rows,
            held_rows,
            held_texts,
            collator_for(tokenizer, made, masking),
            stage.batch_size,
            seed,
            bool(args.get("shuffle", True)),
            sizes,
            made,
            _names(mapping),
        )
        _check_columns(loader, columns, used_columns(args, kind.result))
        return loader


def _digest(table: Table, args: Mapping[str, AttrValue]) -> str:
    """The content of the rows in use: of the table, and what chooses among its rows."""
    chosen = [args.get(name) for name in ("limit", "seed", "threshold", "labels")]
    return f"{table.digest}/{chosen!r}"


def _share(args: Mapping[str, AttrValue]) -> float:
    probability = args.get("mask_probability")
    return float(probability) if isinstance(probability, int | float) else 0.15


def _names(mapping: LabelMap | None) -> tuple[str, ...]:
    return mapping.names if mapping is not None else ()


def _left_out(chosen: Chosen, encoded: Encoded) -> dict[str, int]:
    told = {**chosen.left_out, "with nothing to learn": encoded.left_out}
    return {reason: count for reason, count in told.items() if count}


def _check(sizes: Sizes, stage: StageNode, encoded: Encoded, length: int) -> None:
    if not encoded.rows.num_rows:
        hint = f"prompts fill the {length} tokens of a row: raise `max_length`"
        raise DataError(
            f"no row is left: in all {encoded.left_out} nothing is to be learned", arg="max_length", hint=hint
        )
    if sizes.train < stage.batch_size:
        message = f"there are {sizes.train} rows to train on, fewer than a batch of {stage.batch_size}"
        told = f" ({sizes.held_out} are held out)" if sizes.held_out else ""
        raise DataError(
            message + told, arg="path", hint=f"write `batch_size = {max(1, sizes.train)}` in stage `{stage.name}`"
        )


def _check_columns(loader: Loader, columns: Sequence[str], roles: Mapping[str, str]) -> None:
    given = {"input_ids", "attention_mask"} | set(loader.train_rows.column_names) - {"prompt_length", "row"}
    if loader.task in ("masked_lm", "causal_lm"):
        given.add("labels")
    for column in columns:
        if column in given:
            continue
        if column == "labels":
            hint = 'add `label = "..."`' if "text" in roles or "completion" in roles else None
            raise DataError("the stage reads `batch.labels`, and the source has none", arg="label", hint=hint)
        listed = ", ".join(sorted(given))
        raise DataError(f"the stage reads `batch.{column}`, and the source has none", hint=f"it gives {listed}")
