"""Names and where they are defined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gkd_dsl.meaning.values import Value
from gkd_dsl.syntax import ast
from gkd_dsl.text import Source, Span


@dataclass
class Definition:
    """A name, the declaration that gives it, and its value once it is asked for."""

    name: str
    decl: ast.Item | ast.Stmt | ast.Formal | None
    span: Span | None
    value: Value | None = None
    detached: Value | None = None
    """The value on the right of `<-`, where it differs: taps without their gradient under a projection that trains."""
    busy: bool = False
    used: bool = False


@dataclass(eq=False)
class Scope:
    """The names of a file, of a used method, or of the binders of a comprehension.

    prefix   what the keys of the graph nodes made here begin with ("" or "tb/")
    uses     the `use` statements that lead here, outermost first
    parent   looked in for names that are not here
    root     the folder that relative paths of the file start from
    """

    source: Source
    prefix: str = ""
    uses: tuple[Span, ...] = ()
    parent: Scope | None = None
    root: Path = field(default_factory=Path)
    names: dict[str, Definition] = field(default_factory=dict)

    def find(self, name: str) -> tuple[Definition, Scope] | None:
        """The definition of a name and the scope that holds it."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name], scope
            scope = scope.parent
        return None

    def visible(self) -> Iterator[Definition]:
        """Every definition that can be named here."""
        scope: Scope | None = self
        while scope is not None:
            yield from scope.names.values()
            scope = scope.parent

    def child(self, **names: Value) -> Scope:
        """A scope inside this one that binds a few more names."""
        inner = Scope(self.source, self.prefix, self.uses, self, self.root)
        for name, value in names.items():
            inner.names[name] = Definition(name, None, None, value, used=True)
        return inner
