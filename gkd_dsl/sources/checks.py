"""Checks of a source before a run: its files, its columns and its labels, from the first rows only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.models.info import Task
from gkd_dsl.places import entries, expanded, is_dir, is_file
from gkd_dsl.sources.arguments import SOURCES, SourceKind, SourceProblem, bind_source, filled
from gkd_dsl.sources.labels import label_map, number_of, written
from gkd_dsl.sources.readers import (
    ReadError,
    csv_table,
    delimiter_of,
    files_of,
    header_of,
    json_lines,
    rows_of,
    used_columns,
    width_error,
)
from gkd_dsl.types import BATCH, LENGTH, TensorType

CHECKED_ROWS = 200
SCANNED_ROWS = 200_000

PATHS_START = "paths start at the folder of the spec"
_BATCH_LENGTH = (BATCH, LENGTH)


def task_of(args: Mapping[str, AttrValue], task: Task) -> str:
    """What the rows are made into: `task`, or for `auto` what the student's head asks for.

    `classification`, `regression`, `masked_lm`, `causal_lm` or `sentences` (no labels).
    """
    asked = args.get("task") or "auto"
    if asked != "auto":
        return str(asked)
    if task in ("masked_lm", "causal_lm"):
        return task
    return "classification" if args.get("label") else "sentences"


def columns_of(
    kind: str | SourceKind, args: Mapping[str, AttrValue], task: Task = "encoder", *, token_types: bool = True
) -> dict[str, TensorType]:
    """The batch columns that the source gives to a student with this head.

    `input_ids`, `attention_mask` (1 for tokens, 0 for padding) and, where the tokenizer gives them,
    `token_type_ids`: Int[B, L]. `labels`: Int[B] of classes, Float[B] for regression, Int[B, L] for masked
    and causal models, -100 where nothing is to be predicted; causal labels are not shifted.
    """
    shape = _kind(kind)
    found: dict[str, TensorType] = {name: TensorType("int", _BATCH_LENGTH) for name in ("input_ids", "attention_mask")}
    if token_types:
        found["token_type_ids"] = TensorType("int", _BATCH_LENGTH)
    made = task_of(filled(shape, args), task)
    if made == "classification":
        found["labels"] = TensorType("int", (BATCH,))
    elif made == "regression":
        found["labels"] = TensorType("float", (BATCH,))
    elif made in ("masked_lm", "causal_lm"):
        found["labels"] = TensorType("int", _BATCH_LENGTH)
    return found


def label_count(kind: str | SourceKind, args: Mapping[str, AttrValue], root: Path) -> int | None:
    """The number of classes, or None where it cannot be known cheaply.

    2 with `threshold`, the length of `labels`, else counted over up to 200 000 rows of a local file
    (None for a longer one), or read from the features of a folder written by `save_to_disk`.
    """
    shape = _kind(kind)
    args = filled(shape, args)
    if task_of(args, "classification") != "classification":
        return None
    try:
        known = label_map(args, "classification", None)
        if known.classes is not None:
            return known.classes
        if not args.get("label"):
            return None
        if shape.name == "hf_dataset":
            return _class_label_count(args, root)
        if shape.name not in ("csv", "jsonl"):
            return None
        found: set[str] = set()
        seen = 0
        for path in files_of(str(args["path"]), root):
            for row in rows_of(shape.name, args, path):
                seen += 1
                if seen > SCANNED_ROWS:
                    return None
                if row.values["label"] is not None:
                    found.add(row.values["label"])
        return label_map(args, "classification", found).classes
    except (ReadError, ValueError, OSError):
        return None


def check_source(kind: str | SourceKind, args: Mapping[str, AttrValue], root: Path) -> list[SourceProblem]:
    """What is wrong with a source: arguments, files, columns, and the first 200 rows of its first file.

    Relative paths start at `root`. Reads neither the hub nor the whole file.
    """
    shape = SOURCES.get(kind) if isinstance(kind, str) else kind
    if shape is None:
        near = tuple(get_close_matches(str(kind), SOURCES, 2, 0.6))
        return [SourceProblem("", f"there is no source `{kind}`", near, f"one of {', '.join(SOURCES)}")]
    bound, problems = bind_source(shape, (), args)
    if problems:
        return problems
    problems = list(_disagreements(bound))
    if shape.name not in SOURCES and isinstance(bound["held_out"], str):
        message = "a source of your own holds out a share of its rows, not a file"
        problems.append(SourceProblem("held_out", message, hint="such as `held_out = 10%`"))
    if shape.name in SOURCES and not problems:
        problems += _check_files(shape, bound, root)
        held_out = bound.get("held_out")
        if not problems and isinstance(held_out, str) and shape.name != "hf_dataset":
            apart = {**bound, "path": held_out}
            problems += [_at(problem, "held_out") for problem in _check_files(shape, apart, root)]
    return problems


def _kind(kind: str | SourceKind) -> SourceKind:
    return SOURCES[kind] if isinstance(kind, str) else kind


def _at(problem: SourceProblem, arg: str) -> SourceProblem:
    place = arg if problem.kind in ("file", "row") else problem.arg
    return SourceProblem(place, problem.message, problem.near, problem.hint, problem.kind)


def _disagreements(args: Mapping[str, AttrValue]) -> Iterator[SourceProblem]:
    """Arguments that are right each alone and not together."""
    labelled = bool(args.get("label"))
    task = args.get("task")
    if "label" in args and task in ("classification", "regression") and not labelled:
        yield SourceProblem("task", f"`task = {task}` needs labels, and no column is named", hint='add `label = "..."`')
    if args.get("threshold") is not None and args.get("labels"):
        yield SourceProblem("labels", "`threshold` and `labels` both say how labels are numbered", hint="keep one")
    for name in ("threshold", "labels"):
        if args.get(name) not in (None, ()) and "label" in args and not labelled:
            yield SourceProblem(name, f"`{name}` needs a label column, and none is named", hint='add `label = "..."`')
    labels = args.get("labels")
    if isinstance(labels, tuple) and len({written(label) for label in labels}) < len(labels):
        yield SourceProblem("labels", "a label stands twice in `labels`")
    if args.get("prompt") and not args.get("completion"):
        yield SourceProblem("prompt", "`prompt` needs `completion`, the column that is learned")
    used = used_columns(args) if "text" in args else {}
    for role, column in used.items():
        if list(used.values()).index(column) != list(used).index(role):
            yield SourceProblem(role, f"the column `{column}` is named by two arguments", kind="column")
    columns = args.get("columns")
    if isinstance(columns, tuple) and columns:
        if any(not isinstance(name, str) or not name for name in columns):
            yield SourceProblem("columns", "`columns` is a list of names")
        elif len(set(columns)) < len(columns):
            yield SourceProblem("columns", "a name stands twice in `columns`")
    delimiter = args.get("delimiter")
    if isinstance(delimiter, str) and delimiter not in ("auto", "tab", "\\t") and len(delimiter) != 1:
        yield SourceProblem("delimiter", "`delimiter` is one character, `tab` or `auto`")
    encoding = args.get("encoding")
    if isinstance(encoding, str):
        try:
            "".encode(encoding)
        except (LookupError, ValueError):
            yield SourceProblem("encoding", f"there is no encoding `{encoding}`", hint='such as "utf-8" or "latin-1"')


def _check_files(kind: SourceKind, args: Mapping[str, AttrValue], root: Path) -> list[SourceProblem]:
    path = str(args["path"])
    if not path:
        return [SourceProblem("path", "the path is empty", kind="file")]
    if kind.name == "hf_dataset":
        try:
            return _check_dataset(args, root)
        except ReadError as error:
            return [SourceProblem("path", f"`{error.path.name}`: {error.message}", hint=error.hint, kind="file")]
    files = files_of(path, root)
    if not files:
        return [SourceProblem("path", f"no file matches `{path}`", kind="file", hint=PATHS_START)]
    problem = _check_readable(files[0], path, root)
    if problem:
        return [problem]
    check = {"csv": _check_csv, "jsonl": _check_jsonl, "text": _check_text}[kind.name]
    try:
        return check(files[0], args)
    except ReadError as error:
        place = f"`{error.path.name}`" + (f", line {error.line}" if error.line else "")
        group = "row" if error.line else "column" if error.arg not in ("path", "encoding") else "file"
        return [SourceProblem(error.arg, f"{place}: {error.message}", hint=error.hint, kind=group)]  # type: ignore[arg-type]


def _check_readable(file: Path, written: str, root: Path) -> SourceProblem | None:
    if not os.path.exists(file):
        folder = file.parent
        if not is_dir(folder):
            return SourceProblem("path", f"there is no folder `{Path(written).parent}`", kind="file", hint=PATHS_START)
        names = sorted(entry.name for entry in entries(folder) if is_file(entry))
        near = get_close_matches(file.name, names, 3, 0.6) or [
            name for name in names if Path(name).stem.lower() == file.stem.lower()
        ]
        parent = Path(written).parent
        near = [name if str(parent) == "." else f"{parent.as_posix()}/{name}" for name in near]
        return SourceProblem("path", f"there is no file `{written}`", tuple(near), PATHS_START, "file")
    if is_dir(file):
        return SourceProblem(
            "path", f"`{written}` is a folder", kind="file", hint=f"for all its files, write `{written.rstrip('/')}/*`"
        )
    try:
        with file.open("rb") as handle:
            first = handle.read(4096)
    except OSError as error:
        return SourceProblem("path", f"`{written}` cannot be read: {error.strerror}", kind="file")
    if not first.strip():
        return SourceProblem("path", f"`{written}` is empty", kind="file")
    if first[:2] == b"\x1f\x8b" or first[:4] == b"PK\x03\x04":
        return SourceProblem("path", f"`{written}` is compressed", kind="file", hint="unpack it first")
    return None


def _check_csv(path: Path, args: Mapping[str, AttrValue]) -> list[SourceProblem]:
    header = header_of(path, args)
    delimiter = delimiter_of(args, path)
    problems = _check_delimiter(path, header, delimiter, args)
    if problems:
        return problems
    for role, column in used_columns(args).items():
        if column not in header:
            near = tuple(get_close_matches(column, header, 2, 0.6)) or _same_letters(column, header)
            problems.append(SourceProblem(role, f"`{path.name}` has no column `{column}`", near, None, "column"))
    if problems:
        hint = f"its columns are {', '.join(header[:20])}"
        if not args.get("columns") and not looks_like_header(header):
            names = ", ".join(json.dumps(name) for name in _names_for(len(header), list(used_columns(args).values())))
            hint = f"its first line looks like a row; if it has no header, name the columns: `columns = [{names}]`"
        return [SourceProblem(p.arg, p.message, p.near, hint, p.kind) for p in problems]
    table = csv_table(path, args)
    if not args.get("columns"):
        next(table, None)
    rows = 0
    for line, cells in islice(table, CHECKED_ROWS):
        rows += 1
        if len(cells) != len(header):
            error = width_error(path, line, cells, header, bool(args.get("quoting", True)))
            message, place = (
                f"`{path.name}`, line {line}: {error.message}",
                "columns" if args.get("columns") else "path",
            )
            return [SourceProblem(place, message, hint=error.hint, kind="row")]
    if not rows:
        return [SourceProblem("path", f"`{path.name}` has a header and no rows", kind="file")]
    return _check_labels("csv", path, args)


def _check_delimiter(
    path: Path, header: list[str], delimiter: str, args: Mapping[str, AttrValue]
) -> list[SourceProblem]:
    """Another character that parts the first lines evenly, where the delimiter in use does not."""
    missing = any(column not in header for column in used_columns(args).values())
    lines = [cells for _, cells in islice(csv_table(path, args), 20)]
    widths = {len(cells) for cells in lines}
    if not (widths == {1} or (missing and len(widths) > 1)):
        return []
    least = len(args.get("columns") or ()) or 2  # type: ignore[arg-type]
    for other, name in (("\t", "tab"), (";", ";"), ("|", "|"), (",", ",")):
        parts = {len(delimiter.join(cells).split(other)) for cells in lines}
        if other != delimiter and len(parts) == 1 and parts.pop() >= least:
            shown, used = ("a tab" if char == "\t" else f"`{char}`" for char in (other, delimiter))
            message = f"the lines of `{path.name}` are parted by {shown}, not by {used}"
            return [SourceProblem("delimiter", message, (name,), f'write `delimiter = "{name}"`', "column")]
    return []


def looks_like_header(cells: list[str]) -> bool:
    """Short, filled, distinct cells without numbers are names of columns."""
    return len(set(cells)) == len(cells) and all(
        cell.strip() and len(cell) <= 40 and number_of(cell) is None for cell in cells
    )


def _names_for(count: int, wanted: list[str]) -> list[str]:
    """A guess to be edited: the wanted names last, as files have an id first and the text at the end."""
    rest = [f"column_{place}" for place in range(1, max(0, count - len(wanted)) + 1)]
    return [*rest, *wanted][:count]


def _same_letters(name: str, names: list[str]) -> tuple[str, ...]:
    plain = "".join(filter(str.isalnum, name)).lower()
    return tuple(other for other in names if "".join(filter(str.isalnum, other)).lower() == plain)


def _check_jsonl(path: Path, args: Mapping[str, AttrValue]) -> list[SourceProblem]:
    for _, value in json_lines(path, args):
        problems = []
        for role, column in used_columns(args).items():
            if column not in value:
                near = tuple(get_close_matches(column, list(value), 2, 0.6)) or _same_letters(column, list(value))
                hint = f"its keys are {', '.join(list(value)[:20])}"
                message = f"the first object of `{path.name}` has no key `{column}`"
                problems.append(SourceProblem(role, message, near, hint, "column"))
        if problems:
            return problems
        break
    return _check_labels("jsonl", path, args)


def _check_text(path: Path, args: Mapping[str, AttrValue]) -> list[SourceProblem]:
    return (
        []
        if next(rows_of("text", args, path), None)
        else [SourceProblem("path", f"`{path.name}` holds no text", kind="file")]
    )


def _check_labels(kind: str, path: Path, args: Mapping[str, AttrValue]) -> list[SourceProblem]:
    """Labels of the first rows against `threshold`, `labels` and the task; also reads those rows."""
    rows = list(islice(rows_of(kind, args, path), CHECKED_ROWS))
    if not rows:
        return [SourceProblem("path", f"`{path.name}` has no rows", kind="file")]
    main = "completion" if args.get("completion") else "text"
    if all(not (row.values.get(main) or "").strip() for row in rows):
        column = args.get(main)
        message = f"the column `{column}` of `{path.name}` is empty in the first {len(rows)} rows"
        return [SourceProblem(main, message, kind="column")]
    task = task_of(args, "classification")
    if not args.get("label") or task not in ("classification", "regression"):
        return []
    found = [(row.line, row.values["label"]) for row in rows]
    try:
        mapping = label_map(args, task, [label for _, label in found if label is not None])
    except ValueError as error:
        hint = 'for two classes write `threshold = 0.0`; to predict the number, `task = "regression"`'
        return [SourceProblem("label", f"{error}", hint=hint, kind="column")]
    for line, label in found:
        if label is None or not label.strip():
            return [SourceProblem("label", f"`{path.name}`, line {line}: the label is missing", kind="row")]
        try:
            mapping.number(label)
        except ValueError as error:
            place = "threshold" if mapping.kind == "threshold" else "labels" if mapping.kind == "names" else "label"
            near = tuple(get_close_matches(label, mapping.names, 1, 0.6))
            return [SourceProblem(place, f"`{path.name}`, line {line}: {error}", near, kind="row")]
    return []


def _saved_folder(args: Mapping[str, AttrValue], root: Path) -> Path | None:
    """The local folder of a data set, or None for a hub id."""
    path = expanded(str(args["path"]))
    full = path if path.is_absolute() else root / path
    return full if is_dir(full) else None


def _features(folder: Path, split: str) -> dict[str, object] | None:
    """The features of a folder written by `save_to_disk`, where it is one."""
    for candidate in (folder / split, folder):
        info = candidate / "dataset_info.json"
        if is_file(candidate / "state.json") and is_file(info):
            features = _object(info).get("features")
            return features if isinstance(features, dict) else None
    return None


def _object(file: Path) -> dict[str, object]:
    """The JSON object in a file of a saved data set. Raises ReadError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReadError(file, None, f"it cannot be read as JSON ({error})", hint="save the data set again") from error
    if not isinstance(found, dict):
        raise ReadError(file, None, "it holds no JSON object", hint="save the data set again")
    return found


