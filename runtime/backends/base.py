"""What a backend does: where tensors live, in which precision, and how a step is made of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.graph.nodes import AttrValue, OptimSpec
from gkd_dsl.runtime.processes import Processes
from gkd_dsl.runtime.step import Batch, StepModule
from gkd_dsl.schedules import Clock


@dataclass(frozen=True)
class Settings:
    """How a spec is run; none of it changes what is computed.

    precision   `fp32`, or `bf16` forwards under autocast (losses stay in fp32)
    device      `auto` (the GPU that is there, else the CPU), `cpu`, `cuda`
    checkpoint  gradient checkpointing of the trained models
    runtime     all settings of the runtime block, to plan by
    """

    precision: str = "fp32"
    device: str = "auto"
    checkpoint: bool = False
    runtime: tuple[tuple[str, AttrValue], ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, runtime: Sequence[tuple[str, AttrValue]]) -> Settings:
        """The settings of a plan's runtime block."""
        given = dict(runtime)
        return cls(
            str(given.get("precision", "fp32")),
            str(given.get("device", "auto")),
            bool(given.get("checkpoint", False)),
            tuple(runtime),
        )


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step gave.

    loss           the objective over all micro-batches
    terms          each loss before its weight
    weights        the weight of each loss
    gradient_norm  the 2-norm of all gradients, before clipping
    watched        the losses that a counter or a policy reads
    skipped        whether the gradients were beyond the numbers of fp16, and nothing was updated
    """

    loss: float
    terms: Mapping[str, float]
    weights: Mapping[str, float]
    gradient_norm: float
    watched: Mapping[str, float] = field(default_factory=dict)
    skipped: bool = False


class Backend(Protocol):
    """Runs the steps of one stage at a time."""

    device: torch.device
    processes: Processes

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """Bring a model to where it is run."""

    def begin(self, step: StepModule, optim: OptimSpec) -> None:
        """Take a stage's step, and make its optimiser."""

    def step(self, batches: Sequence[Batch], clock: Clock, rate: float) -> StepResult:
        """Forward and backward of every micro-batch, clipping, and the optimiser at this learning rate.

        Raises RunError: a loss or a gradient that is not finite, or too little memory. Nothing is updated then.
        """

    def taps_context(self) -> Any:
        """The context in which forwards are run: precision."""

    def move(self, batch: Batch) -> dict[str, Tensor]:
        """A batch on the device."""

    def infer(self, function: Callable[[], None]) -> None:
        """Run a function that reads the parameters of models, in the precision of the forwards."""

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint holds of a module, by name; every process must ask, the first is sure to get it."""

    def load(self, module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
        """Copy saved tensors into a module. Raises RunError where names or shapes differ."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's tensors by `what/parameter`."""

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put them back."""

    def end(self) -> None:
        """Let go of the stage: freezing and gradient checkpointing are undone."""
