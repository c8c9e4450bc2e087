"""What to say when memory runs out: what was alive, what the plan had said, and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gkd_dsl.graph.plan import SpecPlan, StagePlan
from gkd_dsl.planning.estimate import estimate_stage
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import Machine, this_machine
from gkd_dsl.planning.report import block
from gkd_dsl.planning.search import cheapest
from gkd_dsl.planning.units import in_bytes
from gkd_dsl.runtime.backends.base import Settings
from gkd_dsl.runtime.step import Batch, StepModule


def memory_words(
    step: StepModule,
    live: Mapping[str, int],
    batches: Sequence[Batch],
    device: torch.device,
    settings: Settings,
    *,
    backend: str = "local",
    processes: int = 1,
    error: BaseException | None = None,
) -> tuple[str, str]:
    """A message and a hint about a step that found too little memory; `live` is what was alive, by part."""
    ids = [batch["input_ids"] for batch in batches if "input_ids" in batch]
    rows, length = (max((x.shape[axis] for x in ids), default=1) for axis in (0, 1))
    message = f"{_where(error, device)} has too little memory for a micro-batch of {rows} texts of {length} tokens"
    stage = replace(step.plan, stage=replace(step.plan.stage, max_length=length))
    plan = SpecPlan((stage,), backend, (*settings.runtime, ("backend", backend)))  # type: ignore[arg-type]
    return message, _hint(plan, stage, live, device, settings, processes, rows=rows)


def run_words(
    doing: str,
    plan: SpecPlan,
    stage: StagePlan | None,
    live: Mapping[str, int],
    device: torch.device,
    settings: Settings,
    *,
    processes: int = 1,
    error: BaseException | None = None,
) -> tuple[str, str]:
    """A message and a hint about anything else in a run: loading, evaluating, saving. Without a stage the largest."""
    return f"{_where(error, device)} has too little memory to {doing}", _hint(
        replace(plan, runtime=(*plan.runtime, ("backend", plan.backend))), stage, live, device, settings, processes
    )


def alive(step: StepModule, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Bytes of the weights, the gradients and the state of the optimiser; those of activations are let go by then."""
    parameters = {id(p): p for module in _modules(step) for p in module.parameters()}
    kept = optimizer.state.values() if optimizer is not None else ()
    state = [value for found in kept for value in found.values() if isinstance(value, Tensor)]
    return {
        "weights": _bytes(parameters.values()),
        "gradients": _bytes(p.grad for p in parameters.values() if p.grad is not None),
        "optimiser": _bytes(state),
    }


def of_models(models: Mapping[str, nn.Module]) -> dict[str, int]:
    """Bytes of the weights of models, by name."""
    return {name: _bytes(model.parameters()) for name, model in models.items()}


def _where(error: BaseException | None, device: torch.device) -> str:
    if device.type != "cuda":
        return "this machine"
    return "the GPU" if error is None or isinstance(error, torch.OutOfMemoryError) else "the host"


def _modules(step: StepModule) -> list[nn.Module]:
    return [step, *_fixed(step.teachers)]


def _fixed(source: object) -> list[nn.Module]:
    """The models behind a source of taps."""
    found: list[nn.Module] = []
    held = getattr(source, "models", {})
    found += held.values() if isinstance(held, Mapping) else []
    if isinstance(model := getattr(source, "model", None), nn.Module):
        found.append(model)
    for inner in (getattr(source, "inner", None), *getattr(source, "sources", {}).values()):
        found += _fixed(inner) if inner is not None else []
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {in_bytes(count)}" for name, count in parts.items()) or "nothing"


def _hint(
    plan: SpecPlan,
    stage: StagePlan | None,
    live: Mapping[str, int],
    device: torch.device,
    settings: Settings,
    processes: int,
    rows: int | None = None,
) -> str:
    hints = [f"alive were {_listed(live)}"]
    if device.type == "cuda":
        hints.append(f"the most that was allocated is {in_bytes(torch.cuda.max_memory_allocated(device))}")
    size = rows if rows is not None else max((one.stage.batch_size for one in plan.stages), default=1)
    try:
        hints += _planned(plan, stage, device, settings, processes, rows, size)
    except Exception:  # a plan that cannot be made must not hide what happened
        hints.append(_try(size, settings))
    return "; ".join(hints)


def _planned(
    plan: SpecPlan,
    stage: StagePlan | None,
    device: torch.device,
    settings: Settings,
    processes: int,
    rows: int | None,
    size: int,
) -> list[str]:
    """What the plan says of this stage and micro-batch, and the cheapest change that fits by it."""
    machine, setup = _machine(device, processes), Setup.of(plan)
    setup = replace(setup, half=setup.half or settings.precision != "fp32")
    own = None if rows is None else -(-rows // setup.ranks(machine))
    found = max(
        (estimate_stage(one, machine, setup, rows=own) for one in ([stage] if stage is not None else plan.stages)),
        key=lambda one: one.device_bytes,
    )
    said = f"the plan is {in_bytes(found.device_bytes)} in {found.moment}: {_listed(dict(found.device))}"
    if found.host:
        said += f", and in the host {_listed(dict(found.host))}"
    if found.fits(machine):
        # What other programs hold, or what the plan does not know of.
        return [f"{said}, and would fit {in_bytes(machine.device_memory)}", _try(size, settings)]
    proposal = cheapest(plan, machine, setup)
    if proposal is None:
        return [said, _try(size, settings)]
    change = " ".join(block(plan, setup, proposal.setup).replace("\n", " ").split())
    return [said, f"this fits: {change}"]


def _machine(device: torch.device, processes: int) -> Machine:
    here = this_machine()
    if device.type != "cuda":
        return replace(here, devices=processes, device_memory=here.host_memory, kind="cpu")
    return Machine(processes, torch.cuda.get_device_properties(device).total_memory, here.host_memory)


def _try(rows: int, settings: Settings) -> str:
    """What usually helps."""
    options = [f"lower `batch_size` to {max(1, rows // 2)} and double `accumulate` (the losses stay the same)"]
    options.append("lower `max_length`")
    if not settings.checkpoint:
        options.append("set `checkpoint = true` in `runtime`")
    if settings.precision == "fp32":
        options.append("set `precision = bf16`")
    return ", or ".join(options)
