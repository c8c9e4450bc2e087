"""Rows of csv, jsonl and text files, with the line of each: the one reader of the checks and of a run."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.places import expanded, is_file

FIELDS = ("text", "text_pair", "label", "prompt", "completion")


class ReadError(Exception):
    """A file that cannot be read as its source says; `arg` is the argument at fault, `line` is 1-based."""

    def __init__(self, path: Path, line: int | None, message: str, arg: str = "path", hint: str | None = None) -> None:
        super().__init__(path, line, message, arg, hint)
        self.path, self.line, self.message, self.arg, self.hint = path, line, message, arg, hint

    def __str__(self) -> str:
        place = f"{self.path.name}:{self.line}" if self.line else self.path.name
        return f"{place}: {self.message}" + (f"; {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class Row:
    """The used columns of a row, by role (`text`, `label`, ...); None where the file has no value."""

    line: int
    values: dict[str, str | None]


def used_columns(args: Mapping[str, AttrValue], result: str = "rows") -> dict[str, str]:
    """Role -> column name, for the roles that the source reads. A completion replaces the text."""
    if result == "text":
        return {"text": "text"}
    roles = {role: str(args.get(role) or "") for role in FIELDS}
    if roles["completion"]:
        roles["text"] = roles["text_pair"] = ""
    return {role: column for role, column in roles.items() if column}


def files_of(path: str, root: Path) -> list[Path]:
    """The files that a path or a pattern names, sorted; a path without a pattern gives itself."""
    full = expanded(path)
    full = full if full.is_absolute() else root / full
    if os.path.exists(full) or not glob.has_magic(path):
        return [full]
    return sorted(Path(name) for name in glob.glob(str(full), recursive=True) if is_file(Path(name)))


def delimiter_of(args: Mapping[str, AttrValue], path: Path) -> str:
    """The character between cells: `auto` is a tab for `.tsv` and `.tab`, else a comma."""
    delimiter = str(args.get("delimiter") or "auto")
    if delimiter == "auto":
        return "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    return {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter)


@contextmanager
def opened(path: Path, encoding: str) -> Iterator[TextIO]:
    """The file as text, line ends untouched; what goes wrong while it is read becomes a ReadError."""
    codec = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    try:
        with path.open(encoding=codec, newline="") as handle:
            yield handle
    except UnicodeDecodeError as error:
        raise ReadError(
            path,
            None,
            f"it is not {encoding}: byte 0x{error.object[error.start]:02x} cannot be read",
            "encoding",
            'name the encoding of the file, such as `encoding = "latin-1"`',
        ) from error
    except OSError as error:
        raise ReadError(path, None, f"it cannot be read: {error.strerror or error}") from error


def csv_table(path: Path, args: Mapping[str, AttrValue]) -> Iterator[tuple[int, list[str]]]:
    """Every line's cells, the header too, with the line it begins at; blank lines are skipped."""
    with opened(path, str(args.get("encoding") or "utf-8")) as handle:
        quoting = args.get("quoting", True)
        reader = csv.reader(
            handle,
            delimiter=delimiter_of(args, path),
            quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        )
        line = 1
        try:
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            hint = 'if `"` is a character of the text, write `quoting = false`' if quoting else None
            raise ReadError(path, line, f"a cell cannot be read ({error})", "quoting", hint) from error


def header_of(path: Path, args: Mapping[str, AttrValue]) -> list[str]:
    """The names of the columns of a csv file: `columns`, or its first line."""
    columns = args.get("columns") or ()
    if isinstance(columns, tuple) and columns:
        return [str(name) for name in columns]
    for _, cells in csv_table(path, args):
        return cells
    raise ReadError(path, None, "it is empty")


