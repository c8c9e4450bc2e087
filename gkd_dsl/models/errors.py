"""What may be wrong with a model or a tap, as data for a diagnostic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Literal

TapErrorKind = Literal["unknown", "index", "unavailable", "headless"]


class ModelError(Exception):
    """A model that cannot be described: `reason`, a `hint` that helps, `near` misses of a name."""

    def __init__(self, reason: str, hint: str = "", near: Sequence[str] = ()) -> None:
        self.reason = reason
        self.hint = hint
        self.near = list(near)
        super().__init__(f"{reason} ({hint})" if hint else reason)


class TapError(Exception):
    """A tap that a model does not have.

    kind       "unknown" (no such name), "index" (out of range), "unavailable" (this family or head lacks it),
               "headless" (logits of a model without a head)
    at         the index of the part that is at fault
    near       the names nearest to it
    taps_here  every name that is legal there
    """

    def __init__(
        self,
        reason: str,
        *,
        kind: TapErrorKind = "unknown",
        hint: str = "",
        near: Sequence[str] = (),
        at: int = 0,
        taps_here: Sequence[str] = (),
    ) -> None:
        self.reason = reason
        self.kind = kind
        self.hint = hint
        self.near = list(near)
        self.at = at
        self.taps_here = list(taps_here)
        super().__init__(f"{reason} ({hint})" if hint else reason)


def near_misses(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates that look like `name`, nearest first; letter case does not count."""
    known = {candidate.lower(): candidate for candidate in candidates}
    return [known[found] for found in get_close_matches(name.lower(), list(known), n=count, cutoff=0.6)]
