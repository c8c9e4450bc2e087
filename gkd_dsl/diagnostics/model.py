"""What is wrong with a spec, as data: a code, places, notes and a fix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from gkd_dsl.text import Span

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Label:
    """A marked place: `^` under the cause (primary), `-` under what explains it."""

    span: Span
    text: str = ""
    primary: bool = True


@dataclass(frozen=True)
class Note:
    """A remark below the snippet; with a span it shows that place too."""

    text: str
    span: Span | None = None


@dataclass(frozen=True)
class Edit:
    """Replace the characters of a span by a text (an empty span inserts)."""

    span: Span
    text: str


@dataclass(frozen=True)
class Fix:
    """A change which, applied, removes the diagnostic."""

    title: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Diagnostic:
    """One finding. `labels[0]` is where it is reported."""

    code: str
    message: str
    labels: tuple[Label, ...] = ()
    notes: tuple[Note, ...] = ()
    fix: Fix | None = None
    severity: Severity = "error"

    @property
    def span(self) -> Span | None:
        """Where it is reported."""
        return self.labels[0].span if self.labels else None


@dataclass
class Diagnostics:
    """The findings of one check, in the order of their places."""

    found: list[Diagnostic] = field(default_factory=list)

    def add(self, diagnostic: Diagnostic) -> None:
        """Keep a finding; the same code at the same place is kept once."""
        for other in self.found:
            if other.code == diagnostic.code and other.span == diagnostic.span and other.message == diagnostic.message:
                return
        self.found.append(diagnostic)

    def error(
        self,
        code: str,
        message: str,
        span: Span | None,
        text: str = "",
        *,
        labels: Iterable[Label] = (),
        notes: Iterable[Note | str] = (),
        fix: Fix | None = None,
        severity: Severity = "error",
    ) -> Diagnostic:
        """Record a finding at `span` (label `text`), with further labels and notes."""
        first = (Label(span, text),) if span is not None else ()
        diagnostic = Diagnostic(
            code,
            message,
            (*first, *labels),
            tuple(note if isinstance(note, Note) else Note(note) for note in notes),
            fix,
            severity,
        )
        self.add(diagnostic)
        return diagnostic

    def warning(self, code: str, message: str, span: Span | None, text: str = "", **rest: object) -> Diagnostic:
        """As `error`, for what may be meant."""
        return self.error(code, message, span, text, severity="warning", **rest)  # type: ignore[arg-type]

    @property
    def errors(self) -> list[Diagnostic]:
        """The findings that keep a spec from running."""
        return [diagnostic for diagnostic in self.found if diagnostic.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether no error was found."""
        return not self.errors

    def __iter__(self) -> Iterator[Diagnostic]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


class SpecError(Exception):
    """A spec that cannot be used; `diagnostics` says why."""

    def __init__(self, diagnostics: Diagnostics) -> None:
        self.diagnostics = diagnostics
        super().__init__("\n".join(f"{d.code}: {d.message}" for d in diagnostics.errors))
