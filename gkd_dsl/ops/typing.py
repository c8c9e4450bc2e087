"""The type of an operator's result, or why the call does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from gkd_dsl import schedules
from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.ops import conditions, registry
from gkd_dsl.ops.conditions import Sizes
from gkd_dsl.ops.signature import Compiled, Slot, Value
from gkd_dsl.ops.spec import OpSpec
from gkd_dsl.syntax import ast
from gkd_dsl.types import BATCH, LENGTH, Dim, LossType, TensorType

T = TypeVar("T")

MismatchKind = Literal[
    "missing_argument",
    "unknown_argument",
    "repeated_argument",
    "wrong_type",
    "out_of_range",
    "rank",
    "axis",
    "condition",
]

RESERVED = ("valid", "token_weight", "sample_weight")
"""Slots that every loss takes besides its signature; `valid` is taken by every masked operator."""


@dataclass(frozen=True)
class Typed:
    """A call that fits. `type` is None for a metric; `attrs` has every default filled in, sorted by name."""

    type: TensorType | LossType | None
    attrs: tuple[tuple[str, AttrValue], ...]
    signature: str


@dataclass(frozen=True)
class Mismatch:
    """Why a call does not fit.

    slots        the tensors at fault (two for an axis that must agree)
    arg          the argument at fault
    axes, dims   for `axis`: its index in each slot and the sizes there
    variable     the axis as the signature names it: "H" features, "C" classes or vocabulary, "A" heads, ...
    expected     the type that the signature asks for
    suggestions  names or values that would fit, best first for names, ascending for numbers
    """

    kind: MismatchKind
    message: str
    slots: tuple[str, ...] = ()
    arg: str | None = None
    axes: tuple[int, ...] = ()
    dims: tuple[Dim, ...] = ()
    variable: str | None = None
    expected: str | None = None
    notes: tuple[str, ...] = ()
    suggestions: tuple[str | int, ...] = ()
    last_axis: bool = False
    score: float = field(default=0.0, compare=False)

    @property
    def heads(self) -> bool:
        """Whether two head counts differ."""
        named = any(dim.name.rsplit(".", 1)[-1] in ("A", "KV") for dim in self.dims)
        return self.kind == "axis" and (self.variable == "A" or named)


@dataclass(frozen=True)
class PairOf(Generic[T]):
    """Both sides of `left <- right`, for `bind`."""

    left: T
    right: T


class _MisfitError(Exception):
    def __init__(self, mismatch: Mismatch) -> None:
        self.mismatch = mismatch


def bind(spec: OpSpec, positional: Sequence[T | PairOf[T]], keywords: Mapping[str, T]) -> dict[str, T] | Mismatch:
    """Give every argument of a call its name; the tensors of a variadic slot are "0", "1", ..."""
    best: Mismatch | None = None
    for signature in registry.signatures(spec):
        try:
            return _bind(spec, signature, positional, keywords)
        except _MisfitError as fails:
            if best is None or fails.mismatch.score > best.score:
                best = fails.mismatch
    assert best is not None
    return best


def _bind(
    spec: OpSpec, signature: Compiled, positional: Sequence[T | PairOf[T]], keywords: Mapping[str, T]
) -> dict[str, T]:
    bound: dict[str, T] = {}
    args = list(signature.args)
    for place, item in enumerate(positional):
        if not args:
            most = len(signature.args)
            message = (
                f"`{spec.name}` takes {most} argument{'s' if most != 1 else ''} by position, {len(positional)} given"
            )
            raise _MisfitError(Mismatch("unknown_argument", message, expected=signature.text, score=1))
        arg = args[0]
        if isinstance(arg, Slot) and arg.variadic:
            if isinstance(item, PairOf):
                raise _MisfitError(_no_pair(spec, arg.name, signature))
            bound[str(place)] = item
            continue
        args.pop(0)
        if isinstance(arg, tuple):
            if not isinstance(item, PairOf):
                message = f"`{spec.name}` compares two tensors: write `{arg[0].name} <- {arg[1].name}`"
                names = (arg[0].name, arg[1].name)
                raise _MisfitError(
                    Mismatch("wrong_type", message, names, arg[0].name, expected=signature.text, score=2)
                )
            bound[arg[0].name], bound[arg[1].name] = item.left, item.right
        elif isinstance(item, PairOf):
            raise _MisfitError(_no_pair(spec, arg.name, signature))
        else:
            bound[arg.name] = item
    for name, value in keywords.items():
        if name in bound:
            message = f"`{name}` of `{spec.name}` is given twice"
            raise _MisfitError(Mismatch("repeated_argument", message, arg=name, expected=signature.text, score=3))
        bound[name] = value
    return bound


def _no_pair(spec: OpSpec, name: str, signature: Compiled) -> Mismatch:
    message = f"`{name}` of `{spec.name}` is one value, not a pair with `<-`"
    return Mismatch("wrong_type", message, arg=name, expected=signature.text, score=2)


def check_call(
    spec: OpSpec, tensors: Mapping[str, TensorType | LossType], values: Mapping[str, AttrValue]
) -> Typed | Mismatch:
    """The type of a call with these tensors by slot and plain arguments by name, by the first overload that fits.

    Sizes that are not known agree with everything. Of several misfits the one that came furthest is given.
    """
    compiled = registry.signatures(spec)
    unknown = _unknown(spec, compiled, [*tensors, *values])
    if unknown is not None:
        return unknown
    chosen = [signature for signature in compiled if _selected(signature, values)]
    if not chosen:
        return _no_choice(spec, compiled, values)
    best: Mismatch | None = None
    for signature in chosen:
        try:
            return _attempt(spec, signature, tensors, values)
        except _MisfitError as fails:
            if best is None or fails.mismatch.score > best.score:
                best = fails.mismatch
    assert best is not None
    return best


def _unknown(spec: OpSpec, compiled: tuple[Compiled, ...], given: list[str]) -> Mismatch | None:
    names = dict.fromkeys(name for signature in compiled for name in signature.names)
    variadic = {slot.name for signature in compiled for slot in signature.slots if slot.variadic}
    reserved = RESERVED if spec.kind == "loss" else RESERVED[:1] if spec.masked else ()
    for name in given:
        if name in reserved or (name in names and name not in variadic) or (variadic and name.isdigit()):
            continue
        legal = [*(n for n in names if n not in variadic), *reserved]
        close = tuple(difflib.get_close_matches(name, legal, n=3, cutoff=0.6))
        notes = (f"it takes {', '.join(f'`{n}`' for n in names)}",)
        message = f"`{spec.name}` has no argument `{name}`"
        return Mismatch("unknown_argument", message, arg=name, notes=notes, suggestions=close)
    return None


def _words(signature: Compiled) -> dict[str, tuple[str, ...]]:
    """The words that the conditions of this overload allow for its text arguments."""
    found = (conditions.choices(condition) for condition in signature.where)
    return {choice[0]: choice[1] for choice in found if choice is not None}


def _selected(signature: Compiled, values: Mapping[str, AttrValue]) -> bool:
    return all(name not in values or values[name] in words for name, words in _words(signature).items())


def _no_choice(spec: OpSpec, compiled: tuple[Compiled, ...], values: Mapping[str, AttrValue]) -> Mismatch:
    legal: dict[str, dict[str, None]] = {}
    for signature in compiled:
        for name, words in _words(signature).items():
            legal.setdefault(name, {}).update(dict.fromkeys(words))
    name = next((n for n in legal if n in values and values[n] not in legal[n]), next(iter(legal)))
    allowed = list(legal[name])
    given = values[name]
    shown = f'"{given}"' if isinstance(given, str) else str(given)
    quoted = [f'"{word}"' for word in allowed]
    message = f"`{name}` of `{spec.name}` is {_or(quoted)}, not {shown}"
    close = difflib.get_close_matches(given, allowed, n=1) if isinstance(given, str) else []
    return Mismatch("out_of_range", message, arg=name, suggestions=tuple(dict.fromkeys([*close, *allowed])))


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


@dataclass
class _Axis:
    dim: Dim
    slot: str
    index: int
    last: bool


def _attempt(
    spec: OpSpec,
    signature: Compiled,
    tensors: Mapping[str, TensorType | LossType],
    values: Mapping[str, AttrValue],
) -> Typed:
    call = _Call(spec, signature, tensors)
    call.arguments(values)
    call.types(values)
    call.unify()
    call.missing_values(values)
    attrs = call.fill(values)
    call.where()
    result = call.result()
    positions = call.positions(result)
    call.reserved(positions)
    if spec.carries_dims:
        attrs["dims"] = tuple(dim.name if dim.per_batch else "*" for dim in positions)
    return Typed(result, tuple(sorted(attrs.items())), signature.text)


class _Call:
    """One overload tried on one call."""

    def __init__(self, spec: OpSpec, signature: Compiled, tensors: Mapping[str, TensorType | LossType]) -> None:
        self.spec = spec
        self.signature = signature
        self.tensors = tensors
        self.axes: dict[str, _Axis] = {}
        self.leading: list[_Axis] | None = None
        self.sizes = Sizes()

    def fail(self, score: float, kind: MismatchKind, message: str, **details: object) -> _MisfitError:
        details.setdefault("expected", self.signature.text)
        return _MisfitError(Mismatch(kind, message, score=score, **details))  # type: ignore[arg-type]

    def arguments(self, values: Mapping[str, AttrValue]) -> None:
        """Every given name is one of this overload; every tensor that it needs is there."""
        slots = {slot.name for slot in self.signature.slots}
        names = {value.name for value in self.signature.values}
        for name in self.tensors:
            if name in names:
                message = f"`{name}` of `{self.spec.name}` is a plain value, not a tensor"
                raise self.fail(3, "wrong_type", message, arg=name, slots=(name,))
        for name in values:
            if name in slots and values[name] is not None:
                message = f"`{name}` of `{self.spec.name}` is a tensor, not a plain value"
                raise self.fail(3, "wrong_type", message, arg=name)
            if name not in slots | names:
                message = f"`{self.spec.name}` takes no `{name}` with these tensors"
                raise self.fail(1, "unknown_argument", message, arg=name)
        for slot in self.signature.slots:
            if slot.variadic and "0" in self.tensors:
                continue
            if slot.name not in self.tensors and not slot.optional:
                message = f"`{self.spec.name}` needs {'at least one tensor' if slot.variadic else f'`{slot.name}`'}"
                raise self.fail(2, "missing_argument", message, arg=slot.name)

    def types(self, values: Mapping[str, AttrValue]) -> None:
        """Every plain value is of its type; every tensor of its dtype."""
        for value in self.signature.values:
            if value.name in values:
                problem = _wrong_value(value, values[value.name])
                if problem is not None:
                    message = f"`{value.name}` of `{self.spec.name}` {problem}"
                    raise self.fail(3, "wrong_type", message, arg=value.name)
        for name, slot in self.filled():
            given = self.tensors[name]
            if slot.type == "Loss" or isinstance(given, LossType):
                fits = slot.type == "Loss" and isinstance(given, LossType)
            else:
                fits = slot.type == "Tensor" or given.dtype == slot.type.lower().rstrip("s")
            if not fits:
                message = f"`{self.named(name)}` of `{self.spec.name}` must be {slot}; it is {given}"
                raise self.fail(3.5, "wrong_type", message, arg=slot.name, slots=(name,))

    def filled(self) -> list[tuple[str, Slot]]:
        """The tensors given, each with the slot that takes it."""
        found: list[tuple[str, Slot]] = []
        for slot in self.signature.slots:
            if slot.variadic:
                members = sorted((name for name in self.tensors if name.isdigit()), key=int)
                found.extend((name, slot) for name in members)
            elif slot.name in self.tensors:
                found.append((slot.name, slot))
        return found

    def named(self, name: str) -> str:
        return f"argument {int(name) + 1}" if name.isdigit() else name

    def unify(self) -> None:
        """Give every axis of the signature a size, by all tensors."""
        for name, slot in self.filled():
            dims = self.tensors[name].dims
            wanted = slot.dims
            if "..." in wanted:
                at = wanted.index("...")
                middle = len(dims) - (len(wanted) - 1)
                if middle < 0:
                    raise self.rank(name, slot)
                self.match_leading(name, slot, range(at, at + middle))
                places = [*range(at), *range(at + middle, len(dims))]
                pairs = list(zip([*wanted[:at], *wanted[at + 1 :]], places, strict=True))
            else:
                if len(wanted) != len(dims):
                    raise self.rank(name, slot)
                pairs = list(zip(wanted, range(len(dims)), strict=True))
            for variable, index in pairs:
                self.match(variable, _Axis(dims[index], name, index, index == len(dims) - 1), slot)
            if slot.variadic:
                self.sizes.counts[slot.name] = self.sizes.counts.get(slot.name, 0) + 1
        self.sizes.dims = {variable: axis.dim for variable, axis in self.axes.items()}

    def rank(self, name: str, slot: Slot) -> _MisfitError:
        given = self.tensors[name]
        many = len(given.dims)
        message = f"`{self.named(name)}` of `{self.spec.name}` must be {slot}; it is {given} with {many} "
        message += "axis" if many == 1 else "axes"
        return self.fail(4, "rank", message, slots=(name,), arg=slot.name, dims=given.dims)

    def match_leading(self, name: str, slot: Slot, places: range) -> None:
        dims = self.tensors[name].dims
        found = [_Axis(dims[index], name, index, index == len(dims) - 1) for index in places]
        if self.leading is None:
            self.leading = found
            return
        if len(found) != len(self.leading):
            other = next(n for n, s in self.filled() if "..." in s.dims)
            message = (
                f"`{self.named(other)}` and `{self.named(name)}` of `{self.spec.name}` must have the same leading "
                f"axes; they are {self.tensors[other]} and {self.tensors[name]}"
            )
            raise self.fail(5.5, "rank", message, slots=(other, name), arg=slot.name)
        for number, axis in enumerate(found):
            self.leading[number] = self.agree("...", self.leading[number], axis)

    def match(self, variable: str, axis: _Axis, slot: Slot) -> None:
        if variable == "each" and slot.variadic:
            self.sizes.each.setdefault("each", []).append(axis.dim)
            return
        if variable in ("B", "L") or variable.isdigit():
            rigid = {"B": BATCH, "L": LENGTH}.get(variable) or Dim("", int(variable))
            if not rigid.agrees(axis.dim):
                given = self.tensors[axis.slot]
                message = f"`{self.named(axis.slot)}` of `{self.spec.name}` must be {slot}; it is {given}"
                raise self.fail(
                    5,
                    "axis",
                    message,
                    slots=(axis.slot,),
                    arg=slot.name,
                    axes=(axis.index,),
                    dims=(axis.dim, rigid),
                    variable=variable,
                )
            return
        seen = self.axes.get(variable)
        self.axes[variable] = axis if seen is None else self.agree(variable, seen, axis)

    def agree(self, variable: str, seen: _Axis, axis: _Axis) -> _Axis:
        """The better known of two axes that must be the same."""
        if not seen.dim.agrees(axis.dim):
            first, second = self.named(seen.slot), self.named(axis.slot)
            message = f"`{self.spec.name}` needs equal axes: {first} has {seen.dim}, {second} has {axis.dim}"
            raise self.fail(
                7,
                "axis",
                message,
                slots=(seen.slot, axis.slot),
                axes=(seen.index, axis.index),
                dims=(seen.dim, axis.dim),
                variable=variable,
                last_axis=seen.last and axis.last,
                notes=tuple(
                    f"{self.named(part.slot)} is {self.tensors[part.slot].long}, {part.dim.name} from {part.dim.origin}"
                    if part.dim.origin
                    else f"{self.named(part.slot)} is {self.tensors[part.slot].long}"
                    for part in (seen, axis)
                ),
            )
        return axis if not seen.dim.known and axis.dim.known else seen

    def missing_values(self, values: Mapping[str, AttrValue]) -> None:
        for value in self.signature.values:
            if value.required and value.name not in values:
                message = f"`{self.spec.name}` needs `{value.name}`"
                raise self.fail(6.5, "missing_argument", message, arg=value.name)

    def fill(self, values: Mapping[str, AttrValue]) -> dict[str, AttrValue]:
        """The plain arguments with their defaults, within their bounds."""
        attrs: dict[str, AttrValue] = {}
        for value in self.signature.values:
            given = values.get(value.name, value.default)
            amount = _canonical(value, given)
            attrs[value.name] = amount
            low, high = _interval(amount)
            if low is not None and high is not None and not value.inside(low, high):
                reached = f"{amount}" if isinstance(amount, int | float) else f"between {low:g} and {high:g}"
                message = f"`{value.name}` of `{self.spec.name}` must be in {value.bounds}; it is {reached}"
                raise self.fail(7.5, "out_of_range", message, arg=value.name)
        self.sizes.values = dict(attrs)
        return attrs

    def where(self) -> None:
        for condition in self.signature.where:
            if conditions.choices(condition) is not None:
                continue
            given = conditions.equation(condition, self.sizes)
            if given is not None:
                size = conditions.evaluate(given[1], self.sizes)
                self.sizes.dims[given[0]] = Dim(self.label(*given), size if isinstance(size, int) else None)
                continue
            if conditions.evaluate(condition, self.sizes) is False:
                raise self.condition(condition)

    def label(self, name: str, expr: ast.Expr) -> str:
        """The name of a computed axis: `s.A * s.D` for what is made of axes, else the signature's own."""
        made_of_axes = isinstance(expr, ast.Binary) and all(part in self.axes for part in conditions.names_in(expr))
        return conditions.describe(expr, self.sizes) if made_of_axes else name

    def condition(self, condition: ast.Expr) -> _MisfitError:
        """A condition that does not hold, with the numbers and with numbers that would do."""
        message = conditions.failure(condition, self.sizes)
        parts = conditions.divisibility(condition)
        names = tuple(dict.fromkeys(conditions.names_in(condition)))
        suggestions: tuple[int, ...] = ()
        arg = next((name for name in names if name in self.sizes.values), None)
        notes: tuple[str, ...] = ()
        if parts is not None:
            whole, part = conditions.evaluate(parts[0], self.sizes), conditions.evaluate(parts[1], self.sizes)
            if isinstance(whole, int) and isinstance(part, int):
                suggestions = conditions.nearest(conditions.divisors(whole), part)
                notes = (f"{whole} is divisible by {', '.join(str(k) for k in suggestions)}",)
        dims = tuple(self.sizes.dims[name] for name in names if name in self.axes)
        slots = tuple(dict.fromkeys(self.axes[name].slot for name in names if name in self.axes))
        return self.fail(8, "condition", message, arg=arg, slots=slots, dims=dims, notes=notes, suggestions=suggestions)

    def dim(self, name: str) -> Dim:
        """An axis of the result: rigid, of a tensor, or as long as a whole-number argument says."""
        if name == "B":
            return BATCH
        if name == "L":
            return LENGTH
        if name.isdigit():
            return Dim("", int(name))
        if name in self.sizes.dims:
            return self.sizes.dims[name]
        size = self.sizes.values.get(name)
        return Dim(name, size if isinstance(size, int) else None)

    def result(self) -> TensorType | LossType | None:
        if self.signature.result is None:
            return None
        dims: list[Dim] = []
        for name in self.signature.result_dims:
            if name == "...":
                dims.extend(axis.dim for axis in self.leading or [])
            else:
                dims.append(self.dim(name))
        if self.signature.result == "Loss":
            return LossType(tuple(dims))
        dtype = self.signature.result.lower()
        if dtype == "tensor":
            name, _ = next((n, s) for n, s in self.filled() if s.type == "Tensor")
            given = self.tensors[name]
            dtype = given.dtype if isinstance(given, TensorType) else "float"
        return TensorType(dtype, tuple(dims))  # type: ignore[arg-type]

    def positions(self, result: TensorType | LossType | None) -> tuple[Dim, ...]:
        """What `valid` speaks of: the positions of a loss (the result or an argument), else the leading axes."""
        if isinstance(result, LossType):
            return result.dims
        for name, slot in self.filled():
            if slot.type == "Loss":
                return self.tensors[name].dims
        if self.leading:
            return tuple(axis.dim for axis in self.leading)
        first = next((self.tensors[name].dims for name, _ in self.filled()), ())
        return tuple(dim for dim in first if dim.per_batch)

    def reserved(self, positions: tuple[Dim, ...]) -> None:
        """`valid`, `token_weight` and `sample_weight` speak of axes that are there."""
        tokens = any(dim.name == "L" for dim in positions)
        allowed = {
            "valid": ("bool", ((BATCH, LENGTH), (BATCH,)) if tokens else ((BATCH,),)),
            "token_weight": ("float", ((BATCH, LENGTH),) if tokens else ()),
            "sample_weight": ("float", ((BATCH,),)),
        }
        for name in RESERVED:
            given = self.tensors.get(name)
            if given is None or any(slot.name == name for slot in self.signature.slots):
                continue
            dtype, shapes = allowed[name]
            if not shapes:
                message = f"`{self.spec.name}` gives no value per token here, so it takes no `{name}`"
                raise self.fail(9, "wrong_type", message, arg=name, slots=(name,))
            names = tuple(dim.name for dim in given.dims)
            if (
                not isinstance(given, TensorType)
                or given.dtype != dtype
                or all(names != tuple(dim.name for dim in shape) for shape in shapes)
            ):
                wanted = _or([str(TensorType(dtype, shape)) for shape in shapes])  # type: ignore[arg-type]
                message = f"`{name}` of `{self.spec.name}` must be {wanted}; it is {given}"
                raise self.fail(9, "wrong_type", message, arg=name, slots=(name,), dims=given.dims)


