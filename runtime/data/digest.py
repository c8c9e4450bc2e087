"""A hash of the token ids of a loader's rows."""

from __future__ import annotations

import hashlib

import datasets
import numpy as np
import pyarrow.compute

from gkd_dsl.runtime.data.loader import Loader

_ROWS = 10_000
_COLUMNS = ("input_ids", "token_type_ids")


def digest(loader: Loader) -> str:
    """Equal for two loaders whose rows have the same ids, in the same order, with the same rows held out."""
    found = hashlib.sha256()
    for rows in (loader.train_rows, loader.held_out_rows):
        found.update(str(rows.num_rows).encode())
        for column in _COLUMNS:
            if column in rows.column_names:
                _add(found, rows, column)
    return found.hexdigest()[:32]


def _add(found: hashlib._Hash, rows: datasets.Dataset, column: str) -> None:
    for table in rows.select_columns(column).with_format("arrow").iter(batch_size=_ROWS):
        for chunk in table[column].chunks:
            lengths = pyarrow.compute.list_value_length(chunk).to_numpy(zero_copy_only=False)
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            found.update(np.ascontiguousarray(lengths, dtype=np.int64).tobytes())
            found.update(np.ascontiguousarray(values, dtype=np.int64).tobytes())
