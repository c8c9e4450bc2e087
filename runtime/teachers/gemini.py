"""A model in Gemini's chunks: in half precision, shared out over the processes and host memory, fetched as it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.graph.nodes import ModelNode
from gkd_dsl.graph.plan import ForwardPlan
from gkd_dsl.runtime.backends.gemini import Inside, quiet
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.models.halved import HALF, halve
from gkd_dsl.runtime.models.interventions import Edits
from gkd_dsl.runtime.models.tapper import Tapper
from gkd_dsl.runtime.rows import collective
from gkd_dsl.runtime.teachers.base import run_taps
from gkd_dsl.runtime.teachers.disk import on_disk

log = logging.getLogger("gkd_dsl")
_HINT = "write `placement = resident`"
_CHUNKS = ("min_chunk_size_m", "search_range_m", "hidden_dim", "pin_memory")


class GeminiTeachers:
    """One model in chunks, under no_grad. Every process has to ask for the same taps at the same time.

    shard    the share of the parameters of which each process holds its part alone
    offload  the share of them that is in host memory
    chunks   the settings of the runtime block
    """

    def __init__(
        self,
        node: ModelNode,
        whole: Callable[[], PreTrainedModel],
        *,
        shard: float = 1.0,
        offload: float = 1.0,
        chunks: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the model, `whole` only where its files cannot be read weight by weight. Raises RunError."""
        if not dist.is_initialized():
            raise RunError(
                CANNOT_RUN, f"`{node.name}` has `placement = gemini`, and the backend is not Gemini",
                "write `backend = gemini`, or `placement = offload`",
            )  # fmt: skip
        with quiet():
            from gkd_dsl.runtime.backends.gemini_frozen import FrozenInChunks, empty

        self.name = node.name
        dtype = HALF.get(str((chunks or {}).get("precision")), torch.bfloat16)
        model, find = _read(node, whole, dtype, empty)
        # As it is in memory: the residual stream stays in fp32.
        halve(model, dtype)
        settings = {name: value for name, value in (chunks or {}).items() if name in _CHUNKS}
        # Chunks in pinned memory need not be copied back after use.
        settings.setdefault("pin_memory", torch.cuda.is_available())
        with quiet(), collective():
            self._wrapped = FrozenInChunks(Inside(model), find, dtype, shard=shard, offload=offload, **settings)
        self.model = model.eval()
        self._tapper = Tapper(model, node.info)

    def taps(
        self, forward: ForwardPlan, inputs: Mapping[str, Tensor], env: Mapping[str, Tensor], changes: Edits
    ) -> dict[str, Tensor]:
        """The taps of one forward, by their keys; `env` holds what stands in for its inputs.

        Raises RunError where a gradient is to flow through the model: its chunks are gone by then.
        """
        if forward.grad:
            raise RunError(CANNOT_RUN, f"a gradient flows through `{self.name}`, which is in Gemini's chunks", _HINT)
        if self.model.training:
            self.model.eval()
        with torch.no_grad():
            return self._wrapped(lambda: run_taps(self._tapper, forward, inputs, env, changes))

    def blocks(self, model: str, layers: Sequence[int]) -> Sequence[nn.Module]:
        """Raises RunError: parameters come and go, and can be lent to no other model."""
        raise RunError(
            CANNOT_RUN, f"blocks of `{model}` are to run in another model, and are in Gemini's chunks", _HINT
        )

    def held(self) -> int:
        """The bytes of parameters that this process has now."""
        return self._wrapped.held()


def _read(
    node: ModelNode,
    whole: Callable[[], PreTrainedModel],
    dtype: torch.dtype,
    empty: Callable[[torch.Size, torch.dtype], nn.Parameter],
) -> tuple[PreTrainedModel, Callable[[nn.Parameter], Tensor | None]]:
    """A model, and what finds the values of those of its parameters that are empty."""
    try:
        model, saved, files = on_disk(node.info, node.name)
    except RunError as error:
        log.info("every process reads `%s` whole before it is shared out: %s", node.name, error.message)
        model = whole()
        if any(not parameter.is_floating_point() for parameter in model.parameters()):
            message = f"`{node.name}` has weights that are no floating-point numbers, and Gemini holds half precision"
            raise RunError(CANNOT_RUN, message, _HINT) from None
        return model, lambda _: None
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                made[id(parameter)] = empty(parameter.shape, dtype)
            module.register_parameter(name, made[id(parameter)])
    names = {id(parameter): saved[name] for name, parameter in model.named_parameters()}
    return model, lambda parameter: files.tensor(names[id(parameter)], dtype)
