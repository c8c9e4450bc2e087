"""The interpreter of a plan's instructions over an environment of named tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from gkd_dsl.graph.nodes import AttrValue
from gkd_dsl.graph.passes.liveness import made, reads
from gkd_dsl.graph.plan import Apply, ForwardPlan, Free, Fused, Instruction, Run
from gkd_dsl.ops.registry import lookup
from gkd_dsl.ops.signature import compile_signature
from gkd_dsl.runtime import rows
from gkd_dsl.runtime.errors import CANNOT_RUN, SHAPES, RunError, out_of_memory
from gkd_dsl.runtime.ops.registry import Operator, functions
from gkd_dsl.runtime.ops.sparse import sparse_functions
from gkd_dsl.schedules import Clock, Schedule
from gkd_dsl.types import Dim, LossType, TensorType, ValueType

Env = dict[str, Tensor]
Special = Callable[[Apply, Env, Clock], Tensor]
_REDUCTION_ONLY = ("token_weight", "sample_weight")


class Program:
    """Instructions with the functions and the projections that they name.

    `projections` holds the modules by the name and by the key of their node, `special` the operators that the step
    runs itself. Schedules among the attributes are evaluated at the clock of the step. An operator that draws numbers
    is given a generator whose seed is that of the clock, the key, the step and the micro-batch, so that it draws the
    same when it is run again.
    """

    def __init__(
        self,
        instructions: Sequence[Instruction],
        projections: Mapping[str, nn.Module],
        forwards: Iterable[ForwardPlan],
        special: Mapping[str, Special] | None = None,
    ) -> None:
        self.instructions = tuple(instructions)
        self._projections = projections
        self._forwards = {forward.key: forward for forward in forwards}
        self._special = dict(special or {})
        table = functions()
        applied = {i.op for i in self.instructions if isinstance(i, Apply)} - self._special.keys()
        sparse = sparse_functions(sorted(applied))
        self._functions: dict[str, Operator] = {op: sparse.get(op) or table[op] for op in applied}
        self._slots = {op: _accepted(function) for op, function in self._functions.items()}
        self._related = {op for op in applied if _relates(op)}
        self._needed: dict[frozenset[str], tuple[Instruction, ...]] = {}

    def run(
        self,
        env: Env,
        clock: Clock,
        forward: Callable[[str, Env], None],
        *,
        wanted: Collection[str] | None = None,
        see: Callable[[str, ValueType, Tensor], None] | None = None,
        fused: Callable[[Fused, Env], None] | None = None,
    ) -> None:
        """Run over `env`, which holds the batch; `forward` puts the taps of a forward into it.

        With `wanted`, only what these keys need is run. `see` is shown each result, and may take it out. `fused` runs
        losses that are fused.
        """
        instructions = self.instructions if wanted is None else self._for(frozenset(wanted))
        for instruction in instructions:
            if isinstance(instruction, Run):
                forward(instruction.forward, env)
            elif isinstance(instruction, Free):
                for key in instruction.keys:
                    env.pop(key, None)
            elif isinstance(instruction, Fused):
                assert fused is not None
                fused(instruction, env)
            else:
                value = self._apply(instruction, env, clock)
                env[instruction.key] = value
                if see is not None:
                    see(instruction.key, instruction.type, value)

    def _apply(self, step: Apply, env: Env, clock: Clock) -> Tensor:
        if step.op in self._special:
            return self._special[step.op](step, env, clock)
        inputs: dict[str, Any] = {}
        for slot, key in step.inputs:
            if step.op == "project" and slot == "block":
                inputs[slot] = self._projections[key]
            elif not self._left_out(step, slot):
                inputs[slot] = env[key]
        attrs = {name: plain(value, clock) for name, value in step.attrs}
        for name in ("dims", "causal"):
            if name in attrs and not self._takes(step.op, name):
                del attrs[name]
        if self._slots[step.op] is not None and self._takes(step.op, "generator"):
            attrs["generator"] = generator(step.key, clock)
        function = self._functions[step.op]
        related = step.op in self._related and rows.current() is not None
        if related:
            inputs = {slot: _gathered(step.op, slot, value) for slot, value in inputs.items()}
        if step.op == "project":
            return function(**inputs, **attrs)
        if ":" in step.op:
            function = _in_words(step.op, function)
        if related:
            function = _own_rows(step, function)
        # A loss in bf16 would lose what separates student and teacher; only forwards and projections are cast.
        device = next((value.device.type for value in inputs.values() if isinstance(value, Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return function(**inputs, **attrs)
        with torch.autocast(device, enabled=False):
            return function(**inputs, **attrs)

    def _left_out(self, step: Apply, slot: str) -> bool:
        """Whether an input is for the reduction alone."""
        if isinstance(step.type, LossType) and slot in _REDUCTION_ONLY:
            return True
        return slot == "valid" and not self._takes(step.op, slot)

    def _takes(self, op: str, slot: str) -> bool:
        slots = self._slots[op]
        return slots is None or slot in slots

    def _for(self, wanted: frozenset[str]) -> tuple[Instruction, ...]:
        if wanted not in self._needed:
            self._needed[wanted] = _slice(self.instructions, wanted, self._forwards)
        return self._needed[wanted]


def _slice(
    instructions: tuple[Instruction, ...], wanted: frozenset[str], forwards: Mapping[str, ForwardPlan]
) -> tuple[Instruction, ...]:
    """The instructions that `wanted` needs."""
    needed = set(wanted)
    kept: list[Instruction] = []
    for instruction in reversed(instructions):
        if not isinstance(instruction, Free):
            if needed.isdisjoint(made(instruction, forwards)):
                continue
            if isinstance(instruction, Fused):
                terms = tuple(term for term in instruction.terms if term.key in needed)
                instruction = replace(instruction, terms=terms)
            needed.update(reads(instruction, forwards))
        kept.append(instruction)
    return tuple(reversed(kept))


def _in_words(name: str, function: Operator) -> Operator:
    """An operator of the user's, whose exceptions say which operator raised them and where; no memory stays so."""

    def call(**arguments: Any) -> Tensor:
        try:
            return function(**arguments)
        except Exception as error:
            if out_of_memory(error):
                raise
            file, trace, line = function.__code__.co_filename, error.__traceback__, None
            while trace is not None:
                line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == file else line
                trace = trace.tb_next
            message = f"the operator `{name}` raised {type(error).__name__}: {error}"
            raise RunError(CANNOT_RUN, message, f"in line {line} of its file" if line else "") from error

    return call


