"""Which rows a source gives, their labels, and which of them are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import datasets
import numpy as np

from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.runtime.data.errors import DataError
from gkd_dsl.runtime.data.table import Table, labels_of, texts_missing
from gkd_dsl.sources import LabelMap, label_map


@dataclass(frozen=True)
class Chosen:
    """The rows in use, in the order of the file; `labels` has one number for each, or is None."""

    rows: datasets.Dataset
    labels: list[int] | list[float] | None
    left_out: dict[str, int] = field(default_factory=dict)


def labels_map(table: Table, args: Mapping[str, AttrValue], task: str) -> LabelMap | None:
    """How the labels of a table become numbers; None for a task without labels. Reads all its rows."""
    if task not in ("classification", "regression"):
        return None
    if "label" not in table.rows.column_names:
        raise DataError(
            f"the task {task} needs labels, and no column is named", arg="label", hint='add `label = "..."`'
        )
    found = {label for label in labels_of(table) if label is not None}
    try:
        return label_map(args, task, found)
    except ValueError as error:
        hint = 'for two classes write `threshold = 0.0`; to predict the number, `task = "regression"`'
        raise DataError(str(error), arg="label", hint=hint) from error


def choose(table: Table, args: Mapping[str, AttrValue], mapping: LabelMap | None, classes: int | None) -> Chosen:
    """Leave out rows without text and rows on the threshold, number the labels, apply `limit`.

    `classes` is how many the model has. Raises DataError for a label that is missing, unknown, or too
    large for the model, and where no row is left.
    """
    rows = table.rows
    main = "completion" if "completion" in rows.column_names else "text"
    missing = texts_missing(rows, main)
    if rows.num_rows and all(missing):
        column = str(args.get(main) or main)
        raise DataError(f"the column `{column}` is empty in all {rows.num_rows} rows", arg=main)
    kept = [place for place, gone in enumerate(missing) if not gone]
    left_out = {"without text": len(missing) - len(kept)}
    numbers: list[int | float] = []
    if mapping is not None:
        kept, numbers = _numbered(labels_of(table), kept, mapping, args, classes)
        left_out["on the threshold"] = len(missing) - left_out["without text"] - len(kept)
    limit = args.get("limit")
    if isinstance(limit, int) and limit < len(kept):
        drawn = np.sort(np.random.default_rng([_seed(args), 1]).permutation(len(kept))[:limit])
        numbers = [numbers[place] for place in drawn] if mapping is not None else []
        kept = [kept[place] for place in drawn]
    if not kept:
        raise DataError("no row is left: " + _why(left_out), arg="path")
    rows = rows if len(kept) == rows.num_rows else rows.select(kept)
    return Chosen(rows, numbers if mapping is not None else None, left_out)


def _numbered(
    labels: Sequence[str | None],
    kept: Sequence[int],
    mapping: LabelMap,
    args: Mapping[str, AttrValue],
    classes: int | None,
) -> tuple[list[int], list[int | float]]:
    places: list[int] = []
    numbers: list[int | float] = []
    known: dict[str, int | float | None] = {}
    for place in kept:
        label = labels[place]
        if label is None or not label.strip():
            raise DataError(f"row {place + 1} has no label", arg="label", hint="leave such rows out of the file")
        if label not in known:
            try:
                known[label] = mapping.number(label)
            except ValueError as error:
                raise DataError(f"row {place + 1}: {error}", arg="label") from error
            number = known[label]
            if classes is not None and mapping.kind != "values" and number is not None and number >= classes:
                hint = f"give the model `num_labels = {mapping.classes}`" if mapping.classes else None
                if mapping.kind == "numbers":
                    hint = f"classes are 0 to {classes - 1}; `labels = [...]` gives other labels their numbers"
                message = f"row {place + 1} has label `{label}`, class {number}, and the model has {classes} classes"
                raise DataError(message, arg="label", hint=hint)
        number = known[label]
        if number is not None:
            places.append(place)
            numbers.append(number)
    return places, numbers


def split(count: int, args: Mapping[str, AttrValue]) -> tuple[np.ndarray, np.ndarray]:
    """Places of the rows to train on and of those held out, each in the order of the file.

    Drawn by the source's `seed` alone, so every stage and every seed of a run holds out the same rows.
    """
    share = args.get("held_out")
    places = np.arange(count)
    if not isinstance(share, float) or share <= 0.0 or count < 2:
        return places, places[:0]
    held = min(count - 1, max(1, round(count * share)))
    drawn = np.random.default_rng([_seed(args), 0]).permutation(count)
    return np.sort(drawn[held:]), np.sort(drawn[:held])


def _seed(args: Mapping[str, AttrValue]) -> int:
    seed = args.get("seed")
    return seed if isinstance(seed, int) else 0


def _why(left_out: Mapping[str, int]) -> str:
    told = [f"{count} {reason}" for reason, count in left_out.items() if count]
    return ", ".join(told) if told else "the source is empty"
