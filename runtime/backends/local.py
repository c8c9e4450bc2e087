"""One process: the CPU, or the GPU that is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.graph.nodes import OptimSpec
from gkd_dsl.runtime import rows
from gkd_dsl.runtime.backends.base import Settings, StepResult
from gkd_dsl.runtime.checkpoint import load_module, module_tensors
from gkd_dsl.runtime.errors import CANNOT_RUN, NOT_FINITE, RunError, in_memory
from gkd_dsl.runtime.models.checkpointing import set_checkpointing
from gkd_dsl.runtime.models.halved import HALF
from gkd_dsl.runtime.optim import make_optimizer
from gkd_dsl.runtime.processes import Processes
from gkd_dsl.runtime.rows import Share
from gkd_dsl.runtime.step import Batch, StepModule, StepOutput
from gkd_dsl.schedules import Clock


def device_of(name: str) -> torch.device:
    """The device of a setting. Raises RunError where it is not there."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise RunError(CANNOT_RUN, "`device = cuda`, and torch sees no GPU here", "write `device = auto`")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


class LocalBackend:
    """Runs the steps of a stage in this process."""

    kind = "local"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings if settings is not None else Settings()
        self.device = device_of(self.settings.device)
        self.processes = Processes()
        self._step: StepModule | None = None
        self._optim: OptimSpec | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._named: list[tuple[str, torch.nn.Parameter]] = []

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model on the device."""
        return model.to(self.device)  # type: ignore[arg-type]

    def begin(self, step: StepModule, optim: OptimSpec) -> None:
        """Take a stage's step, in train mode, and make its optimiser."""
        self._own_device(step)
        step.train()
        if self.settings.checkpoint:
            for name, model in step.models.items():
                try:
                    set_checkpointing(model, True)
                except ValueError as error:
                    raise RunError(CANNOT_RUN, f"`checkpoint = true`, and model `{name}` cannot: {error}") from error
        self._step, self._optim = step, optim
        self._named = step.trainable()
        self._make_optimizer(optim)

    def step(self, batches: Sequence[Batch], clock: Clock, rate: float) -> StepResult:
        """One optimiser step over all micro-batches.

        Raises RunError: a loss or a gradient that is not finite, or too little memory. Nothing is updated then.
        """
        step, optimizer, optim = self._held()
        try:
            with in_memory(lambda error: self._words(step, batches, error)):
                return self._train(step, optimizer, optim, batches, clock, rate)
        except RunError:
            optimizer.zero_grad(set_to_none=True)
            raise

    def alive(self) -> dict[str, int]:
        """Bytes of what the stage holds, by part."""
        from gkd_dsl.runtime.memory import alive

        return alive(self._step, self._optimizer) if self._step is not None else {}

    def _words(self, step: StepModule, batches: Sequence[Batch], error: BaseException) -> tuple[str, str]:
        """What is said of a step without memory; gradients must still be there."""
        # Planning is imported where memory ran out alone.
        from gkd_dsl.runtime.memory import memory_words

        return memory_words(
            step, self.alive(), batches, self.device, self.settings, backend=self.kind,
            processes=self.processes.count, error=error,
        )  # fmt: skip

    def taps_context(self) -> AbstractContextManager[object]:
        """Autocast to half precision where the settings say so."""
        dtype = HALF.get(self.settings.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype is not None else nullcontext()

    def move(self, batch: Batch) -> dict[str, Tensor]:
        """A batch on the device."""
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's tensors by `what/parameter`; parameters that had no gradient yet have none."""
        _, optimizer, _ = self._held()
        return {
            f"{what}/{name}": value
            for name, parameter in self._named
            for what, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the optimiser's tensors back, bit for bit."""
        _, optimizer, _ = self._held()
        parameters = dict(self._named)
        for key, value in tensors.items():
            what, _, name = key.partition("/")
            parameter = parameters[name]
            # torch keeps its step counter on the CPU.
            placed = value.clone() if what == "step" else value.to(parameter.device, copy=True)
            optimizer.state[parameter][what] = placed

    def infer(self, function: Callable[[], None]) -> None:
        """Run a function that reads parameters, in the precision of the forwards."""
        with self.taps_context():
            function()

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint holds of a module."""
        return module_tensors(module)

    def load(self, module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
        """Copy saved tensors into a module. Raises RunError where names or shapes differ."""
        load_module(module, tensors, what)

    def end(self) -> None:
        """Let go of the stage."""
        if self._step is None:
            return
        if self.settings.checkpoint:
            for model in self._step.models.values():
                set_checkpointing(model, False)
        for _, parameter in self._named:
            parameter.grad = None
        self._step.release()
        self._step.eval()
        self._step, self._optimizer, self._optim, self._named = None, None, None, []

    def _held(self) -> tuple[StepModule, torch.optim.Optimizer, OptimSpec]:
        if self._step is None or self._optimizer is None or self._optim is None:
            raise RuntimeError("the backend holds no stage: call begin first")
        return self._step, self._optimizer, self._optim

    def _own_device(self, step: StepModule) -> None:
        step.to(self.device)

    def _make_optimizer(self, optim: OptimSpec) -> None:
        self._optimizer = make_optimizer(optim, self._named)

    def _share(self, batch: Batch) -> Share | None:
        """The rows of this process; None for all of them."""
        return None

    def _join_gradients(self) -> None:
        """Make the gradients those of all rows."""

    def _forward(
        self, step: StepModule, batch: Batch, clock: Clock, denominators: Mapping[str, int], fused: bool = True
    ) -> StepOutput:
        share = self._share(batch)
        held = batch if share is None else {name: value[share.rows] for name, value in batch.items()}
        with self.taps_context(), rows.shared(share):
            return step(self.move(held), clock, denominators, fused=fused)

    def _train(
        self,
        step: StepModule,
        optimizer: torch.optim.Optimizer,
        optim: OptimSpec,
        batches: Sequence[Batch],
        clock: Clock,
        rate: float,
    ) -> StepResult:
        denominators = step.denominators(batches, clock)
        sums: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        total: Tensor | None = None
        step.policies.start()
        for number, batch in enumerate(batches):
            out = self._forward(step, batch, replace(clock, micro=number), denominators)
            if out.loss.requires_grad:
                out.loss.backward()
            weights = out.weights
            total = out.loss.detach() if total is None else total + out.loss.detach()
            for found, values in ((sums, out.terms), (watched, out.watched)):
                for name, value in values.items():
                    found[name] = found[name] + value if name in found else value
            del out
        if total is None:
            raise ValueError("a step needs a micro-batch")
        self._join_gradients()
        parameters = [parameter for _, parameter in self._named]
        norm = _gradient_norm(parameters, total)
        # One transfer from the device for all numbers of the step.
        *numbers, size = torch.stack([v.double() for v in (*sums.values(), *watched.values(), total, norm)]).tolist()
        *numbers, loss = self.processes.sum(numbers)
        terms = dict(zip(sums, numbers, strict=False))
        seen = dict(zip(watched, numbers[len(sums) :], strict=True))
        if not (math.isfinite(loss) and math.isfinite(size)):
            self._refuse(step, batches, clock, denominators, terms, weights, optimizer)
        if optim.clip is not None:
            gradients = [p for p in parameters if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(gradients, optim.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step.policies.learn(seen, clock)
        return StepResult(loss, terms, weights, size, seen)

    def _refuse(
        self,
        step: StepModule,
        batches: Sequence[Batch],
        clock: Clock,
        denominators: Mapping[str, int],
        terms: Mapping[str, float],
        weights: Mapping[str, float],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Raise an error that names the term that is not finite, or whose gradient is not."""
        at = f"in step {clock.step + 1} of stage `{step.plan.name}`"
        bad = next((name for name, value in terms.items() if not math.isfinite(value)), None)
        hint = "the model is as it was before this step; a lower learning rate or `precision = fp32` may help"
        if bad is not None:
            optimizer.zero_grad(set_to_none=True)
            raise RunError(NOT_FINITE, f"loss `{bad}` is {terms[bad]} {at}", hint)
        weight = next((name for name, value in weights.items() if not math.isfinite(value)), None)
        if weight is not None:
            optimizer.zero_grad(set_to_none=True)
            message = f"the weight of loss `{weight}` is {weights[weight]} {at}"
            raise RunError(NOT_FINITE, message, "its schedule divides by zero there")
        parameter = next((name for name, p in self._named if not _finite(p.grad)), None)
        optimizer.zero_grad(set_to_none=True)
        term = None
        for number, batch in enumerate(batches):
            out = self._forward(step, batch, replace(clock, micro=number), denominators, fused=False)
            term = term or self._term_at_fault(out)
        subject = f"the gradient of loss `{term}`" if term else "the gradient"
        where = f" (first at `{parameter}`)" if parameter else ""
        raise RunError(NOT_FINITE, f"{subject} is not finite {at}{where}", hint)

    def _term_at_fault(self, out: StepOutput) -> str | None:
        """The first loss whose own gradient is not finite."""
        parameters = [parameter for _, parameter in self._named]
        for name, value in out.values.items():
            if not value.requires_grad:
                continue
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            if self.processes.any(not all(_finite(gradient) for gradient in found)):
                return name
        return None


def _finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(torch.isfinite(gradient).all())


def _gradient_norm(parameters: Sequence[torch.nn.Parameter], like: Tensor) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=like.device)
    return torch.nn.utils.get_total_norm(gradients)
