"""AdamW for Gemini without a compiler: torch's own fused kernel behind ColossalAI's kernel loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader, KernelLoader
from colossalai.nn.optimizer import HybridAdam
from torch import Tensor
from torch.optim.adamw import adamw


def adam(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    scale: float,
) -> None:
    """One AdamW step of fp32 tensors, in place; gradients of any dtype are divided by `scale` where it is positive."""
    for value, gradient, mean, square in zip(values, gradients, means, squares, strict=True):
        exact = gradient.to(torch.float32)
        if scale > 0:
            exact = exact / scale
        before = torch.tensor(float(step - 1), device=value.device)
        adamw(
            [value], [exact], [mean], [square], [], [before], foreach=False, fused=True, amsgrad=False,
            beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=decay, eps=eps, maximize=False,
        )  # fmt: skip


class _OnHost:
    """What the loader of the CPU kernel gives: called for fp16 gradients."""

    class CPUAdamOptimizer:
        def __init__(self, *settings: Any) -> None:
            """Nothing is kept: each call brings its settings."""

        def step(
            self, step: int, lr: float, beta1: float, beta2: float, eps: float, decay: float, corrected: bool,
            value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, scale: float,
        ) -> None:  # fmt: skip
            """One tensor."""
            adam([value], [gradient], [mean], [square], step=step, lr=lr, betas=(beta1, beta2), eps=eps, decay=decay,
                 scale=scale)  # fmt: skip


class _OnDevice:
    """What the loader of the GPU kernels gives."""

    @staticmethod
    def multi_tensor_adam(
        chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], lr: float, beta1: float, beta2: float,
        eps: float, step: int, mode: int, corrected: int, decay: float, scale: float,
    ) -> None:  # fmt: skip
        """Lists of gradients, values, means and squares."""
        gradients, values, means, squares = lists
        adam(values, gradients, means, squares, step=step, lr=lr, betas=(beta1, beta2), eps=eps, decay=decay,
             scale=scale)  # fmt: skip


class _Torch(_Extension):
    """An extension that needs no building."""

    kernels: Any = None

    def __init__(self) -> None:
        super().__init__(name=f"torch_{type(self).__name__.lower()}", support_aot=False, support_jit=True)

    def is_available(self) -> bool:
        """Always: torch is here."""
        return True

    def assert_compatible(self) -> None:
        """Every machine will do."""

    def build_aot(self) -> Any:
        """Nothing to build."""

    def build_jit(self) -> Any:
        """Nothing to build."""

    def load(self) -> Any:
        """The functions."""
        return self.kernels


class _Host(_Torch):
    kernels = _OnHost


class _Device(_Torch):
    kernels = _OnDevice


def why_not_built(loader: type[KernelLoader]) -> str | None:
    """Why none of ColossalAI's own kernels can be built here; None where one can."""
    reason = "there is no GPU"
    for extension in loader.REGISTRY:
        made = extension()
        if isinstance(made, _Torch) or not made.is_available():
            continue
        try:
            made.assert_compatible()
        except Exception as error:
            reason = str(error)
        else:
            return None
    return reason


def make_adam(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> HybridAdam:
    """ColossalAI's AdamW over parameter groups, with its compiled kernels only where they can be built."""
    for loader, extension in ((CPUAdamLoader, _Host), (FusedOptimizerLoader, _Device)):
        if extension not in loader.REGISTRY and why_not_built(loader) is not None:
            # A loader stops at one of its own that is there and cannot be built.
            loader.REGISTRY.clear()
            loader.register_extension(extension)
    made = HybridAdam(groups, lr=lr, betas=betas, eps=eps, adamw_mode=True)
    _scale_on_host(made)
    return made


def _scale_on_host(optimizer: HybridAdam) -> None:
    """Make bf16 gradients in host memory be clipped: HybridAdam 0.5.0 forgets to divide them."""
    step, update = optimizer.step, optimizer.torch_adam_update
    held = {"scale": -1.0}

    def scaled_step(closure: Any = None, div_scale: float = -1) -> Any:
        held["scale"] = div_scale
        return step(closure, div_scale)

    def scaled_update(value: Tensor, gradient: Tensor, *more: Any) -> None:
        exact = gradient.float()
        update(value, exact / held["scale"] if held["scale"] > 0 else exact, *more)

    optimizer.step, optimizer.torch_adam_update = scaled_step, scaled_update
