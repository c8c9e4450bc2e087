"""A spec that uses a method of the library, as text: what `gkd methods` shows to copy, and `gkd init` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gkd_dsl.library import MethodInfo


@dataclass(frozen=True)
class Declared:
    """A model of the spec: `teacher t = hf("...")`, with comments above it."""

    role: str
    name: str
    value: str
    comments: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The declaration as it is written."""
        return [*(f"# {comment}" for comment in self.comments), f"{self.role} {self.name} = {self.value}"]


def members(info: MethodInfo, count: int = 2) -> dict[str, tuple[tuple[str, str], ...]]:
    """Role and name of each model of a spec, by the formal that holds it; a formal that holds several has `count`.

    A list of models that learn from each other begins with a teacher: `[t, a] -> s`.
    """
    taken = {name for _, name in info.roles}
    found: dict[str, tuple[tuple[str, str], ...]] = {}
    for role, name in info.roles:
        if name not in info.several:
            found[name] = ((role, name),)
        elif role == "model":
            more = ("a",) if count == 2 else tuple(f"a{number}" for number in range(1, count))
            found[name] = (("teacher", _free("t", taken)), *((role, _free(each, taken)) for each in more))
        else:
            stem = name.rstrip("s") or name
            found[name] = tuple((role, _free(f"{stem}{number}", taken)) for number in range(1, count + 1))
    return found


def _free(name: str, taken: set[str]) -> str:
    return f"{name}_" if name in taken else name


def model_names(info: MethodInfo, count: int = 2) -> dict[str, tuple[str, ...]]:
    """The names of `members`."""
    return {formal: tuple(name for _, name in held) for formal, held in members(info, count).items()}


def call_of(info: MethodInfo, bound: Mapping[str, Sequence[str]]) -> str:
    """The models of a `use`: `t -> s`, `[a, b] -> s`, or by name where the method takes more than these two."""
    written = {
        name: f"[{', '.join(bound[name])}]" if name in info.several else bound[name][0] for _, name in info.roles
    }
    students = [name for role, name in info.roles if role == "student"]
    others = [name for role, name in info.roles if role != "student"]
    if len(students) == len(others) == 1 and (others[0] in info.several or ("teacher", others[0]) in info.roles):
        return f"{written[others[0]]} -> {written[students[0]]}"
    return ", ".join(f"{name} = {text}" for name, text in written.items())


def example_text(info: MethodInfo, models: Sequence[Declared], data: str, call: str) -> str:
    """The shortest spec that runs a method's own stages."""
    lines = ["gkd 1", f'import "gkd:{info.name}" use {info.name}', ""]
    for model in models:
        lines += model.lines()
    lines += [f"data texts = {data}", "", f"use {info.name}({call}) as m", "run m"]
    return "\n".join(lines) + "\n"
