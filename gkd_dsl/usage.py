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


def model_names(info: MethodInfo, teachers: int = 2) -> dict[str, tuple[str, ...]]:
    """The models of a spec by the formals that hold them; a formal that may hold several has `teachers`."""
    taken = {name for _, name in info.roles}
    found: dict[str, tuple[str, ...]] = {}
    for _, name in info.roles:
        if name not in info.several:
            found[name] = (name,)
            continue
        stem = name.rstrip("s") or name
        numbered = tuple(f"{stem}{number}" for number in range(1, teachers + 1))
        found[name] = tuple(f"{each}_" if each in taken else each for each in numbered)
    return found


def call_of(info: MethodInfo, bound: Mapping[str, Sequence[str]]) -> str:
    """The models of a `use`: `t -> s`, `[a, b] -> s`, or by name where the method takes more than these two."""
    written = {
        name: f"[{', '.join(bound[name])}]" if name in info.several else bound[name][0] for _, name in info.roles
    }
    places = dict(info.roles)
    if len(info.roles) == 2 and set(places) == {"teacher", "student"}:
        return f"{written[places['teacher']]} -> {written[places['student']]}"
    return ", ".join(f"{name} = {text}" for name, text in written.items())


def example_text(info: MethodInfo, models: Sequence[Declared], data: str, call: str) -> str:
    """The shortest spec that runs a method's own stages."""
    lines = ["gkd 1", f'import "gkd:{info.name}" use {info.name}', ""]
    for model in models:
        lines += model.lines()
    lines += [f"data texts = {data}", "", f"use {info.name}({call}) as m", "run m"]
    return "\n".join(lines) + "\n"
