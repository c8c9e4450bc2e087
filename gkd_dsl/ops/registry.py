"""The operators of the language by name. Their signatures are parsed when they are first used."""

from __future__ import annotations

from functools import cache

from gkd_dsl.ops.signature import Compiled, compile_signature
from gkd_dsl.ops.spec import Kind, OpSpec


@cache
def _table() -> dict[str, OpSpec]:
    from gkd_dsl.ops import (
        angles,
        choice,
        contrast,
        interventions,
        layers,
        losses,
        masks,
        metrics,
        relations,
        segments,
        tensors,
        vocabulary,
    )

    table: dict[str, OpSpec] = {}
    for module in (
        losses,
        angles,
        contrast,
        tensors,
        relations,
        choice,
        layers,
        segments,
        interventions,
        vocabulary,
        masks,
        metrics,
    ):
        for spec in module.OPS:
            if spec.name in table:
                raise ValueError(f"two operators are called `{spec.name}`")
            table[spec.name] = spec
    return table


def lookup(name: str) -> OpSpec | None:
    """The operator of this name, or None."""
    return _table().get(name)


def names(kind: Kind | None = None) -> tuple[str, ...]:
    """The names of all operators, or of one kind, sorted; those of Python files (`ops.py:gram2`) are left out."""
    return tuple(sorted(spec.name for spec in specs(kind)))


def specs(kind: Kind | None = None) -> tuple[OpSpec, ...]:
    """All operators, or those of one kind, in the order of the tables; those of Python files are left out."""
    return tuple(spec for spec in _table().values() if ":" not in spec.name and kind in (None, spec.kind))


def register(spec: OpSpec, *, replace: bool = False) -> None:
    """Add a user's operator. Its signatures are parsed at once.

    Raises ValueError when the name is taken (unless `replace`) or a signature says what no operator can have, and
    SpecError where it does not parse.
    """
    if spec.name in _table() and not replace:
        raise ValueError(f"there is an operator `{spec.name}` already")
    signatures = [compile_signature(text, spec.name) for text in spec.signatures]
    if not signatures:
        raise ValueError(f"the operator `{spec.name}` has no signature")
    for signature in signatures:
        if (signature.result == "Loss") != (spec.kind == "loss"):
            raise ValueError(f"`{spec.name}` is a {spec.kind}, but its result is {signature.result or 'a number'}")
    _table()[spec.name] = spec


def unregister(name: str) -> None:
    """Take a user's operator out again; a name that is not there is no error."""
    _table().pop(name, None)


def signatures(spec: OpSpec) -> tuple[Compiled, ...]:
    """The parsed signatures of an operator, in the order they are tried."""
    return tuple(compile_signature(text, spec.name) for text in spec.signatures)


def argument_names(spec: OpSpec) -> tuple[str, ...]:
    """Every argument that a caller can name in some overload."""
    seen: dict[str, None] = {}
    for signature in signatures(spec):
        seen.update(dict.fromkeys(signature.names))
    return tuple(seen)


def has_argument(spec: OpSpec, name: str) -> bool:
    """Whether some overload has this argument (`causal`, `vocabulary`, ...)."""
    return name in argument_names(spec)


def pair_slots(spec: OpSpec) -> tuple[tuple[str, str], ...]:
    """The slots of the pairs `left <- right` that the operator takes, by its first overload."""
    return tuple((arg[0].name, arg[1].name) for arg in signatures(spec)[0].args if isinstance(arg, tuple))
