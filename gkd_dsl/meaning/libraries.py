"""Libraries that some constructs need beside what is installed in any case."""

from __future__ import annotations

from importlib.util import find_spec

from gkd_dsl.meaning.context import Context
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.text import Span


def installed(library: str) -> bool:
    """Whether a library is there; it is not imported."""
    try:
        return find_spec(library) is not None
    except ValueError:  # a module without a spec, as one that stands in for it has none
        return True


def need(ctx: Context, scope: Scope, library: str, what: str, install: str, span: Span) -> bool:
    """Report a library that is not installed; `install` is what to give to pip. True where it is there."""
    if installed(library):
        return True
    ctx.error(
        scope, "E0435", f"{what} needs the library {library}, which is not installed", span, "needed here",
        notes=[f"`pip install {install}`"],
    )  # fmt: skip
    return False
