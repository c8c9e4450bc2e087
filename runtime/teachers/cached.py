"""Taps that were stored beforehand: the model itself is never loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from gkd_dsl.graph.plan import ForwardPlan, TapPlan
from gkd_dsl.models.resolve import last_needed
from gkd_dsl.runtime.errors import CACHE, CANNOT_RUN, NOT_FINITE, RunError
from gkd_dsl.runtime.models.interventions import Edits
from gkd_dsl.runtime.teachers.base import TeacherSource
from gkd_dsl.runtime.teachers.parts import Layout, own_tokens, spans
from gkd_dsl.runtime.teachers.store import Store

ROW = "_row"
"""The column of a batch that holds the numbers of its rows: training rows first, then those held out."""


def row_numbers(inputs: Mapping[str, Tensor]) -> list[int]:
    """The numbers of the rows of a batch. Raises RunError where they are not there."""
    if ROW not in inputs:
        raise RunError(
            CANNOT_RUN,
            "a stored teacher needs the numbers of a batch's rows, and this batch has none",
            "they are in the batches of a source of the spec",
        )
    return [int(row) for row in inputs[ROW].tolist()]


class CachedTeachers:
    """The stored taps of one model."""

    def __init__(self, store: Store, layout: Layout) -> None:
        self.store, self.layout = store, layout

    def taps(
        self, forward: ForwardPlan, inputs: Mapping[str, Tensor], env: Mapping[str, Tensor], changes: Edits
    ) -> dict[str, Tensor]:
        """The taps of one forward, by their keys.

        Raises RunError: a row that is not stored, or that has another number of tokens than it had.
        """
        refuse_changes(forward)
        return read_taps(self.store, self.layout, forward, inputs)

    def blocks(self, model: str, layers: Sequence[int]) -> Sequence[nn.Module]:
        """Raises RunError: there is no model to lend from."""
        raise RunError(
            CANNOT_RUN, f"`{model}` is stored, and has no blocks to lend", "place it with `placement = resident`"
        )


class FillingTeachers:
    """A model in memory, each row of which is run once: what it gave is stored, and read when the row comes again.

    What is stored has its rounding in the first epoch too, so that a row gives the same in all of them.
    """

    def __init__(self, inner: TeacherSource, store: Store, layout: Layout) -> None:
        self.inner, self.store, self.layout = inner, store, layout
        for name, dims in layout.dims().items():
            store.declare(name, dims)

    def taps(
        self, forward: ForwardPlan, inputs: Mapping[str, Tensor], env: Mapping[str, Tensor], changes: Edits
    ) -> dict[str, Tensor]:
        """The taps of one forward, by their keys; rows that are not stored yet are run and stored."""
        refuse_changes(forward)
        self.fill(forward, inputs)
        return read_taps(self.store, self.layout, forward, inputs)

    def blocks(self, model: str, layers: Sequence[int]) -> Sequence[nn.Module]:
        """Blocks of the model, to run in another's place."""
        return self.inner.blocks(model, layers)

    def fill(self, forward: ForwardPlan, inputs: Mapping[str, Tensor]) -> None:
        """Run the rows of a batch and store them, where one of them is not stored yet."""
        rows = row_numbers(inputs)
        new = (~self.store.has(rows)).tolist()
        if not any(new):
            return
        paths = self.layout.taps
        taps = tuple(TapPlan(path.key, path, type) for path, type in paths.items())
        whole = replace(forward, taps=taps, stop_after=last_needed(paths))
        values = self.inner.taps(whole, inputs, {}, Edits({}, {}))
        mask = inputs["attention_mask"]
        if not self.store.shared:
            self.store.shared = {path.key: values[path.key].detach().cpu() for path in self.layout.shared()}
        parts = self.layout.encode({path: values[path.key] for path in paths}, mask)
        parts = {name: value.cpu() for name, value in parts.items()}
        if (wrong := next((name for name, value in parts.items() if bool(value.isnan().any())), None)) is not None:
            raise RunError(
                NOT_FINITE,
                f"`{forward.model}` gives `{wrong}` that is not a number for rows {min(rows)} to {max(rows)}",
                "nothing of them is stored: its weights are damaged, or its numbers are beyond `precision`; try fp32",
            )
        dims = self.layout.dims()
        starts, counts = spans(mask)
        for place, (row, fresh) in enumerate(zip(rows, new, strict=True)):
            if fresh and not self.store.has([row])[0]:
                start, count = starts[place], counts[place]
                self.store.add(row, count, own_tokens(parts, dims, place, start, count))


def read_taps(store: Store, layout: Layout, forward: ForwardPlan, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored taps of the rows of a batch, by their keys."""
    mask = inputs["attention_mask"]
    rows = row_numbers(inputs)
    starts, counts = spans(mask)
    if (stored := store.lengths(rows)) != counts:
        place = next(place for place in range(len(rows)) if stored[place] != counts[place])
        raise RunError(
            CACHE,
            f"row {rows[place]} has {counts[place]} tokens, and {stored[place]} in the stored teacher {store.folder}",
            "make it again with `gkd cache`",
        )
    wanted = {tap.path.key for tap in forward.taps}
    names = [name for name in store.parts if name.partition(":")[0] in wanted]
    parts = store.read(rows, starts, mask.shape[1], names)
    return layout.decode(parts | store.shared, forward, mask.device)


def refuse_changes(forward: ForwardPlan) -> None:
    """Raise RunError for a forward that is not the model's plain one on the texts of the batch."""
    if forward.changes or forward.inputs or forward.shift or forward.grad:
        raise RunError(CANNOT_RUN, f"`{forward.key}` is no plain forward of a batch, and `{forward.model}` is stored")
