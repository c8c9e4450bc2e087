"""A data source for a new spec, found out from a file: its kind, its columns, its labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from gkd_dsl.diagnostics.suggest import did_you_mean
from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.places import is_dir, is_file
from gkd_dsl.sources import label_count
from gkd_dsl.sources.checks import SCANNED_ROWS, looks_like_header
from gkd_dsl.sources.labels import label_map
from gkd_dsl.sources.readers import ReadError, csv_table, json_lines, rows_of

KINDS = {
    ".csv": "csv", ".tsv": "csv", ".tab": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".txt": "text", ".text": "text",
}  # fmt: skip
_TEXTS = (
    "text", "sentence", "review", "content", "document", "comment", "utterance", "tweet", "title", "question",
    "sentence1",
)  # fmt: skip
_PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text_a", "text_b"), ("text1", "text2"), ("question", "passage"), ("text", "text_pair"),
)  # fmt: skip
_PROMPTS = (("prompt", "completion"), ("instruction", "output"), ("instruction", "response"), ("question", "answer"))
_LABELS = ("label", "labels", "class", "target", "gold_label", "sentiment", "category", "rating", "stars", "score", "y")
_LOOKED = 400


class InitError(Exception):
    """What keeps a spec from being written: a message, and what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint


@dataclass(frozen=True)
class Found:
    """A source: its kind, and its arguments as they are written. `classes`: how many labels were counted."""

    kind: str
    args: tuple[tuple[str, str], ...]
    comments: tuple[str, ...] = ()
    classes: int | None = None

    def words(self, place: str) -> list[str]:
        """The arguments of the call as they are written; `place` is the file."""
        return [_quoted(place), *(f"{name} = {value}" for name, value in self.args)]

    @property
    def labelled(self) -> bool:
        """Whether it reads a column of labels."""
        return any(name == "label" for name, _ in self.args)


@dataclass
class _Table:
    """The columns of a file, its first rows, and the arguments that read it so."""

    kind: str
    columns: list[str]
    rows: list[list[str]]
    args: dict[str, AttrValue] = field(default_factory=dict)
    named: bool = True


def kind_of(path: Path) -> str:
    """The source for a file's ending. Raises InitError for another one."""
    found = KINDS.get(path.suffix.lower())
    if found is None:
        raise InitError(
            f"--data {path}: no source reads a file that ends in {path.suffix or 'nothing'}",
            "give a .csv, .tsv, .jsonl or .txt file",
        )
    return found


def found_in(path: Path, *, labels: bool, text: str | None, label: str | None, causal: bool = False) -> Found:
    """The source that reads a file, with its labels where `labels` asks for them.

    Raises InitError for a file that is not there or cannot be read, and where a column cannot be told.
    """
    kind = kind_of(path)
    if not is_file(path):
        near = did_you_mean(path.name, [each.name for each in path.parent.glob("*")] if is_dir(path.parent) else [])
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path; it starts at the current folder"
        raise InitError(f"--data {path}: there is no such file", hint)
    try:
        if kind == "text":
            return _plain(path, labels)
        table = _csv(path) if kind == "csv" else _jsonl(path)
        return _columns(path, table, labels=labels, text=text, label=label, causal=causal)
    except ReadError as error:
        raise InitError(f"--data {error}") from error


def _plain(path: Path, labels: bool) -> Found:
    if labels:
        raise InitError(f"--data {path}: a text file has no labels, and the method reads them", "give a table")
    if next(rows_of("text", {}, path), None) is None:
        raise InitError(f"--data {path}: it holds no text")
    return Found("text", (), ("One text a line.",))


def _csv(path: Path) -> _Table:
    """The table with the delimiter and the quoting that give every row as many cells as the first."""
    tried: list[dict[str, AttrValue]] = [{}, {"quoting": False}]
    tried += [{"delimiter": other, **more} for other in ("tab", ";", "|") for more in tried[:2]]
    best: tuple[int, dict[str, AttrValue], list[list[str]]] | None = None
    for args in tried:
        try:
            cells = [row for _, row in islice(csv_table(path, args), _LOOKED)]
        except ReadError as error:
            if error.arg == "encoding":
                raise
            continue
        widths = {len(row) for row in cells}
        if len(widths) == 1 and widths != {1}:
            best = (0, args, cells)
            break
        if cells and (best is None or len(widths) < best[0]):
            best = (len(widths), args, cells)
    if best is None or not best[2]:
        raise InitError(f"--data {path}: it holds no rows")
    _, args, cells = best
    if looks_like_header(cells[0]):
        return _Table("csv", cells[0], cells[1:], args)
    names = [f"column_{place}" for place in range(1, len(cells[0]) + 1)]
    return _Table("csv", names, cells, {**args, "columns": tuple(names)}, named=False)


