"""From the label column to class numbers: threshold, given order, whole numbers, or sorted texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gkd_dsl.graph.nodes import AttrValue


@dataclass(frozen=True)
class LabelMap:
    """How the texts of a label column become numbers.

    kind     "threshold" (two classes around `threshold`), "names" (index in `names`),
             "numbers" (already 0, 1, 2, ...) or "values" (regression: the number itself)
    names    the labels by class, for "names"
    classes  how many classes; None for "values"
    """

    kind: str
    names: tuple[str, ...] = ()
    threshold: float = 0.0
    classes: int | None = None

    def number(self, text: str) -> int | float | None:
        """The class (or value) of a label; None leaves the row out. Raises ValueError saying what is wrong."""
        if self.kind in ("threshold", "values"):
            value = number_of(text)
            if value is None:
                raise ValueError(f"the label `{text}` is not a number")
            if self.kind == "values":
                return value
            return None if value == self.threshold else int(value > self.threshold)
        if self.kind == "names":
            name = text.strip()
            if name not in self.names:
                raise ValueError(f"the label `{name}` is not one of {', '.join(self.names[:12])}")
            return self.names.index(name)
        whole = whole_of(text)
        if whole is None or whole < 0:
            raise ValueError(f"the label `{text}` is not a class number 0, 1, 2, ...")
        return whole


def number_of(text: str) -> float | None:
    """The finite number that a text holds, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def whole_of(text: str) -> int | None:
    """The whole number that a text holds (`3`, `3.0`), or None."""
    value = number_of(text)
    return int(value) if value is not None and value == int(value) else None


def label_map(args: Mapping[str, AttrValue], task: str, found: Iterable[str] | None) -> LabelMap:
    """The map for a source. `found` are the labels of its rows (None where they cannot be read cheaply).

    Labels that are all whole numbers are classes as they stand; other texts are numbered in sorted order.
    Raises ValueError where the labels are numbers with fractions, or negative, and nothing says how to part them.
    """
    if task == "regression":
        return LabelMap("values")
    threshold = args.get("threshold")
    if isinstance(threshold, int | float):
        return LabelMap("threshold", threshold=float(threshold), classes=2)
    labels = args.get("labels")
    if isinstance(labels, tuple) and labels:
        names = tuple(written(label) for label in labels)
        return LabelMap("names", names, classes=len(names))
    distinct = sorted({label.strip() for label in found or ()})
    if not distinct:
        return LabelMap("numbers", classes=None)
    numbers = [number_of(label) for label in distinct]
    if any(number is None for number in numbers):
        return LabelMap("names", tuple(distinct), classes=len(distinct))
    values = sorted({number for number in numbers if number is not None})
    if any(value != int(value) for value in values):
        shown = next(value for value in values if value != int(value))
        raise ValueError(f"the labels are numbers with fractions, such as {shown:g}")
    if values[0] < 0:
        raise ValueError(f"the labels are numbers, and {values[0]:g} is no class")
    return LabelMap("numbers", classes=int(values[-1]) + 1)


def written(label: AttrValue) -> str:
    """A label of the `labels` list as it stands in a file."""
    if isinstance(label, bool):
        return str(label).lower()
    return f"{label:g}" if isinstance(label, float) else str(label).strip()
