"""GeminiDDP around a model that nothing trains: chunks in half precision, no masters, no gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from colossalai.accelerator import get_accelerator
from colossalai.tensor.colo_parameter import ColoParameter
from colossalai.tensor.param_op_hook import ColoParamOpHook
from colossalai.zero import GeminiDDP
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.gemini.gemini_mgr import GeminiManager
from torch import Tensor, nn

Find = Callable[[nn.Parameter], Tensor | None]
"""The value of a parameter that has none yet; None for one that has."""


class FrozenInChunks(GeminiDDP):
    """A module whose parameters are shared out over the processes, from host memory as far as they are offloaded.

    A parameter gets the value that `find` gives when its turn comes: of a model that is read so, a process never
    holds more than its part, one chunk and one parameter.
    """

    def __init__(
        self, module: nn.Module, find: Find, dtype: torch.dtype, *, shard: float, offload: float, **settings: Any
    ) -> None:
        self._find = find
        buffers = {buffer: buffer.data for buffer in module.buffers() if buffer.is_floating_point()}
        for parameter in module.parameters():
            # What has no gradient at this moment is left out of the chunks.
            parameter.requires_grad_(True)
        size = sum(parameter.numel() for parameter in module.parameters())
        # What is smaller than one chunk would stay whole in every process.
        least = min(size / 2**20, float(settings.pop("min_chunk_size_m", 32.0)))
        super().__init__(
            module,
            placement_policy="static",
            # All in host memory at first; `_arrange` takes out what is to stay on the device.
            shard_param_frac=1.0,
            offload_optim_frac=1.0,
            offload_param_frac=1.0,
            mixed_precision=dtype,
            master_weights=False,
            enable_async_reduce=False,
            min_chunk_size_m=least,
            **settings,
        )
        self.hooks.append(_VectorsInFp32())
        self.remove_hooks()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        device = get_accelerator().get_current_device()
        for buffer, value in buffers.items():
            # Tables of positions lose too much in half precision.
            buffer.data = value.to(device)
        let_go(self.gemini_manager)
        self._arrange(shard, offload)
        self._find = _nothing

    def _preprocess_param(self, p: nn.Parameter) -> None:
        """Give an empty parameter its value, then make it one that chunks can hold."""
        value = self._find(p)
        if value is not None:
            p.data = value
        super()._preprocess_param(p)

    def _arrange(self, shard: float, offload: float) -> None:
        """Keep some chunks whole in every process, and the parts of some on the device. Between forwards all others go.

        Gemini's own policy lets all chunks go at the end of a forward, whatever these settings are.
        """
        manager, device = self.chunk_manager, get_accelerator().get_current_device()
        chunks = list(manager.get_chunks(self.fp16_params))
        total = sum(chunk.chunk_mem for chunk in chunks)
        whole = there = 0
        for chunk in chunks:
            if whole + chunk.chunk_mem <= total * (1 - shard):
                whole += chunk.chunk_mem
                manager.access_chunk(chunk)
                chunk.keep_gathered = True
                manager.fake_release_chunk(chunk)
            elif whole + there + chunk.chunk_mem <= total * (1 - offload):
                there += chunk.chunk_mem
                manager.move_chunk(chunk, device)
            else:
                continue
            chunk.pin_memory, chunk.cpu_shard = False, None
            self.grads_device |= dict.fromkeys(chunk.get_tensors(), device)
        self.gemini_manager.placement_policy.evict_tensors = self._evict

    def _evict(self, can_evict_chunks: list[Chunk], **_: Any) -> tuple[int, float]:
        """Let go of the chunks that no operation has now, each to where it lives."""
        for chunk in can_evict_chunks:
            self.chunk_manager.release_chunk(chunk)
            self.chunk_manager.move_chunk(chunk, self.grads_device[next(iter(chunk.tensors_info))])
        return 0, 0.0

    def held(self) -> int:
        """The bytes of parameters that this process has now, in chunks or out of them."""
        parts = [chunk.payload for chunk in self.chunk_manager.get_chunks(self.fp16_params)]
        # While the module runs, whatever is asked of a parameter would fetch it.
        with torch._C.DisableTorchFunctionSubclass():
            stores = [tensor.untyped_storage() for tensor in (*self.module.parameters(), *parts)]
        there = {store.data_ptr(): store.nbytes() for store in stores if store.nbytes()}
        return sum(there.values())


def let_go(manager: GeminiManager) -> None:
    """Keep a manager from being kept for good, with all its chunks: what it answers once is remembered by its class."""
    manager._get_layout_info = partial(GeminiManager._get_layout_info.__wrapped__, manager)


class _VectorsInFp32(ColoParamOpHook):
    """Gives operations biases and the weights of norms in fp32, as a model in half precision has them in memory."""

    def pre_forward(self, params: list[Tensor]) -> None:
        """Nothing to fetch."""

    post_forward = pre_backward = post_backward = pre_forward

    def rewrite_op(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """The operation on what is read so."""
        return lambda *args, **kwargs: func(*map(_read, args), **{name: _read(value) for name, value in kwargs.items()})


def _read(value: Any) -> Any:
    return value.float() if isinstance(value, ColoParameter) and value.ndim == 1 else value


def empty(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of this shape that takes no memory."""
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(shape))


def _nothing(parameter: nn.Parameter) -> Tensor | None:
    return None