def _jsonl(path: Path) -> _Table:
    objects = [value for _, value in islice(json_lines(path, {}), _LOOKED)]
    if not objects:
        raise InitError(f"--data {path}: it holds no objects")
    columns = list(objects[0])
    return _Table("jsonl", columns, [[_cell(each.get(name)) for name in columns] for each in objects])


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _columns(path: Path, table: _Table, *, labels: bool, text: str | None, label: str | None, causal: bool) -> Found:
    for option, name in (("--text", text), ("--label", label)):
        if name is not None and name not in table.columns:
            near = did_you_mean(name, table.columns)
            hint = f"did you mean {near[0]}?" if near else f"its columns are {', '.join(table.columns)}"
            raise InitError(f"{option} {name}: {path.name} has no such column", hint)
    comments = [] if table.named else ["The file has no header line: its columns are named here."]
    args: dict[str, str] = {name: _written(value) for name, value in table.args.items()}
    by_letters = {name.lower(): name for name in table.columns}
    if causal and text is None:
        for prompt, completion in _PROMPTS:
            if prompt in by_letters and completion in by_letters:
                args |= {"prompt": _quoted(by_letters[prompt]), "completion": _quoted(by_letters[completion])}
                return Found(table.kind, tuple(args.items()), (*comments, "The prompt is read and not learned."))
    answer = _label(path, table, label) if labels else None
    first, second = _text(table, by_letters, answer, text)
    args["text"] = _quoted(first)
    if second is not None:
        args["text_pair"] = _quoted(second)
    if answer is None:
        return Found(table.kind, tuple(args.items()), tuple(comments))
    args["label"] = _quoted(answer)
    classes = _classes(path, table, answer, args, comments)
    return Found(table.kind, tuple(args.items()), tuple(comments), classes)


def _label(path: Path, table: _Table, label: str | None) -> str:
    """The column of labels: as asked for, by its name, or the one that has few values."""
    if label is not None:
        return label
    for name in _LABELS:
        for column in table.columns:
            if column.lower() == name:
                return column
    few = [
        column
        for place, column in enumerate(table.columns)
        if 1 < len({row[place] for row in table.rows if place < len(row)}) <= max(2, min(20, len(table.rows) // 4))
    ]
    if len(few) == 1:
        return few[0]
    raise InitError(
        f"--data {path}: which column holds the label cannot be told, and the method reads labels",
        f"write --label COLUMN; its columns are {', '.join(table.columns)}",
    )


def _text(table: _Table, by_letters: Mapping[str, str], label: str | None, text: str | None) -> tuple[str, str | None]:
    """The column of texts, and that of second texts where the names say so; else the longest cells."""
    if text is not None:
        return text, None
    for first, second in _PAIRS:
        if first in by_letters and second in by_letters:
            return by_letters[first], by_letters[second]
    for name in _TEXTS:
        if name in by_letters and by_letters[name] != label:
            return by_letters[name], None
    lengths = {
        column: sum(len(row[place]) for row in table.rows if place < len(row))
        for place, column in enumerate(table.columns)
        if column != label
    }
    if not lengths:
        raise InitError(f"the column {label} is the only one, so there is no text", "give a table with a text column")
    return max(lengths, key=lambda column: lengths[column]), None


def _classes(path: Path, table: _Table, label: str, args: dict[str, str], comments: list[str]) -> int | None:
    """How many classes the labels have; numbers that are no classes are parted at 0."""
    read: dict[str, AttrValue] = {**table.args, "label": label, "text": ""}
    try:
        found = {row.values["label"] or "" for row in islice(rows_of(table.kind, read, path), SCANNED_ROWS)}
        label_map(read, "classification", found)
    except ValueError as error:
        args["threshold"] = "0.0"
        comments.append(f"{str(error)[:1].upper()}{str(error)[1:]}: above the threshold is class 1, below it 0.")
        return 2
    return label_count(table.kind, {"path": str(path), **read}, path.parent)


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _written(value: AttrValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(_quoted(str(item)) for item in value)}]"
    return _quoted(str(value))
