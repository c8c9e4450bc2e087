"""ColossalAI Gemini: parameters, gradients and optimiser state in chunks, shared out over ranks and host memory."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl.graph.nodes import AttrValue, OptimSpec
from gkd_dsl.runtime.backends.base import Settings, StepResult
from gkd_dsl.runtime.backends.ddp import DdpBackend
from gkd_dsl.runtime.backends.gemini_scale import PREFIX, LossScale
from gkd_dsl.runtime.errors import CANNOT_RUN, NOT_FINITE, OUT_OF_MEMORY, RunError, out_of_memory
from gkd_dsl.runtime.models.halved import HALF
from gkd_dsl.runtime.models.tapper import plain
from gkd_dsl.runtime.optim import groups_of
from gkd_dsl.runtime.processes import Processes
from gkd_dsl.runtime.step import Batch, StepModule, StepOutput
from gkd_dsl.runtime.teachers.live import LiveTeachers
from gkd_dsl.schedules import Clock

log = logging.getLogger("gkd_dsl")
T = TypeVar("T")
# With a limit that is never reached Gemini still computes the norm.
_NO_CLIP = 1e30
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer")
_OURS = ("backend", "precision", "device", "checkpoint", "fuse_logits")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what ColossalAI warns of when it is imported: kernels and libraries that Gemini does not use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def kernels() -> str:
    """Which AdamW Gemini has here, and why. Raises ImportError without ColossalAI."""
    with quiet():
        from gkd_dsl.runtime.backends.gemini_adam import CPUAdamLoader, why_not_built
    reason = why_not_built(CPUAdamLoader)
    if reason is None:
        return "ColossalAI's kernels, built at first use"
    return f"torch's own fused kernel; ColossalAI's cannot be built: {reason}"


def plugin_arguments(runtime: Sequence[tuple[str, AttrValue]]) -> dict[str, Any]:
    """Gemini's own arguments among the settings of a runtime block."""
    return {name: value for name, value in runtime if name not in _OURS and "." not in name}


