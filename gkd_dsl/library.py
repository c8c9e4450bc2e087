"""The method library as data: what each file's header and signature say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from gkd_dsl.meaning.imports import library as names
from gkd_dsl.meaning.imports import library_folder
from gkd_dsl.syntax import ast, parse
from gkd_dsl.text import Source

FIELDS = ("paper", "venue", "arxiv", "equation", "taps", "stages", "teachers", "needs")


@dataclass(frozen=True)
class MethodParam:
    """A parameter of a method, as it is written."""

    name: str
    type: str
    default: str
    within: str
    doc: str


@dataclass(frozen=True)
class MethodInfo:
    """A method: its header and its signature.

    `several` are the formals that may hold a list of models, `indexed` the losses that are a family or a function,
    `beside` the other methods of its file.
    """

    name: str
    title: str
    paper: str
    venue: str
    arxiv: str
    equation: str
    taps: str
    stages: str
    teachers: str
    needs: str
    remarks: str
    roles: tuple[tuple[str, str], ...]
    several: tuple[str, ...]
    params: tuple[MethodParam, ...]
    losses: tuple[str, ...]
    indexed: tuple[str, ...]
    total: bool
    beside: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """For JSON: what the file says."""
        return asdict(self)

    @property
    def labelled(self) -> bool:
        """Whether its stages read labelled rows."""
        return "labelled" in self.needs

    @property
    def short_venue(self) -> str:
        """The venue up to its year: "NeurIPS 2019"."""
        found = re.match(r"(.*?\b(?:19|20)\d\d)\b", self.venue)
        return found[1] if found else self.venue

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of its stages, as the header gives them."""
        return tuple(dict.fromkeys(re.findall(r"[A-Za-z_]\w*", re.sub(r"\(.*?\)|\[.*?\]", "", self.stages))))

    @property
    def reference(self) -> str:
        """Where it was published, with its number on arXiv where it has one."""
        return ", ".join(part for part in (self.venue, f"arXiv {self.arxiv}" if self.arxiv else "") if part)


def method_text(name: str) -> str:
    """The text of a library file. Raises KeyError for a name that is not in the library."""
    path = library_folder() / f"{name}.gkd"
    if not path.is_file():
        raise KeyError(name)
    return path.read_text(encoding="utf-8")


def describe(name: str) -> MethodInfo:
    """A method by the header of its file. Raises KeyError for a name that is not in the library."""
    text = method_text(name)
    file, _ = parse(Source(f"gkd:{name}", text))
    method = next(item for item in file.items if isinstance(item, ast.MethodDecl) and item.name.text == name)
    title, said, remarks = header(text)
    roles = tuple((formal.role, formal.name.text) for formal in method.formals if formal.role is not None)
    params = tuple(
        MethodParam(
            formal.name.text,
            formal.type.name.text,
            formal.default.span.text if formal.default is not None else "required",
            formal.within.span.text if formal.within is not None else "",
            formal.doc or "",
        )
        for formal in method.formals
        if formal.type is not None
    )
    return MethodInfo(
        name=name,
        title=title,
        remarks=remarks,
        roles=roles,
        several=tuple(_several(method, [name for _, name in roles])),
        params=params,
        losses=tuple(dict.fromkeys(stmt.name.text for stmt in method.body if isinstance(stmt, ast.LossDecl))),
        indexed=tuple(
            stmt.name.text
            for stmt in method.body
            if isinstance(stmt, ast.LossDecl) and (stmt.indices or stmt.formals is not None)
        ),
        total=any(isinstance(stmt, ast.Total) for stmt in method.body),
        beside=tuple(
            item.name.text for item in file.items if isinstance(item, ast.MethodDecl) and item.name.text != name
        ),
        **{field: said.get(field, "") for field in FIELDS},
    )


def library() -> list[MethodInfo]:
    """Every method that ships, by name."""
    return [describe(name) for name in names()]


def chosen(
    found: Iterable[MethodInfo], taps: str | None = None, teachers: str | None = None, words: str | None = None
) -> list[MethodInfo]:
    """The methods whose header has `taps` among its taps, `words` anywhere, and that take so many teachers.

    `teachers` is `one`, `several`, or a number. Case is ignored.
    """
    kept = []
    for info in found:
        anywhere = " ".join(str(getattr(info, field)) for field in ("name", "title", "remarks", *FIELDS))
        if taps is not None and taps.lower() not in info.taps.lower():
            continue
        if words is not None and words.lower() not in anywhere.lower():
            continue
        if teachers is None or teachers == ("several" if _takes_several(info) else "one") or teachers == info.teachers:
            kept.append(info)
    return kept


def _takes_several(info: MethodInfo) -> bool:
    return bool(info.several) or sum(role == "teacher" for role, _ in info.roles) > 1


def nodes_of(tree: object) -> Iterator[Any]:
    """A node of the tree and all below it."""
    if isinstance(tree, tuple):
        for item in tree:
            yield from nodes_of(item)
    elif isinstance(tree, ast.Node) and is_dataclass(tree):
        yield tree
        for field in fields(tree):
            yield from nodes_of(getattr(tree, field.name))


def _several(method: ast.MethodDecl, models: list[str]) -> Iterator[str]:
    """The models that the body counts by `teachers(ts)` or picks from by an index."""
    held = set()
    for node in nodes_of(method.body):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "teachers":
            held |= {arg.value.id for arg in node.args if isinstance(arg.value, ast.Name)}
        elif isinstance(node, ast.Index) and isinstance(node.base, ast.Name):
            held.add(node.base.id)
    yield from (name for name in models if name in held)


def header(text: str) -> tuple[str, dict[str, str], str]:
    """The title, the fields and the remarks of the comment block that opens a library file.

    A line below a field that names no field goes on with it. Indented lines of the remarks stay indented.
    """
    block: list[str] = []
    for line in text.splitlines()[1:]:
        if line.startswith("#"):
            block.append(line[1:].removeprefix(" ").rstrip())
        elif block:
            break
    title = next((line for line in block if line), "")
    said: dict[str, str] = {}
    remarks: list[str] = []
    last: str | None = None
    for line in block[block.index(title) + 1 :] if title else []:
        found = re.match(rf"({'|'.join(FIELDS)})\s+(.*)", line)
        if found and found[1] not in said and not remarks:
            last = found[1]
            said[last] = found[2]
        elif not line and not remarks:
            last = None
        elif last is not None and not remarks:
            said[last] += f" {line.strip()}"
        else:
            remarks.append(line)
    return title, said, "\n".join(remarks).strip()


__all__ = [
    "FIELDS",
    "MethodInfo",
    "MethodParam",
    "chosen",
    "describe",
    "header",
    "library",
    "method_text",
    "names",
    "nodes_of",
]