def _check_dataset(args: Mapping[str, AttrValue], root: Path) -> list[SourceProblem]:
    path, split = str(args["path"]), str(args["split"])
    folder = _saved_folder(args, root)
    if folder is None:
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            return [SourceProblem("path", f"there is no folder `{path}`", kind="file", hint=PATHS_START)]
        return []
    splits = folder / "dataset_dict.json"
    if is_file(splits):
        listed = _object(splits).get("splits")
        names = [str(name) for name in listed] if isinstance(listed, list) else []
        held_out = args.get("held_out")
        asked = [("split", split), *([("held_out", held_out)] if isinstance(held_out, str) else [])]
        for arg, name in asked:
            if name not in names:
                near = tuple(get_close_matches(name, names, 2, 0.5))
                hint = f"its splits are {', '.join(names)}"
                return [SourceProblem(arg, f"`{path}` has no split `{name}`", near, hint, "column")]
    elif not any(is_file(entry) for entry in folder.rglob("*")):
        return [SourceProblem("path", f"the folder `{path}` is empty", kind="file")]
    features = _features(folder, split)
    if features is None:
        return []
    problems = []
    for role, column in used_columns(args).items():
        if column not in features:
            near = tuple(get_close_matches(column, features, 2, 0.6))
            hint = f"its columns are {', '.join(features)}"
            problems.append(SourceProblem(role, f"`{path}` has no column `{column}`", near, hint, "column"))
    return problems


def _class_label_count(args: Mapping[str, AttrValue], root: Path) -> int | None:
    folder = _saved_folder(args, root)
    features = _features(folder, str(args["split"])) if folder else None
    feature = (features or {}).get(str(args["label"]))
    names = feature.get("names") if isinstance(feature, dict) else None
    return len(names) if isinstance(names, list) else None