class Inside(nn.Module):
    """Runs a function inside the wrapped module, where a parameter is fetched as it is read."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, function: Callable[[], T]) -> T:
        """What the function gives."""
        return function()


class GeminiBackend(DdpBackend):
    """Runs the steps of a stage under Gemini: parameters in half precision, fp32 masters and moments in chunks.

    Rows are shared out as by `ddp`. Between stages the models are plain ones in host memory, in fp32.
    """

    kind = "gemini"

    def __init__(
        self,
        settings: Settings | None = None,
        processes: Processes | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Meet the other processes. Raises RunError where ColossalAI or a GPU is missing."""
        try:
            with quiet():
                from colossalai.accelerator import get_accelerator
        except ImportError as error:
            hint = "`gkd doctor` says how to install it"
            raise RunError(CANNOT_RUN, f"`backend = gemini` needs ColossalAI: {error}", hint) from error
        given = settings if settings is not None else Settings()
        precision = given.precision if given.precision in HALF else "bf16"
        super().__init__(replace(given, precision=precision), processes)
        # Gemini has collective operations in one process too.
        self.processes.join(self.device)
        accelerator = get_accelerator()
        if accelerator.name not in ("cuda", "npu"):
            raise RunError(CANNOT_RUN, "`backend = gemini` needs a GPU, and there is none", "write `backend = local`")
        self.device = accelerator.get_current_device()
        self._real = self.device.type != "cpu"
        self._arguments = dict(arguments or {})
        self._wrapped: Any = None
        self._gemini: Any = None
        self._scale: LossScale | None = None
        self._before: dict[nn.Parameter, Tensor] = {}
        self._broken = False

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model in host memory: Gemini takes what is trained from there."""
        return model.to("cpu")  # type: ignore[arg-type]

    def begin(self, step: StepModule, optim: OptimSpec) -> None:
        """Take a stage's step: what it trains goes into chunks."""
        with quiet():
            from colossalai.booster import Booster
            from colossalai.booster.plugin import GeminiPlugin

            from gkd_dsl.runtime.backends.gemini_adam import make_adam
            from gkd_dsl.runtime.backends.gemini_frozen import let_go

        if optim.name != "adamw":
            raise RunError(CANNOT_RUN, f"`backend = gemini` has no `{optim.name}`", "write `optim = adamw(...)`")
        for model in _resident(step.teachers):
            model.to(self.device)
        super().begin(step, optim)
        # Where a stage accumulates, gradients need chunks of their own.
        arguments = self._arguments
        if step.plan.stage.accumulate > 1 and self.processes.count > 1:
            # What is smaller than one chunk stays whole on every rank, and ColossalAI 0.5.0 accumulates that wrongly:
            # the gradient so far is multiplied by the number of ranks.
            least = sum(parameter.numel() for _, parameter in self._named) / 2**20
            arguments = {**arguments, "min_chunk_size_m": min(least, float(arguments.get("min_chunk_size_m", 32.0)))}
        plugin = GeminiPlugin(
            precision=self.settings.precision,
            max_norm=optim.clip if optim.clip is not None else _NO_CLIP,
            enable_gradient_accumulation=step.plan.stage.accumulate > 1,
            enable_async_reduce=self._real,
            **arguments,
        )
        inside = Inside(step)
        self._before = {parameter: parameter.data for parameter in inside.parameters()}
        buffers = {buffer: buffer.data for buffer in inside.buffers() if buffer.is_floating_point()}
        groups = [{**group, "params": list(group["params"])} for group in groups_of(optim, self._named)]
        self._booster = Booster(plugin=plugin)
        self._wrapped, self._gemini, *_ = self._booster.boost(
            inside, make_adam(groups, optim.lr, optim.betas, optim.eps)
        )
        let_go(self._wrapped.gemini_manager)
        self._scale = LossScale(self._gemini) if self.settings.precision == "fp16" else None
        for buffer, value in buffers.items():
            # Tables of positions lose too much in half precision.
            buffer.data = value.to(self.device)
        self._write({parameter: self._before[parameter] for _, parameter in self._named})
        for _, parameter in self._named:
            del self._before[parameter]

    def alive(self) -> dict[str, int]:
        """Bytes of what this process holds of the stage: chunks, and what is not in any."""
        if self._wrapped is None or self._step is None:
            return super().alive()
        held = self._wrapped.chunk_manager.total_mem
        fixed = {p.data_ptr(): p.nbytes for model in _resident(self._step.teachers) for p in model.parameters()}
        return {"chunks on the device": held["cuda"], "in the host": held["cpu"], "other models": sum(fixed.values())}

    def _make_optimizer(self, optim: OptimSpec) -> None:
        """Gemini's is made when the step is in chunks."""

    def _own_device(self, step: StepModule) -> None:
        """Gemini moves what it needs."""

    def infer(self, function: Callable[[], None]) -> None:
        """Run a function that reads parameters, without gradient."""
        if self._wrapped is None:
            super().infer(function)
            return
        with self._together(), torch.no_grad(), self.taps_context():
            self._wrapped(function)

    def step(self, batches: Sequence[Batch], clock: Clock, rate: float) -> StepResult:
        """One optimiser step over all micro-batches.

        Raises RunError: a loss or a gradient that is not finite, too little memory, a process that has ended.
        """
        with self._together(batches):
            return self._in_chunks(batches, clock, rate)

    def _in_chunks(self, batches: Sequence[Batch], clock: Clock, rate: float) -> StepResult:
        step = self._step
        assert step is not None
        denominators = step.denominators(batches, clock)
        sums: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        total = torch.zeros((), device=self.device)
        step.policies.start()
        for number, batch in enumerate(batches):
            out = self._wrapped(lambda b=batch, n=number: self._reached(step, b, replace(clock, micro=n), denominators))
            # Gemini takes the mean over processes; each has a share of the sum.
            self._booster.backward(out.loss * float(self.processes.count), self._gemini)
            weights = out.weights
            total = total + out.loss.detach()
            for found, values in ((sums, out.terms), (watched, out.watched)):
                for name, value in values.items():
                    found[name] = found[name] + value if name in found else value
            del out
        numbers = torch.stack([v.double() for v in (*sums.values(), *watched.values(), total)]).tolist()
        *numbers, loss = self.processes.sum(numbers)
        terms = dict(zip(sums, numbers, strict=False))
        seen = dict(zip(watched, numbers[len(sums) :], strict=True))
        at = f"in step {clock.step + 1} of stage `{step.plan.name}`"
        hint = "go on from the last checkpoint with a lower learning rate"
        if self._scale is not None:
            hint = "fp16 has no numbers beyond 65504: write `precision = bf16`"
        for name, value in {**terms, "total": loss}.items():
            if not math.isfinite(value):
                raise RunError(NOT_FINITE, f"loss `{name}` is {value} {at}", hint)
        for group in self._gemini.param_groups:
            group["lr"] = rate
        skipped = self._update()
        size = float(self._gemini.get_grad_norm() or 0.0) / (self._scale.used if self._scale is not None else 1.0)
        self._gemini.zero_grad()
        if skipped:
            assert self._scale is not None
            if self._scale.least:
                message = f"the gradient is beyond fp16 at the least loss scale, {self._scale.used:g}, {at}"
                raise RunError(NOT_FINITE, message, hint)
            log.info("step %d is skipped; the loss scale is %g now", clock.step + 1, self._scale.now)
            step.policies.learn(seen, clock)
            return StepResult(loss, terms, weights, math.nan, seen, skipped=True)
        if not math.isfinite(size):
            raise RunError(NOT_FINITE, f"the gradient is not finite {at}", hint)
        step.policies.learn(seen, clock)
        return StepResult(loss, terms, weights, size, seen)

    def _update(self) -> bool:
        """The optimiser's step; whether it was skipped."""
        if self._scale is not None:
            return self._scale.step()
        self._gemini.step()
        return False

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint holds of a module; of what is in chunks the fp32 masters, from all processes."""
        if self._wrapped is None:
            return super().tensors(module)
        with self._together():
            masters = dict(self._masters())
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, value in module.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                seen.add(id(value))
                found[name] = masters[id(value)] if id(value) in masters else plain(value.detach())
        return found

    def load(self, module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
        """Copy saved tensors into a module, also into one in chunks."""
        if self._wrapped is None:
            super().load(module, tensors, what)
            return
        named = {name: value for name, value in module.named_parameters() if name in tensors}
        self._write({value: tensors[name] for name, value in named.items() if value not in self._before})

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's tensors by `what/parameter`, whole on the first process."""
        names = {id(parameter): name for name, parameter in self._named}
        found: dict[str, Tensor] = {}
        with self._together():
            states = self._gemini.state_dict(only_rank_0=True)["state"]
        for number, parameter in self._gemini.id_to_real_params.items():
            for what, value in states[number].items():
                whole = value if value.numel() == 1 and what == "step" else value.reshape(parameter.shape)
                found[f"{what}/{names[id(parameter)]}"] = whole
        return found | (self._scale.state() if self._scale is not None else {})

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the optimiser's tensors back, whatever the number of processes was."""
        parameters = dict(self._named)
        numbers = {id(parameter): number for number, parameter in self._gemini.id_to_real_params.items()}
        states: dict[int, dict[str, Tensor]] = {}
        if self._scale is not None:
            self._scale.load(tensors)
        for key, value in tensors.items():
            if key.startswith(PREFIX):
                continue
            what, _, name = key.partition("/")
            states.setdefault(numbers[id(parameters[name])], {})[what] = value
        self._gemini.load_param_states(states)

    def end(self) -> None:
        """Let go of the stage: its models are plain ones again, in host memory. After a failure they are gone."""
        if self._wrapped is None:
            super().end()
            return
        inside, step = self._wrapped.module, self._step
        assert step is not None
        # What failed in one process may be waited for in another for good.
        whole = {} if self._broken else dict(self._masters())
        # Its destructor looks for hooks on all of its parameters.
        self._wrapped.remove_hooks()
        self._wrapped.module = nn.Identity()
        step.release()
        made: dict[int, nn.Parameter] = {}
        for module in inside.modules():
            for name, old in list(module.named_parameters(recurse=False)):
                if id(old) not in made:
                    value = whole[id(old)] if id(old) in whole else self._before.get(old, torch.empty(0)).cpu()
                    made[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
                module.register_parameter(name, made[id(old)])
        step.to("cpu")
        self._wrapped = self._gemini = self._booster = self._scale = None
        self._before = {}
        super().end()

    @contextmanager
    def _together(self, batches: Sequence[Batch] = ()) -> Iterator[None]:
        """What all processes do at the same time. Turns a lost process or too little memory into a RunError."""
        try:
            yield
        except Exception as error:
            self._broken = True
            if isinstance(error, RuntimeError) and (
                isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)
            ):
                hint = "what it said is above or below; go on with `--resume`"
                raise RunError(
                    CANNOT_RUN, "another process of this run has ended, or cannot be reached", hint
                ) from error
            if batches and out_of_memory(error):
                assert self._step is not None
                raise RunError(OUT_OF_MEMORY, *self._words(self._step, batches, error)) from error
            raise

    def _reached(self, step: StepModule, batch: Batch, clock: Clock, denominators: Mapping[str, int]) -> StepOutput:
        """The losses; a parameter that they do not hang on gets a gradient of 0, since a chunk waits for all of its."""
        out = self._forward(step, batch, clock, denominators)
        reached = _leaves(out.loss)
        for _, parameter in self._named:
            if id(parameter) not in reached:
                out.loss = out.loss + 0.0 * plain(parameter.reshape(-1)[0]).float()
        return out

    def _chunks(self) -> Iterator[tuple[nn.Parameter, Tensor, Any, Any]]:
        """Each trained parameter, its fp32 master, and the chunks of both."""
        manager = self._wrapped.chunk_manager
        for parameter, master in zip(self._wrapped.fp16_params, self._wrapped.fp32_params, strict=True):
            yield parameter, master, manager.get_chunk(parameter), manager.get_chunk(master)

    def _masters(self) -> Iterator[tuple[int, Tensor]]:
        """The id of each trained parameter with its whole fp32 master in host memory; every process must ask."""
        from colossalai.zero.gemini.utils import get_temp_total_chunk_on_cuda

        held: tuple[Any, Tensor] | None = None
        for parameter, master, _, chunk in self._chunks():
            if held is None or held[0] is not chunk:
                held = (chunk, get_temp_total_chunk_on_cuda(chunk, torch.float32))
            info = chunk.tensors_info[master]
            yield id(parameter), held[1][info.offset : info.end].view(parameter.shape).to("cpu", copy=True)

    @torch.no_grad()
    def _write(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Set masters, and after them the parameters in half precision."""
        changed: dict[int, Any] = {}
        for parameter, master, chunk, chunk32 in self._chunks():
            if parameter not in values:
                continue
            info, flat = chunk32.tensors_info[master], values[parameter].reshape(-1)
            first, last = (0, chunk32.chunk_size) if chunk32.is_gathered else (chunk32.shard_begin, chunk32.shard_end)
            start, stop = max(info.offset, first), min(info.end, last)
            if start < stop:
                chunk32.payload[start - first : stop - first].copy_(flat[start - info.offset : stop - info.offset])
            changed[id(chunk)] = chunk
        for chunk in changed.values():
            _follow(chunk)


def _follow(chunk: Any) -> None:
    """Round a chunk's parameters from its masters, which before the first step may be in host memory without them."""
    masters = chunk.paired_chunk
    if chunk.is_gathered or chunk.device_type == masters.device_type:
        chunk.optim_update()
        return
    chunk.payload.copy_(masters.payload)
    chunk.cpu_vis_flag = False  # What pinned memory holds of it is old.


def _resident(teachers: Any) -> Iterator[nn.Module]:
    """The models that are whole in memory behind a source of taps."""
    if isinstance(teachers, LiveTeachers):
        yield from teachers.models.values()
    for inner in (getattr(teachers, "inner", None), *getattr(teachers, "sources", {}).values()):
        if inner is not None:
            yield from _resident(inner)


def _leaves(loss: Tensor) -> set[int]:
    """The ids of the parameters that a loss has a gradient for."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting.extend(following for following, _ in node.next_functions)
    return found