def csv_rows(path: Path, args: Mapping[str, AttrValue]) -> Iterator[Row]:
    """The rows of a csv file."""
    header = header_of(path, args)
    places = {}
    for role, column in used_columns(args).items():
        if column not in header:
            raise ReadError(path, None, f"it has no column `{column}`", role, f"its columns are {', '.join(header)}")
        places[role] = header.index(column)
    table = csv_table(path, args)
    if not args.get("columns"):
        next(table, None)
    for line, cells in table:
        if len(cells) != len(header):
            raise width_error(path, line, cells, header, bool(args.get("quoting", True)))
        yield Row(line, {role: cells[place] for role, place in places.items()})


def width_error(path: Path, line: int, cells: Sequence[str], header: Sequence[str], quoting: bool) -> ReadError:
    """The error for a row that is wider or narrower than the header."""
    hint = "check the line and the delimiter"
    if quoting and any('"' in cell or "\n" in cell for cell in cells):
        hint = 'if `"` is a character of the text and not a quote, write `quoting = false`'
    count = f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"
    return ReadError(path, line, f"the row has {count}, {len(header)} columns are named", "path", hint)


def json_lines(path: Path, args: Mapping[str, AttrValue]) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of a jsonl file with their lines; blank lines are skipped."""
    with opened(path, str(args.get("encoding") or "utf-8")) as handle:
        for line, text in enumerate(handle, 1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except ValueError as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise ReadError(path, line, f"the line is not JSON ({reason})", hint=_jsonl_hint(text, line)) from error
            if not isinstance(value, dict):
                found = (
                    "a list"
                    if isinstance(value, list)
                    else "a text"
                    if isinstance(value, str)
                    else "a number or a word"
                )
                hint = 'each line is one object, such as {"text": "..."}'
                raise ReadError(path, line, f"the line holds {found}, not an object", hint=hint)
            yield line, value


def _jsonl_hint(text: str, line: int) -> str | None:
    if line == 1 and text.strip() in ("[", "{"):
        return "this looks like one JSON document over many lines; jsonl has one object a line"
    return None


def json_rows(path: Path, args: Mapping[str, AttrValue]) -> Iterator[Row]:
    """The rows of a jsonl file. Numbers and truth values in the label column become their JSON text."""
    roles = used_columns(args)
    for line, value in json_lines(path, args):
        values: dict[str, str | None] = {}
        for role, column in roles.items():
            if column not in value:
                keys = ", ".join(list(value)[:12]) or "none"
                raise ReadError(path, line, f"the object has no key `{column}`", role, f"its keys are {keys}")
            cell = value[column]
            if cell is None or isinstance(cell, str):
                values[role] = cell
            elif role == "label" and isinstance(cell, int | float):
                values[role] = json.dumps(cell)
            else:
                names = {"list": "a list", "dict": "an object", "bool": "a truth value"}
                kind = names.get(type(cell).__name__, "a number")
                raise ReadError(path, line, f"`{column}` is {kind}, not a text", role)
        yield Row(line, values)


def text_rows(path: Path, args: Mapping[str, AttrValue]) -> Iterator[Row]:
    """The lines, paragraphs or whole of a text file; blank ones are skipped."""
    by = args.get("by", "line")
    with opened(path, str(args.get("encoding") or "utf-8")) as handle:
        if by == "file":
            whole = handle.read().strip()
            if whole:
                yield Row(1, {"text": whole})
            return
        block: list[str] = []
        start = 1
        for line, text in enumerate(handle, 1):
            stripped = text.strip()
            if by == "line":
                if stripped:
                    yield Row(line, {"text": stripped})
            elif stripped:
                start = line if not block else start
                block.append(stripped)
            elif block:
                yield Row(start, {"text": " ".join(block)})
                block = []
        if block:
            yield Row(start, {"text": " ".join(block)})


def rows_of(kind: str, args: Mapping[str, AttrValue], path: Path) -> Iterator[Row]:
    """The rows of one file of a `csv`, `jsonl` or `text` source. Raises ReadError."""
    return {"csv": csv_rows, "jsonl": json_rows, "text": text_rows}[kind](path, args)
