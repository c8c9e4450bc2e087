"""What to say when memory runs out: what was alive, what the plan had said, and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gkd_dsl.graph.plan import SpecPlan
from gkd_dsl.planning.estimate import estimate_stage
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import Machine, this_machine
from gkd_dsl.planning.report import block
from gkd_dsl.planning.search import cheapest
from gkd_dsl.planning.units import in_bytes
from gkd_dsl.runtime.backends.base import Settings
from gkd_dsl.runtime.step import Batch, StepModule

_PLACES = {"StreamedTeachers": "offload", "CachedTeachers": "cached"}


def memory_words(
    step: StepModule,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    device: torch.device,
    settings: Settings,
    backend: str = "local",
) -> tuple[str, str]:
    """A message and a hint about a step that found too little memory; gradients must still be there."""
    ids = [batch["input_ids"] for batch in batches if "input_ids" in batch]
    rows, length = (max((x.shape[axis] for x in ids), default=1) for axis in (0, 1))
    where = "the GPU" if device.type == "cuda" else "this machine"
    message = f"{where} has too little memory for a micro-batch of {rows} texts of {length} tokens"
    hints = [f"alive were {_listed(alive(step, optimizer))}"]
    if device.type == "cuda":
        hints.append(f"the most that was allocated is {in_bytes(torch.cuda.max_memory_allocated(device))}")
    try:
        hints += _planned(step, rows, length, device, settings, backend)
    except Exception:  # a plan that cannot be made must not hide what happened
        hints.append(_try(rows, settings))
    return message, "; ".join(hints)


def alive(step: StepModule, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the weights, the gradients and the state of the optimiser; those of activations are let go by then."""
    parameters = {id(p): p for module in _modules(step) for p in module.parameters()}
    state = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
    return {
        "weights": _bytes(parameters.values()),
        "gradients": _bytes(p.grad for p in parameters.values() if p.grad is not None),
        "optimiser": _bytes(state),
    }


def _modules(step: StepModule) -> list[nn.Module]:
    fixed: Mapping[str, nn.Module] = getattr(step.teachers, "models", {})
    return [step, *fixed.values()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {in_bytes(count)}" for name, count in parts.items())


def _planned(
    step: StepModule, rows: int, length: int, device: torch.device, settings: Settings, backend: str
) -> list[str]:
    """What the plan says of this micro-batch, and the cheapest change that fits by it."""
    machine = _machine(device)
    stage = replace(step.plan, stage=replace(step.plan.stage, max_length=length))
    sources = getattr(step.teachers, "sources", {})
    placed = {name: _PLACES.get(type(source).__name__, "resident") for name, source in sources.items()}
    setup = Setup(backend, settings.precision == "bf16", settings.checkpoint, step.plan.fuse_logits != "off")
    for name, place in placed.items():
        setup = setup.placing([name], place)
    found = estimate_stage(stage, machine, setup, rows=rows, length=length)
    said = f"the plan is {in_bytes(found.device_bytes)} in {found.moment}: {_listed(dict(found.device))}"
    if found.fits(machine):
        # What other programs hold, or what the plan does not know of.
        return [f"{said}, and would fit {in_bytes(machine.device_memory)}", _try(rows, settings)]
    plan = SpecPlan((stage,), "local", ())
    proposal = cheapest(plan, machine, setup)
    if proposal is None:
        return [said, _try(rows, settings)]
    change = " ".join(block(plan, setup, proposal.setup).replace("\n", " ").split())
    return [said, f"this fits: {change}"]


def _machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        here = this_machine()
        return replace(here, devices=1, device_memory=here.host_memory, kind="cpu")
    return Machine(1, torch.cuda.get_device_properties(device).total_memory, this_machine().host_memory)


def _try(rows: int, settings: Settings) -> str:
    """What usually helps."""
    options = [f"lower `batch_size` to {max(1, rows // 2)} and double `accumulate` (the losses stay the same)"]
    options.append("lower `max_length`")
    if not settings.checkpoint:
        options.append("set `checkpoint = true` in `runtime`")
    if settings.precision == "fp32":
        options.append("set `precision = bf16`")
    return ", or ".join(options)
