"""Data sources: which there are, their arguments, and the checks of their files. Imports no torch."""

from __future__ import annotations

from gkd_dsl.sources.arguments import (
    COMMON,
    SOURCES,
    SourceArg,
    SourceKind,
    SourceProblem,
    bind_source,
    filled,
    source_kind,
)
from gkd_dsl.sources.checks import check_source, columns_of, label_count, task_of
from gkd_dsl.sources.labels import LabelMap, label_map
from gkd_dsl.sources.readers import ReadError, Row, files_of, rows_of, used_columns

__all__ = [
    "COMMON",
    "SOURCES",
    "LabelMap",
    "ReadError",
    "Row",
    "SourceArg",
    "SourceKind",
    "SourceProblem",
    "bind_source",
    "check_source",
    "columns_of",
    "files_of",
    "filled",
    "label_count",
    "label_map",
    "rows_of",
    "source_kind",
    "task_of",
    "used_columns",
]
