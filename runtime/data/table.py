"""The rows of a source as a `datasets.Dataset` of named texts, and a digest of what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from gkd_dsl import extension
from gkd_dsl.diagnostics.model import SpecError
from gkd_dsl.graph.nodes import AttrValue, SourceSpec
from gkd_dsl.runtime.data.errors import DataError, disk_is_full
from gkd_dsl.runtime.data.quiet import cache_folder
from gkd_dsl.sources import SOURCES, ReadError, SourceKind, files_of, rows_of, source_kind, used_columns
from gkd_dsl.syntax import ast

# Part of every digest: raise it when the readers give other rows for the same file.
VERSION = "1"
_HASHED_WHOLE = 256 * 1024 * 1024
_READING = ("columns", "delimiter", "quoting", "encoding", "by")


@dataclass(frozen=True)
class Table:
    """Rows with the columns `text`, `text_pair`, `label`, `prompt`, `completion` (those in use)."""

    rows: datasets.Dataset
    digest: str


def kind_of(source: SourceSpec, root: Path | None = None) -> tuple[SourceKind, extension.Registered | None]:
    """The kind of a source; with its function where it is one of the user's (`file.py:name`, from `root`)."""
    if source.kind in SOURCES:
        return SOURCES[source.kind], None
    file, _, name = source.kind.rpartition(":")
    at = str(extension.find(file, root)) if file and root is not None else None
    found = extension.registered("source", name, at)
    if found is None:
        raise DataError(f"there is no source `{source.kind}`", hint="a Python file with it must be imported first")
    try:
        return source_kind(_signature(found), found.extension.doc), found
    except ValueError as error:
        raise DataError(f"the source `{source.kind}` cannot be used: {error}") from error


def _signature(function: extension.Registered) -> ast.Signature:
    # The parser is built on import; only sources written in Python need it here.
    from gkd_dsl.syntax import parse_signature

    try:
        return parse_signature(function.extension.signature, function.file)
    except SpecError as error:
        text = function.extension.signature
        raise DataError(f"the signature `{text}` cannot be read: {error}") from error


def read_table(
    kind: SourceKind, function: extension.Registered | None, args: Mapping[str, AttrValue], root: Path
) -> Table:
    """The rows that the arguments ask for. Raises DataError or ReadError."""
    if function is not None:
        return _from_function(kind, function, args)
    if kind.name == "hf_dataset":
        return _from_datasets(args, root)
    return _from_files(kind, args, root)


def _from_files(kind: SourceKind, args: Mapping[str, AttrValue], root: Path) -> Table:
    """csv, jsonl and text, prepared once in the cache and mapped from there."""
    path = str(args["path"])
    files = files_of(path, root)
    if not files:
        raise DataError(f"no file matches `{path}`", arg="path", hint=f"looked in {root}")
    reading = {name: args[name] for name in _READING if name in args} | {
        role: args.get(role, "") for role in ("text", "text_pair", "label", "prompt", "completion")
    }
    state = hashlib.sha256(json.dumps([VERSION, kind.name, reading], sort_keys=True).encode())
    for file in files:
        _update(state, file)
    digest = state.hexdigest()[:32]
    roles = list(used_columns(args, kind.result))
    features = datasets.Features({role: datasets.Value("string") for role in roles})
    try:
        rows = datasets.Dataset.from_generator(
            _rows,
            features=features,
            cache_dir=str(cache_folder()),
            gen_kwargs={"kind": kind.name, "args": dict(reading), "files": tuple(files)},
            fingerprint=digest,
        )
    except ValueError as error:
        if disk_is_full(error):
            raise
        # `datasets` has no table for a generator that gives nothing.
        raise DataError("the source has no rows", arg="path") from error
    return Table(rows, digest)


def _rows(kind: str, args: Mapping[str, AttrValue], files: tuple[Path, ...]) -> Iterator[dict[str, str | None]]:
    for file in files:
        for row in rows_of(kind, args, file):
            yield row.values


def _update(state: Any, file: Path) -> None:
    """Mix in the content of a file (of a very large one its size and time)."""
    try:
        stat = file.stat()
        state.update(f"{file.name}\0{stat.st_size}\0".encode())
        if stat.st_size > _HASHED_WHOLE:
            state.update(f"{file.resolve()}\0{stat.st_mtime_ns}\0".encode())
            return
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                state.update(block)
    except OSError as error:
        raise ReadError(file, None, f"it cannot be read: {error.strerror or error}") from error


