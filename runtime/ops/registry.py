"""The functions behind the operators, one for each name of the language."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from torch import Tensor

Operator = Callable[..., Tensor]
_F = TypeVar("_F", bound=Callable[..., Tensor])

_FUNCTIONS: dict[str, Operator] = {}
_MODULES = (
    "angles",
    "arithmetic",
    "choice",
    "contrast",
    "distances",
    "divergences",
    "interventions",
    "layers",
    "masks",
    "relations",
    "segments",
    "tensors",
    "vocabulary",
)
"""What fills the table when it is imported."""


def function(name: str, *, replace: bool = False) -> Callable[[_F], _F]:
    """Make a function the operator of this name. Raises ValueError when the name is taken, unless `replace`."""

    def add(implementation: _F) -> _F:
        if name in _FUNCTIONS and not replace:
            raise ValueError(f"there is a function for `{name}` already")
        _FUNCTIONS[name] = implementation
        return implementation

    return add


def functions() -> dict[str, Operator]:
    """Every operator's function by name, the user's included. The dictionary is a copy."""
    for module in _MODULES:
        import_module(f"gkd_dsl.runtime.ops.{module}")
    return dict(_FUNCTIONS)


def apply(name: str, inputs: dict[str, Any], attrs: dict[str, Any]) -> Tensor:
    """Call an operator with its tensors by slot and its plain arguments; schedules must be numbers by now.

    Raises KeyError for a name that no function has.
    """
    return functions()[name](**inputs, **attrs)
