"""Models whose blocks are brought to the device one after the other, from host memory or from the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.graph.plan import ForwardPlan
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.resolve import part_modules
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.models.interventions import Edits
from gkd_dsl.runtime.models.tapper import Tapper
from gkd_dsl.runtime.teachers.base import run_taps

Find = Callable[[str, Tensor], Tensor]
"""The weight of a name, in host memory; it is given the parameter that stands for it."""


def blocks_of(info: ModelInfo, name: str) -> list[str]:
    """The names of a model's blocks, in their order. Raises RunError for a model whose blocks are not known."""
    if info.family is None:
        kind = info.config.get("model_type", "?")
        raise RunError(
            CANNOT_RUN,
            f"`{name}` cannot be streamed: the blocks of a model of type `{kind}` are not known",
            "write `placement = resident`",
        )
    return [part_modules(info, f"layer.{index}")[0] for index in range(info.size("N") or 0)]


class StreamedTeachers:
    """One model, of which a block's weights are on the device while it runs; all else stays there.

    `find` gives the weights of the blocks. Where the device is the host they are used where they are. On a GPU the
    next block is copied on a stream of its own, out of pinned memory, while this one computes.
    """

    def __init__(self, node: ModelNode, model: PreTrainedModel, device: torch.device, find: Find) -> None:
        self.name, self.model, self.device = node.name, model.eval(), device
        modules = dict(model.named_modules())
        self._blocks = [modules[name] for name in blocks_of(node.info, node.name)]
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._find = find
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}
        self._homes: dict[int, list[tuple[nn.Module, str, nn.Parameter]]] = {
            number: [
                (module, name, parameter)
                for module in block.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None
            ]
            for number, block in enumerate(self._blocks)
        }
        self._settle()
        self._tapper = Tapper(model, node.info)
        for number, block in enumerate(self._blocks):
            block.register_forward_pre_hook(lambda *_, number=number: self._bring(number))
            block.register_forward_hook(lambda *_, number=number: self._leave(number))

    def taps(
        self, forward: ForwardPlan, inputs: Mapping[str, Tensor], env: Mapping[str, Tensor], changes: Edits
    ) -> dict[str, Tensor]:
        """The taps of one forward, by their keys; `env` holds what stands in for its inputs.

        Raises RunError where a gradient is to flow through the model: its weights are gone by then.
        """
        if forward.grad:
            raise RunError(
                CANNOT_RUN, f"a gradient flows through `{self.name}`, which is streamed", "write `placement = resident`"
            )
        if self.model.training:
            self.model.eval()
        self._fetch(0)
        try:
            found = run_taps(self._tapper, forward, inputs, env, changes)
        finally:
            # A forward that stops at a tap, or fails, leaves the block that it was in.
            for number in range(len(self._blocks)):
                self._drop(number)
            self._ready.clear()
        for tap in forward.taps:
            if tap.path.kind == "weight":
                found[tap.key] = self._weight(found[tap.key])
        return found

    def blocks(self, model: str, layers: Sequence[int]) -> Sequence[nn.Module]:
        """Raises RunError: blocks come and go, and can be lent to no other model."""
        raise RunError(
            CANNOT_RUN,
            f"blocks of `{model}` are to run in another model, and are streamed",
            "write `placement = resident`",
        )

    def head(self, model: str, module: str) -> nn.Module | None:
        """A module outside of the blocks by its name; None where there is none."""
        found = self.model.get_submodule(module) if module in dict(self.model.named_modules()) else None
        inside = any(found is part for block in self._blocks for part in block.modules())
        return None if inside else found

    def held(self) -> int:
        """The bytes of the blocks' weights that are on the device now."""
        there = [p for homes in self._homes.values() for m, n, home in homes if (p := m._parameters[n]) is not home]
        return sum(p.nbytes for p in there if p is not None)

    def _settle(self) -> None:
        """What is in no block goes to the device; what is goes to pinned memory where there is a GPU."""
        inside = {id(p) for homes in self._homes.values() for _, _, p in homes}
        for parameter in self.model.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.to(self.device)
            elif self._stream is not None and not parameter.is_meta:
                parameter.data = parameter.data.pin_memory()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def _fetch(self, number: int) -> None:
        """Begin to bring the weights of a block."""
        if number >= len(self._blocks) or number in self._ready:
            return
        ready: list[tuple[nn.Module, str, Tensor]] = []
        for module, name, home in self._homes[number]:
            weight = self._find(self._names[id(home)], home)
            if self._stream is None:
                ready.append((module, name, weight))
                continue
            with torch.cuda.stream(self._stream):
                pinned = weight if weight.is_pinned() else weight.pin_memory()
                ready.append((module, name, pinned.to(self.device, non_blocking=True)))
        self._ready[number] = ready

    def _bring(self, number: int) -> None:
        self._fetch(number)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        for module, name, weight in self._ready.pop(number):
            if self._stream is not None:
                weight.record_stream(torch.cuda.current_stream(self.device))
            home = module._parameters[name]
            if home is None or home.data_ptr() != weight.data_ptr() or home.is_meta:
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)

    def _leave(self, number: int) -> None:
        # Now, when this block's kernels are queued: the copy runs beside them.
        self._fetch(number + 1)
        self._drop(number)

    def _drop(self, number: int) -> None:
        for module, name, home in self._homes[number]:
            module._parameters[name] = home

    def _weight(self, value: Tensor) -> Tensor:
        name = self._names.get(id(value))
        return (self._find(name, value) if name is not None else value).detach().to(self.device)


def in_host_memory(name: str, parameter: Tensor) -> Tensor:
    """The weight itself, where the whole model is in host memory."""
    return parameter.detach()
