"""Several processes, each with whole models: the rows of every micro-batch are shared out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gkd_dsl.graph.nodes import OptimSpec
from gkd_dsl.runtime import rows
from gkd_dsl.runtime.backends.base import Settings
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.processes import Processes
from gkd_dsl.runtime.rows import Share
from gkd_dsl.runtime.step import Batch, StepModule

_BUCKET = 25_000_000


class DdpBackend(LocalBackend):
    """Runs the steps of a stage in every process: the same losses as in one, to rounding.

    Every process makes the whole micro-batch and takes its rows, so counts are those of all processes. Each loss is
    divided by the count over all rows, and gradients are summed after the last micro-batch of a step.
    """

    kind = "ddp"

    def __init__(self, settings: Settings | None = None, processes: Processes | None = None) -> None:
        """Meet the other processes. Raises RunError where they cannot be met, or have no GPU each."""
        super().__init__(settings)
        self.processes = processes if processes is not None else Processes.here()
        self.device = _device(self.device, self.processes)
        if self.processes.count > 1:
            self.processes.join(self.device)

    def begin(self, step: StepModule, optim: OptimSpec) -> None:
        """Take a stage's step; all processes start from the weights of the first."""
        count, size = self.processes.count, step.plan.stage.batch_size
        if size % count:
            raise RunError(
                CANNOT_RUN,
                f"stage `{step.plan.name}` has micro-batches of {size} texts, for {count} processes",
                f"write `batch_size = {-(-size // count) * count}`, a multiple of {count}",
            )
        super().begin(step, optim)
        if count > 1:
            with rows.collective(), torch.no_grad():
                for _, parameter in self._named:
                    dist.broadcast(parameter.data, src=0)

    def _share(self, batch: Batch) -> Share | None:
        if self.processes.count == 1:
            return None
        total = next(iter(batch.values())).shape[0]
        return Share.of(total, self.processes.rank, self.processes.count)

    def _join_gradients(self) -> None:
        """Sum the gradients of all processes. A parameter without one anywhere keeps none."""
        if self.processes.count == 1:
            return
        parameters = [parameter for _, parameter in self._named]
        there = torch.tensor([float(p.grad is not None) for p in parameters])
        with rows.collective():
            dist.all_reduce(there)
        gradients: list[Tensor] = []
        for parameter, seen in zip(parameters, there.tolist(), strict=True):
            if seen:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with rows.collective():
                dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))


def _device(found: torch.device, processes: Processes) -> torch.device:
    if found.type != "cuda":
        return found
    if processes.local >= torch.cuda.device_count():
        message = f"process {processes.local + 1} of this machine has no GPU: there are {torch.cuda.device_count()}"
        raise RunError(CANNOT_RUN, message, "start as many processes as there are GPUs, or write `device = cpu`")
    torch.cuda.set_device(processes.local)
    return torch.device("cuda", processes.local)


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gradients of one dtype, in order, so many at a time that one exchange is large and needs little room."""
    found: list[list[Tensor]] = []
    held = 0
    for gradient in gradients:
        if not found or found[-1][0].dtype != gradient.dtype or held + gradient.numel() > _BUCKET:
            found.append([])
            held = 0
        found[-1].append(gradient)
        held += gradient.numel()
    return found
