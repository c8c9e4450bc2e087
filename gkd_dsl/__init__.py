"""gkd-dsl: a small language for distilling large language models.

`load(path)` gives a `Spec`: `.check()`, `.run()`, `.compile(...)`. `@op` and `@source` register a user's operators
and data sources. What is needed is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gkd_dsl.extension import op, source

if TYPE_CHECKING:
    from gkd_dsl.diagnostics import Diagnostics, SpecError
    from gkd_dsl.spec import Spec, load, loads

__all__ = ["Diagnostics", "Spec", "SpecError", "load", "loads", "op", "source"]

_HOMES = {
    "Diagnostics": "gkd_dsl.diagnostics",
    "SpecError": "gkd_dsl.diagnostics",
    "Spec": "gkd_dsl.spec",
    "load": "gkd_dsl.spec",
    "loads": "gkd_dsl.spec",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gkd_dsl' has no attribute {name!r}")
