"""The `where` conditions of a signature: equations that give a size, and conditions that must hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gkd_dsl.ops.signature import literal
from gkd_dsl.syntax import ast
from gkd_dsl.types import Dim

Operand = bool | int | float | str | None
"""A value in a condition; None where a size is not known, which makes every condition hold."""


@dataclass
class Sizes:
    """What the names of a condition stand for: axes, plain arguments, and the tensors of a variadic slot."""

    dims: dict[str, Dim] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    each: dict[str, list[Dim]] = field(default_factory=dict)

    def bound(self, name: str) -> bool:
        """Whether the name has a meaning here."""
        return name in self.dims or name in self.values


def names_in(expr: ast.Expr) -> Iterator[str]:
    """The names that an expression reads, in order."""
    match expr:
        case ast.Name(id=name):
            yield name
        case ast.Binary(left=left, right=right):
            yield from names_in(left)
            yield from names_in(right)
        case ast.Unary(value=value):
            yield from names_in(value)
        case ast.Call(args=args):
            for arg in args:
                yield from names_in(arg.value)


def evaluate(expr: ast.Expr, sizes: Sizes) -> Operand:
    """The value of a condition or of one of its sides; None where it depends on a size that is not known.

    Raises ValueError on an expression that a condition cannot have.
    """
    match expr:
        case ast.Name(id=name):
            if name in sizes.values:
                value = sizes.values[name]
                return value if isinstance(value, bool | int | float | str) else None
            if name in sizes.dims:
                return sizes.dims[name].size
            if name == "none":
                return None
            raise ValueError(f"the condition names `{name}`, which is neither an axis nor an argument")
        case ast.Call(func=ast.Name(id=function), args=args):
            return _call(function, [arg.value for arg in args], sizes)
        case ast.Unary(op="not", value=inner):
            truth = evaluate(inner, sizes)
            return None if truth is None else not truth
        case ast.Binary(op=op, left=left, right=right):
            return _binary(op, evaluate(left, sizes), evaluate(right, sizes))
    value = literal(expr)
    if isinstance(value, tuple):
        raise ValueError("a condition has no lists")
    return value


def _call(function: str, args: list[ast.Expr], sizes: Sizes) -> Operand:
    match function, args:
        case "count", [ast.Name(id=name)] if name in sizes.counts:
            return sizes.counts[name]
        case "sum", [ast.Name(id=name)] if name in sizes.each:
            known = [dim.size for dim in sizes.each[name]]
            return None if None in known else sum(size for size in known if size is not None)
        case "divides", [part, whole]:
            divisor, dividend = evaluate(part, sizes), evaluate(whole, sizes)
            if not isinstance(divisor, int) or not isinstance(dividend, int):
                return None
            return divisor != 0 and dividend % divisor == 0
    raise ValueError(
        f"a condition cannot call `{function}` with this; it has count(xs), sum(each), divides(part, whole)"
    )


def _binary(op: str, left: Operand, right: Operand) -> Operand:
    if op in ("and", "or"):
        if left is None or right is None:
            known = right if left is None else left
            return known if known is not None and bool(known) == (op == "or") else None
        return (left and right) if op == "and" else (left or right)
    if left is None or right is None:
        return None
    if op == "==":
        return left == right
    if op == "!=":
        return left != right
    if isinstance(left, str) or isinstance(right, str):
        raise ValueError(f"`{op}` needs numbers")
    match op:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            if right == 0:
                return None
            whole = isinstance(left, int) and isinstance(right, int) and left % right == 0
            return left // right if whole else left / right
        case "%":
            return None if right == 0 else left % right
        case "<":
            return left < right
        case "<=":
            return left <= right
        case ">":
            return left > right
        case ">=":
            return left >= right
    raise ValueError(f"a condition has no `{op}`")


def equation(expr: ast.Expr, sizes: Sizes) -> tuple[str, ast.Expr] | None:
    """`name, right side` of a condition that gives a size to a name that has none yet."""
    match expr:
        case ast.Binary(op="==", left=ast.Name(id=name), right=right) if not sizes.bound(name):
            return name, right
    return None


def choices(expr: ast.Expr) -> tuple[str, tuple[str, ...]] | None:
    """`argument, words` of a condition `arg == "a" or arg == "b"`; None for any other condition."""
    match expr:
        case ast.Binary(op="==", left=ast.Name(id=name), right=ast.String(value=word)):
            return name, (word,)
        case ast.Binary(op="or", left=left, right=right):
            first, second = choices(left), choices(right)
            if first and second and first[0] == second[0]:
                return first[0], (*first[1], *second[1])
    return None


def divisibility(expr: ast.Expr) -> tuple[ast.Expr, ast.Expr] | None:
    """`whole, part` of `whole % part == 0` or `divides(part, whole)`."""
    match expr:
        case ast.Binary(op="==", left=ast.Binary(op="%", left=whole, right=part), right=ast.Number(value=0)):
            return whole, part
        case ast.Call(func=ast.Name(id="divides"), args=(part_arg, whole_arg)):
            return whole_arg.value, part_arg.value
    return None


def describe(expr: ast.Expr, sizes: Sizes) -> str:
    """An expression with the user's names: `t.H`, `s.A * s.D`, `heads`."""
    match expr:
        case ast.Name(id=name):
            return sizes.dims[name].name if name in sizes.dims and name not in sizes.values else name
        case ast.Binary(op=op, left=left, right=right):
            return f"{describe(left, sizes)} {op} {describe(right, sizes)}"
        case ast.Unary(op=op, value=value):
            return f"{op}{describe(value, sizes)}" if op == "-" else f"{op} {describe(value, sizes)}"
        case ast.Call(func=ast.Name(id=function), args=args):
            return f"{function}({', '.join(describe(arg.value, sizes) for arg in args)})"
    plain = literal(expr)
    return f'"{plain}"' if isinstance(plain, str) else str(plain)


def with_value(expr: ast.Expr, sizes: Sizes) -> str:
    """`t.H = 1024`; the bare text for a number."""
    text, value = describe(expr, sizes), evaluate(expr, sizes)
    return text if value is None or str(value) == text else f"{text} = {value}"


def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [k for k in range(1, int(number**0.5) + 1) if number % k == 0]
    return tuple(sorted({*small, *(number // k for k in small)}))


def nearest(candidates: tuple[int, ...], wanted: float, count: int = 4) -> tuple[int, ...]:
    """The candidates closest to a number, ascending."""
    return tuple(sorted(sorted(candidates, key=lambda k: (abs(k - wanted), k))[:count]))


def failure(expr: ast.Expr, sizes: Sizes) -> str:
    """What a condition that does not hold says, with the numbers."""
    parts = divisibility(expr)
    if parts is not None:
        return f"{with_value(parts[0], sizes)} is not divisible by {with_value(parts[1], sizes)}"
    match expr:
        case ast.Binary(op="<=" | "<" | ">=" | ">" | "==" | "!=" as op, left=left, right=right):
            words = {
                "<=": "is more than",
                "<": "is not less than",
                ">=": "is less than",
                ">": "is not more than",
                "==": "differs from",
                "!=": "must differ from",
            }
            return f"{with_value(left, sizes)} {words[op]} {with_value(right, sizes)}"
    used: Mapping[str, None] = dict.fromkeys(names_in(expr))
    shown = ", ".join(with_value(ast.Name(expr.span, name), sizes) for name in used)
    return f"{describe(expr, sizes)} does not hold: {shown}"
