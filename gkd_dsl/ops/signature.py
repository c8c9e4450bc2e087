"""Signatures in the type language, read once and kept as plain tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from gkd_dsl.syntax import ast

TENSOR_TYPES = ("Float", "Int", "Bool", "Tensor", "Floats", "Loss")
SCALAR_TYPES = ("float", "int", "bool", "text", "schedule", "list")

Scalar = bool | int | float | str | None | tuple["Scalar", ...]


@dataclass(frozen=True)
class Slot:
    """A tensor argument. `variadic` (type `Floats`): any number of tensors in slots "0", "1", ..."""

    name: str
    type: Literal["Float", "Int", "Bool", "Tensor", "Floats", "Loss"]
    dims: tuple[str, ...]
    optional: bool = False

    @property
    def variadic(self) -> bool:
        """Whether it takes any number of tensors."""
        return self.type == "Floats"

    def __str__(self) -> str:
        return f"{self.type}[{', '.join(self.dims)}]"


@dataclass(frozen=True)
class Value:
    """A plain argument; `low` and `high` bound it, `required` means it has no default."""

    name: str
    type: Literal["float", "int", "bool", "text", "schedule", "list"]
    default: Scalar = None
    required: bool = True
    low: float | None = None
    high: float | None = None
    closed: bool = True

    @property
    def bounds(self) -> str:
        """As written: `0.0 ..= 1.0`."""
        return f"{self.low:g} {'..=' if self.closed else '..<'} {self.high:g}"

    def inside(self, low: float, high: float) -> bool:
        """Whether the interval from `low` to `high` is within the bounds."""
        if self.low is None or self.high is None:
            return True
        return low >= self.low and (high <= self.high if self.closed else high < self.high)


@dataclass(frozen=True)
class Compiled:
    """A signature: its arguments in order (a pair is a tuple of two slots), its result and its conditions.

    result        "Float", "Int", "Bool", "Tensor" (the dtype of the first tensor), "Loss", or None for a metric
    """

    text: str
    name: str
    args: tuple[Slot | Value | tuple[Slot, Slot], ...]
    result: str | None
    result_dims: tuple[str, ...]
    where: tuple[ast.Expr, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every tensor argument, in order."""
        found: list[Slot] = []
        for arg in self.args:
            if isinstance(arg, Slot):
                found.append(arg)
            elif isinstance(arg, tuple):
                found.extend(arg)
        return tuple(found)

    @property
    def values(self) -> tuple[Value, ...]:
        """Every plain argument, in order."""
        return tuple(arg for arg in self.args if isinstance(arg, Value))

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a caller can write."""
        return tuple([slot.name for slot in self.slots] + [value.name for value in self.values])


def literal(expr: ast.Expr | None) -> Scalar:
    """The value of a default: a number, a string, `true`, `none`, or a list of them.

    Raises ValueError for any other expression.
    """
    match expr:
        case ast.Number(value=value):
            return value
        case ast.String(value=text):
            return text
        case ast.Bool(value=truth):
            return truth
        case ast.Name(id="none"):
            return None
        case ast.Unary(op="-", value=inner):
            number = literal(inner)
            if isinstance(number, int | float) and not isinstance(number, bool):
                return -number
        case ast.List(items=items):
            return tuple(literal(item) for item in items)
    raise ValueError("a default is a number, a string, true, false, none, or a list of them")


def _slot(arg: ast.SignatureArg) -> Slot:
    if arg.type.name.text not in TENSOR_TYPES or arg.type.dims is None:
        raise ValueError(f"`{arg.name.text}` must be a tensor type with axes, such as Float[..., C]")
    dims = tuple(dim.text for dim in arg.type.dims)
    if dims.count("...") > 1:
        raise ValueError(f"`{arg.name.text}` has `...` twice")
    optional = arg.default is not None
    if optional and literal(arg.default) is not None:
        raise ValueError(f"the default of the tensor `{arg.name.text}` can only be none")
    return Slot(arg.name.text, arg.type.name.text, dims, optional)  # type: ignore[arg-type]


def _value(arg: ast.SignatureArg) -> Value:
    low: float | None = None
    high: float | None = None
    if arg.within is not None:
        first, second = literal(arg.within.lo), literal(arg.within.hi)
        if not isinstance(first, int | float) or not isinstance(second, int | float):
            raise ValueError(f"the bounds of `{arg.name.text}` must be numbers")
        low, high = first, second
    return Value(
        arg.name.text,
        arg.type.name.text,  # type: ignore[arg-type]
        literal(arg.default) if arg.default is not None else None,
        arg.default is None,
        low,
        high,
        arg.within.inclusive if arg.within is not None else True,
    )


def from_ast(signature: ast.Signature, text: str) -> Compiled:
    """The tables of a parsed signature. Raises ValueError where it says what no operator can have."""
    args: list[Slot | Value | tuple[Slot, Slot]] = []
    for arg in signature.args:
        kind = arg.type.name.text
        if arg.teacher is not None:
            args.append((_slot(arg), _slot(arg.teacher)))
        elif kind in TENSOR_TYPES:
            args.append(_slot(arg))
        elif kind in SCALAR_TYPES and arg.type.dims is None:
            args.append(_value(arg))
        else:
            known = ", ".join((*TENSOR_TYPES, *SCALAR_TYPES))
            raise ValueError(f"`{arg.name.text}` has the type `{kind}`; an argument is one of {known}")
    result = signature.result
    if result.name.text == "float" and result.dims is None:
        return Compiled(text, signature.name.text, tuple(args), None, (), signature.where)
    if result.name.text not in ("Float", "Int", "Bool", "Tensor", "Loss") or result.dims is None:
        raise ValueError(f"the result `{result.name.text}` must be Float, Int, Bool, Tensor or Loss with its axes")
    dims = tuple(dim.text for dim in result.dims)
    return Compiled(text, signature.name.text, tuple(args), result.name.text, dims, signature.where)


@cache
def compile_signature(text: str, name: str) -> Compiled:
    """Parse a signature's text once. Raises ValueError, or what the parser reports, on a malformed one."""
    from gkd_dsl.syntax import parse_signature

    return from_ast(parse_signature(text, name), text)
