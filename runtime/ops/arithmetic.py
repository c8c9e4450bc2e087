"""Arithmetic and comparisons, element by element; one side may be a number."""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.common import full
from gkd_dsl.runtime.ops.registry import function

Operand = Tensor | float


def _full(x: Operand) -> Operand:
    return full(x) if isinstance(x, Tensor) else x


@function("add")
def add(a: Operand, b: Operand) -> Tensor:
    """a + b."""
    return a + b  # type: ignore[return-value]


@function("sub")
def sub(a: Operand, b: Operand) -> Tensor:
    """a - b."""
    return a - b  # type: ignore[return-value]


@function("mul")
def mul(a: Operand, b: Operand) -> Tensor:
    """a b."""
    return a * b  # type: ignore[return-value]


@function("div")
def div(a: Operand, b: Operand) -> Tensor:
    """a / b; inf or NaN where b is 0."""
    return a / b  # type: ignore[return-value]


@function("pow")
def power(a: Operand, b: Operand) -> Tensor:
    """a^b, in fp32."""
    return torch.pow(_full(a), _full(b))  # type: ignore[arg-type]


@function("neg")
def neg(x: Tensor) -> Tensor:
    """-x."""
    return -x


@function("log")
def log(x: Tensor) -> Tensor:
    """Natural logarithm, in fp32."""
    return full(x).log()


@function("exp")
def exp(x: Tensor) -> Tensor:
    """Exponential, in fp32."""
    return full(x).exp()


@function("abs")
def absolute(x: Tensor) -> Tensor:
    """|x|."""
    return x.abs()


@function("tanh")
def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent, in fp32."""
    return full(x).tanh()


@function("sqrt")
def sqrt(x: Tensor) -> Tensor:
    """Square root, in fp32, with gradient 0 at 0, where the true one is infinite."""
    x = full(x)
    zero = x == 0
    return torch.where(zero, x.new_zeros(()), torch.where(zero, x.new_ones(()), x).sqrt())


@function("less")
def less(a: Operand, b: Operand) -> Tensor:
    """a < b: Bool."""
    return a < b  # type: ignore[return-value]


@function("less_equal")
def less_equal(a: Operand, b: Operand) -> Tensor:
    """a <= b: Bool."""
    return a <= b  # type: ignore[return-value]


@function("greater")
def greater(a: Operand, b: Operand) -> Tensor:
    """a > b: Bool."""
    return a > b  # type: ignore[return-value]


@function("greater_equal")
def greater_equal(a: Operand, b: Operand) -> Tensor:
    """a >= b: Bool."""
    return a >= b  # type: ignore[return-value]


@function("select")
def select(cond: Tensor, a: Operand, b: Operand) -> Tensor:
    """a where the condition holds, b elsewhere; fp32 where both are plain numbers."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return torch.where(cond, float(a), float(b))
    return torch.where(cond, a, b)
