"""What a pass changes inside a forward: blocks of another model in a block's place, tensors taken or added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gkd_dsl.graph.nodes import AddToTap, Change, ReplaceBlock, SwapTap
from gkd_dsl.graph.plan import ForwardPlan
from gkd_dsl.models.errors import TapError
from gkd_dsl.models.resolve import Hook
from gkd_dsl.models.taps import TapPath
from gkd_dsl.schedules import Clock

Lend = Callable[[str, Sequence[int]], Sequence[nn.Module]]
"""Blocks of a model by its name and their indices."""

Edit = Callable[[Tensor], Tensor]
Place = Callable[[TapPath], tuple[nn.Module, Hook]]


@dataclass(frozen=True)
class Edits:
    """The changes of one forward with what they need.

    blocks   for a block's index, the blocks that run in its place
    tensors  for a tap of the residual stream, what is done with it, in order
    """

    blocks: Mapping[int, tuple[nn.Module, ...]] = field(default_factory=dict)
    tensors: Mapping[TapPath, tuple[Edit, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.blocks or self.tensors)


def at_clock(forward: ForwardPlan, clock: Clock) -> ForwardPlan:
    """A forward with the changes that are made at this step."""
    if not forward.changes:
        return forward
    return replace(forward, changes=tuple(change for change in forward.changes if _made(change, clock)))


def _made(change: Change, clock: Clock) -> bool:
    return isinstance(change, AddToTap) or change.when.value(clock) != 0.0


def edits(forward: ForwardPlan, env: Mapping[str, Tensor], lend: Lend, leaves: Collection[TapPath] = ()) -> Edits:
    """The changes of a forward, all of which are made, with their tensors from `env`.

    `leaves` are taps at which a gradient is taken; where nothing before one trains, it starts there.
    """
    values = {slot: env[key] for slot, key in forward.values if key in env}
    blocks: dict[int, tuple[nn.Module, ...]] = {}
    tensors: dict[TapPath, list[Edit]] = defaultdict(list)
    for change in forward.changes:
        if isinstance(change, ReplaceBlock):
            blocks[change.index] = tuple(lend(change.model, change.layers))
        elif isinstance(change, SwapTap):
            tensors[change.path].append(
                partial(swapped, source=values[f"{change.slot}.source"], at=values.get(f"{change.slot}.at"))
            )
        else:
            tensors[change.path].append(partial(_sum, values[change.slot]))
    for path in leaves:
        tensors[path].append(_leaf)
    return Edits(blocks, {path: tuple(found) for path, found in tensors.items()})


def swapped(value: Tensor, source: Tensor, at: Tensor | None) -> Tensor:
    """`value` `[B, L, H]` with positions of `source`: all, those where Bool `[B, L]` is true, or those that an Int
    `[B, L]` names (-1: keep)."""
    source = source.to(value.dtype)
    if at is None:
        return source
    if at.dtype == torch.bool:
        return torch.where(at.unsqueeze(-1), source, value)
    index = at.clamp_min(0).unsqueeze(-1).expand(-1, -1, source.shape[-1])
    return torch.where((at >= 0).unsqueeze(-1), source.gather(1, index), value)


def _sum(added: Tensor, value: Tensor) -> Tensor:
    return value + added.to(value.dtype)


def _leaf(value: Tensor) -> Tensor:
    """A tensor that a gradient can be taken at: itself, or a leaf where nothing before it trains."""
    if value.requires_grad or not torch.is_grad_enabled():
        return value
    return value.detach().requires_grad_()


@contextmanager
def applied(made: Edits, place: Place, configs: Sequence[Any]) -> Iterator[None]:
    """Within, forwards of the model are changed; hooks that are put on later see the changed tensors.

    `place` gives the module of a tap, `configs` are those of the model. A block that is changed is not checkpointed:
    computing it again after its forward would compute the unchanged one.
    """
    with ExitStack() as stack:
        for index, blocks in made.blocks.items():
            module, _ = place(TapPath("hidden", index + 1))
            _not_checkpointed(stack, module)
            held = module.__dict__.get("forward")
            module.forward = partial(_in_place, blocks, configs)
            stack.callback(_put_back, module, held)
            for block in blocks:
                stack.enter_context(_evaluating(block))
        for path, changes in made.tensors.items():
            module, spec = place(path)
            if spec.side != "output" or spec.transform != "none":
                raise TapError(f"`{path}` cannot be changed in this model", kind="unavailable")
            _not_checkpointed(stack, module)
            stack.callback(module.register_forward_hook(partial(_edited, changes, spec.index)).remove)
        yield


def _put_back(module: nn.Module, held: Any) -> None:
    if held is None:
        del module.__dict__["forward"]
    else:
        module.forward = held


def _not_checkpointed(stack: ExitStack, module: nn.Module) -> None:
    if getattr(module, "gradient_checkpointing", False):
        module.gradient_checkpointing = False  # type: ignore[assignment]
        stack.callback(setattr, module, "gradient_checkpointing", True)


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    """Within, a block draws no dropout; each of its modules is put back as it was."""
    training = [module for module in block.modules() if module.training]
    block.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _in_place(blocks: Sequence[nn.Module], configs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """Run blocks one after the other with the arguments of the block whose place they take."""
    positional = bool(args)
    hidden = args[0] if positional else kwargs.pop("hidden_states")
    kind, output = hidden.dtype, hidden
    for block in blocks:
        output = _run(block, hidden, args[1:] if positional else (), kwargs, configs)
        hidden = output[0] if isinstance(output, tuple) else output
    hidden = hidden.to(kind)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _run(
    block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], configs: Sequence[Any]
) -> Any:
    dtype = next(block.parameters()).dtype
    if hidden.dtype != dtype and not torch.is_autocast_enabled(hidden.device.type):
        hidden, args = hidden.to(dtype), _cast(args, dtype)
        kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
    with _attending_as(block, configs):
        trained = {name: value.detach() for name, value in block.named_parameters() if value.requires_grad}
        if not trained:
            return block(hidden, *args, **kwargs)
        # Its own model may be trained in this step; from here its parameters get no gradient.
        return torch.func.functional_call(block, trained, (hidden, *args), kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_cast(item, dtype) for item in value) if isinstance(value, tuple) else value


@contextmanager
def _attending_as(block: nn.Module, configs: Sequence[Any]) -> Iterator[None]:
    """Within, a block computes attention as the model does that made its masks: their form depends on it."""
    from gkd_dsl.runtime.models.tapper import configs_of

    own = configs_of(block)
    before = [config._attn_implementation for config in own]
    try:
        for config in own:
            config._attn_implementation = configs[0]._attn_implementation if configs else config._attn_implementation
        yield
    finally:
        for config, name in zip(own, before, strict=True):
            config._attn_implementation = name


def _edited(changes: Sequence[Edit], index: int, module: nn.Module, args: Any, output: Any) -> Any:
    value = output[index] if isinstance(output, tuple | list) else output
    for change in changes:
        value = change(value)
    if not isinstance(output, tuple | list):
        return value
    return type(output)([*output[:index], value, *output[index + 1 :]])