def _from_function(kind: SourceKind, function: extension.Registered, args: Mapping[str, AttrValue]) -> Table:
    """The rows of a user's function, in memory."""
    name = function.extension.name
    own = _signature(function).args
    values = {arg.name.text: args[arg.name.text] for arg in own if arg.name.text in args}
    roles = used_columns(args, kind.result)
    columns: dict[str, list[str | None]] = {role: [] for role in roles}
    state = hashlib.sha256(VERSION.encode())
    for number, row in enumerate(_called(name, function, values)):
        if kind.result == "text":
            if not isinstance(row, str):
                raise DataError(f"`{name}` gave {type(row).__name__} as row {number}, and a text was declared")
            cells: dict[str, object] = {"text": row}
        elif isinstance(row, Mapping):
            missing = [column for column in roles.values() if column not in row]
            if missing:
                keys = ", ".join(map(str, row))
                raise DataError(f"row {number} of `{name}` has no `{missing[0]}`", hint=f"it has {keys}")
            cells = {role: row[column] for role, column in roles.items()}
        else:
            raise DataError(f"`{name}` gave {type(row).__name__} as row {number}, and rows were declared")
        for role, cell in cells.items():
            text = label_text(cell) if role == "label" else cell
            if text is not None and not isinstance(text, str):
                raise DataError(f"`{roles[role]}` in row {number} of `{name}` is not a text")
            columns[role].append(text)
            state.update(repr(text).encode())
    if not columns["completion" if "completion" in columns else "text"]:
        raise DataError(f"`{name}` gave no rows")
    features = datasets.Features({role: datasets.Value("string") for role in roles})
    return Table(datasets.Dataset.from_dict(columns, features=features), state.hexdigest()[:32])


def _called(name: str, function: extension.Registered, values: dict[str, AttrValue]) -> Iterator[object]:
    try:
        result: Iterable[object] = function.function(**values)
        yield from result
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"`{name}` raised {type(error).__name__}: {error}") from error


def _from_datasets(args: Mapping[str, AttrValue], root: Path) -> Table:
    """A data set of the hub, a folder of data files, or one written by `save_to_disk`."""
    path, split = str(args["path"]), str(args["split"])
    folder = Path(path).expanduser()
    folder = folder if folder.is_absolute() else root / folder
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise DataError(
                        f"`{path}` has no split `{split}`", arg="split", hint=f"its splits are {', '.join(loaded)}"
                    )
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(
                str(folder) if folder.is_dir() else path,
                str(args["name"]) or None,
                split=split,
                revision=str(args["revision"]) or None,
            )
    except DataError:
        raise
    except Exception as error:
        raise _not_loaded(path, error) from error
    roles = used_columns(args)
    for role, column in roles.items():
        if column not in loaded.column_names:
            hint = f"its columns are {', '.join(loaded.column_names)}"
            raise DataError(f"`{path}` has no column `{column}`", arg=role, hint=hint)
    digest = hashlib.sha256(json.dumps([VERSION, loaded._fingerprint, roles]).encode()).hexdigest()[:32]
    if len(set(roles.values())) < len(roles):
        raise DataError("two of its arguments name the same column", arg="text")
    kept = loaded.select_columns(list(roles.values()))
    kept = kept.rename_columns({column: role for role, column in roles.items() if column != role})
    return Table(kept, digest)


def _not_loaded(path: str, error: Exception) -> DataError:
    """What `datasets` says, with what to do about it."""
    name, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, ConnectionError) or "Connection" in name or "Offline" in name or "Offline" in text:
        message = f"`{path}` is no folder here, and the hub cannot be reached"
        return DataError(message, arg="path", hint="download the data set first, or give a folder")
    if name in ("DatasetNotFoundError", "RepositoryNotFoundError"):
        message = f"there is no data set `{path}` on the hub that you may read"
        return DataError(message, arg="path", hint="check its name; for a private one, log in by `hf auth login`")
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return DataError(f"`{path}` cannot be loaded: {text or name}", arg="path")


def label_text(value: object) -> str | None:
    """A label of any type as the text that stands for it in a file."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, int | float) else str(value)


def labels_of(table: Table) -> list[str | None]:
    """The label of every row, as text."""
    return [label_text(value) for value in table.rows.with_format("python")["label"]]


def texts_missing(rows: datasets.Dataset, main: str) -> list[bool]:
    """Of every row whether its main text is missing or blank. Raises DataError where a cell is not a text."""
    found: list[bool] = []
    for batch in rows.select_columns([main]).iter(10_000):
        for value in batch[main]:
            if value is not None and not isinstance(value, str):
                raise DataError(f"the column for `{main}` holds {type(value).__name__} values, not texts", arg=main)
            found.append(not (value or "").strip())
    return found
