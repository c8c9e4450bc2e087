"""The method library as data: what each file's header and signature say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gkd_dsl.meaning.imports import library as names
from gkd_dsl.meaning.imports import library_folder
from gkd_dsl.source import Source
from gkd_dsl.syntax import ast, parse

FIELDS = ("paper", "venue", "arxiv", "equation", "taps", "stages", "teachers")


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
    """A method: its header and its parameters."""

    name: str
    title: str
    paper: str
    venue: str
    arxiv: str
    equation: str
    taps: str
    stages: str
    teachers: str
    remarks: str
    roles: tuple[tuple[str, str], ...]
    params: tuple[MethodParam, ...]
    losses: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        from dataclasses import asdict

        return asdict(self)

    @property
    def example(self) -> str:
        """A spec to copy."""
        lines = ["gkd 1", f'import "gkd:{self.name}" use {self.name}', ""]
        lines += ['teacher t = hf("path/to/teacher")', 'student s = hf("path/to/student")']
        lines += ['data texts = csv("train.csv", text = "text", label = "label")', ""]
        lines += [f"use {self.name}(t -> s) as m", "run m"]
        return "\n".join(lines) + "\n"

    def page(self) -> str:
        """What `gkd methods NAME` prints."""
        head = f"{self.name}: {self.title}"
        lines = [head, "=" * len(head), "", f"{self.paper}", f"{self.venue}, arXiv {self.arxiv}", ""]
        lines += [f"minimises  {self.equation}", f"losses     {', '.join(self.losses)}"]
        lines += [f"taps       {self.taps}", f"stages     {self.stages}", ""]
        if self.remarks:
            lines += [self.remarks, ""]
        width = max((len(param.name) for param in self.params), default=0)
        lines.append("parameters")
        for param in self.params:
            within = f" in {param.within}" if param.within else ""
            lines.append(f"  {param.name:{width}}  {param.type} = {param.default}{within}")
            if param.doc:
                lines.append(f"  {'':{width}}  {param.doc}")
        lines += ["", "to use it", "", *(f"  {line}" if line else "" for line in self.example.splitlines())]
        return "\n".join(lines)


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
    title, fields, remarks = _header(text)
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
    losses = tuple(stmt.name.text for stmt in method.body if isinstance(stmt, ast.LossDecl))
    return MethodInfo(name, title, *(fields.get(field, "") for field in FIELDS), remarks, roles, params, losses)


def library() -> list[MethodInfo]:
    """Every method that ships, by name."""
    return [describe(name) for name in names()]


def _header(text: str) -> tuple[str, dict[str, str], str]:
    """The title, the fields and the remarks of the comment block that opens a library file."""
    block: list[str] = []
    for line in text.splitlines()[1:]:
        if line.startswith("#"):
            block.append(line[1:].strip())
        elif block:
            break
    title = next((line for line in block if line), "")
    fields: dict[str, str] = {}
    remarks: list[str] = []
    for line in block[block.index(title) + 1 :] if title else []:
        found = re.match(rf"({'|'.join(FIELDS)})\s+(.*)", line)
        if found and found[1] not in fields and not remarks:
            fields[found[1]] = found[2]
        elif line or remarks:
            remarks.append(line)
    return title, fields, "\n".join(remarks).strip()


__all__ = ["FIELDS", "MethodInfo", "MethodParam", "describe", "library", "method_text", "names"]