@cache
def _relates(op: str) -> bool:
    """Whether a sample's result may hang on other samples, or on which of them it is: on drawn numbers."""
    spec = lookup(op)
    return spec is not None and (spec.across_samples or spec.random or ":" in op)


@cache
def _batch_slots(op: str) -> frozenset[str] | None:
    """The slots of a user's operator whose first axis is the micro-batch; None, all of them, for others."""
    if ":" not in op:
        return None
    spec = lookup(op)
    found = {"valid"}
    for text in spec.signatures if spec is not None else ():
        slots = compile_signature(text, op).slots
        found |= {slot.name for slot in slots if slot.dims[:1] in (("B",), ("...",))}
    return frozenset(found)


def _gathered(op: str, slot: str, value: Any) -> Any:
    slots = _batch_slots(op)
    return rows.whole(value) if isinstance(value, Tensor) and (slots is None or slot in slots) else value


def _own_rows(step: Apply, function: Operator) -> Operator:
    """An operator over all rows that gives those of this process."""

    def call(**arguments: Any) -> Tensor:
        found = function(**arguments)
        first = step.type.dims[0].name if step.type.dims else ""
        return rows.own(found) if first == "B" else found

    return call


@cache
def _accepted(function: Operator) -> frozenset[str] | None:
    """The names a function takes; None where it takes any."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def plain(value: AttrValue, clock: Clock) -> Any:
    """An attribute at this step: a schedule's number, anything else as it is."""
    return value.value(clock) if isinstance(value, Schedule) else value


def generator(key: str, clock: Clock) -> torch.Generator:
    """Where an operator draws from at this step: on the CPU, and the same on every process."""
    text = f"{clock.seed}/{key}/{clock.step}/{clock.micro}"
    return torch.Generator().manual_seed(int.from_bytes(sha256(text.encode()).digest()[:7], "big"))


class ShapeCheck:
    """Compares shapes with what the plan says, `B` and `L` bound on one batch.

    `names` gives what a user calls a key, where that differs.
    """

    def __init__(self, batch: int, length: int | None, names: Mapping[str, str] | None = None) -> None:
        self._bound = {"B": batch, "L": length}
        self._names = names or {}

    def __call__(self, key: str, type: TensorType | LossType, value: Tensor) -> None:
        """Raises RunError where the tensor is not of the type."""
        expected = [self._bound.get(dim.name, dim.size) for dim in type.dims]
        if len(expected) == value.ndim and all(
            size is None or size == got for size, got in zip(expected, value.shape, strict=True)
        ):
            return
        axes = ", ".join(_axis(dim, size) for dim, size in zip(type.dims, expected, strict=True))
        origins = list(dict.fromkeys(dim.origin for dim in type.dims if dim.origin))
        raise RunError(
            SHAPES,
            f"`{self._names.get(key, key)}` should be [{axes}] and is {list(value.shape)} in the first batch",
            f"the sizes come from {'; '.join(origins)}" if origins else "",
        )


def _axis(dim: Dim, size: int | None) -> str:
    if size is None:
        return dim.name
    return f"{dim.name} = {size}" if dim.name else str(size)


def batch_keys(batch: Mapping[str, Tensor]) -> Env:
    """The columns of a batch under their keys in the environment."""
    return {f"batch/{column}": value for column, value in batch.items()}
