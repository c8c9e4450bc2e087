"""The loss scale of fp16 under Gemini: which steps it skips, and its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PREFIX = "scaler/"
_FIELDS = ("scale", "growth_step", "hysteresis_step")


class LossScale:
    """Watches the scaler of a GeminiOptimizer, which skips a step whose gradients are beyond fp16, in all processes.

    ColossalAI 0.5.0 divides gradients by a scale that may have grown since they were made, and after a skipped step
    adds new gradients to those that overflowed; both are put right here.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._mixin = optimizer, optimizer.mix_precision_mixin
        self._scaler = self._mixin.grad_scaler
        self._decide = self._mixin.should_skip_step
        self._mixin.should_skip_step, self._mixin.get_grad_div_scale = self._skips, self._divide
        self.used, self.skipped = self._mixin.loss_scale, False

    @property
    def now(self) -> float:
        """The scale of the next step."""
        return float(self._mixin.loss_scale)

    @property
    def least(self) -> bool:
        """Whether the last step had the least scale there is."""
        return self._scaler._min_scale is None or self.used <= float(self._scaler._min_scale)

    def step(self) -> bool:
        """The optimiser's step; whether it was skipped."""
        self.used, self.skipped = self._mixin.loss_scale, False
        self._optimizer.step()
        if self.skipped:
            self._optimizer.chunk_manager.accumulating_grads = False
        return self.skipped

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {PREFIX + name: torch.as_tensor(getattr(self._scaler, f"_{name}")).cpu().clone() for name in _FIELDS}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the state back."""
        scale, growth, hysteresis = (tensors[PREFIX + name] for name in _FIELDS)
        self._scaler._scale = scale.to(self._scaler._scale.device, self._scaler._scale.dtype, copy=True)
        self._scaler._growth_step, self._scaler._hysteresis_step = int(growth), int(hysteresis)

    def _skips(self) -> bool:
        self.skipped = bool(self._decide())
        return self.skipped

    def _divide(self) -> float:
        self._mixin.optim_state = type(self._mixin.optim_state).UNSCALED
        return self.used