def _is_schedule(value: object) -> bool:
    return isinstance(value, schedules.Schedule)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong_value(value: Value, given: AttrValue) -> str | None:
    """What is wrong with the type of a plain value, as the end of a sentence."""
    if given is None and not value.required and value.default is None:
        return None
    shown = f'"{given}"' if isinstance(given, str) else str(given).lower() if isinstance(given, bool) else str(given)
    match value.type:
        case "bool":
            return None if isinstance(given, bool) else f"is true or false, not {shown}"
        case "text":
            return None if isinstance(given, str) else f'is a text such as "{value.default or "..."}", not {shown}'
        case "int":
            fits = isinstance(given, int) and not isinstance(given, bool)
            return None if fits else f"is a whole number, not {shown}"
        case "list":
            return None if isinstance(given, tuple) else f"is a list, not {shown}"
        case "schedule":
            return None if _number(given) or _is_schedule(given) else f"is a number or a schedule, not {shown}"
    if _is_schedule(given) and not isinstance(given, schedules.Constant):
        return f"is one number for the whole stage; a schedule ({given}) cannot change it"
    return None if _number(given) or isinstance(given, schedules.Constant) else f"is a number, not {shown}"


def _canonical(value: Value, given: object) -> AttrValue:
    """One form for what means the same: constants as numbers, numbers as floats where a float is asked for."""
    if isinstance(given, schedules.Constant):
        given = given.amount
    if value.type in ("float", "schedule") and _number(given):
        return float(given)  # type: ignore[arg-type]
    return given  # type: ignore[return-value]


def _interval(amount: AttrValue) -> tuple[float | None, float | None]:
    """The least and the greatest value over a stage; None where it cannot be known or is no number."""
    if _number(amount):
        return float(amount), float(amount)  # type: ignore[arg-type]
    if isinstance(amount, schedules.Schedule):
        return schedules.bounds(amount) or (None, None)
    return None, None
