"""One step as one module: the forwards, the losses, their reduction and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_dsl import schedules
from gkd_dsl.graph.nodes import ProjectNode, ReplaceBlock, TrainTarget
from gkd_dsl.graph.plan import Apply, Counted, ForwardPlan, Fused, LossPlan, StagePlan
from gkd_dsl.models.lora import selected_modules
from gkd_dsl.runtime import rows
from gkd_dsl.runtime.errors import CANNOT_RUN, SHAPES, RunError
from gkd_dsl.runtime.fused import FusedLosses, FusedPart
from gkd_dsl.runtime.gradients import Gradients
from gkd_dsl.runtime.models.adapters import adapted, trainable, with_lora
from gkd_dsl.runtime.models.interventions import at_clock, edits
from gkd_dsl.runtime.models.load import part_parameters
from gkd_dsl.runtime.models.tapper import Tapper
from gkd_dsl.runtime.ops.reduce import count_positions, reduce_loss
from gkd_dsl.runtime.policy import Policies, Policy, make_policies
from gkd_dsl.runtime.program import Env, Program, ShapeCheck, batch_keys
from gkd_dsl.runtime.teachers.base import TeacherSource, run_taps
from gkd_dsl.runtime.teachers.live import LiveTeachers
from gkd_dsl.schedules import Clock
from gkd_dsl.types import Dim

Batch = Mapping[str, Tensor]
Denominators = Mapping[str, int]


@dataclass
class StepOutput:
    """What one micro-batch gives: its share of the objective, and of each loss.

    loss     the weighted sum, a scalar with its gradient
    values   each loss before its weight, a scalar with its gradient where it is not fused
    weights  the weight of each loss at this step
    watched  the losses that a counter or a policy reads, scalars without gradient
    """

    loss: Tensor
    values: dict[str, Tensor]
    weights: dict[str, float]
    watched: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.terms = {name: value.detach() for name, value in self.values.items()}


def make_projections(nodes: Iterable[ProjectNode], seed: int = 0) -> dict[str, nn.Linear]:
    """The projections of a plan by name, with their first weights: torch's default, the identity, or zeros."""
    made: dict[str, nn.Linear] = {}
    with torch.random.fork_rng(devices=[]):
        for node in nodes:
            torch.default_generator.manual_seed(seed + _stable(node.name))
            block = nn.Linear(node.in_features, node.out_features, bias=node.bias)
            if node.init == "identity":
                nn.init.eye_(block.weight)
            elif node.init == "zeros":
                nn.init.zeros_(block.weight)
            if node.init != "default" and block.bias is not None:
                nn.init.zeros_(block.bias)
            made[node.name] = block
    return made


def _stable(name: str) -> int:
    """A small number that depends on the name alone, so that a projection starts alike beside others."""
    total = 0
    for character in name:
        total = (total * 131 + ord(character)) % 2**31
    return total


class StepModule(nn.Module):
    """All of a stage's step inside one forward.

    Models that the stage trains and its projections are submodules; the others come from `teachers` and are not.
    While it lives, everything that the stage does not train has `requires_grad` False; `release` puts it back.
    """

    def __init__(
        self,
        plan: StagePlan,
        models: Mapping[str, PreTrainedModel],
        projections: Mapping[str, nn.Module] | None = None,
        teachers: TeacherSource | None = None,
        policies: Mapping[str, Policy] | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        device = next((parameter.device for model in models.values() for parameter in model.parameters()), None)
        made = policies if policies is not None else make_policies(plan.policies, device or torch.device("cpu"))
        self.policies = Policies(plan.policies, made)
        blocks = dict(projections) if projections is not None else dict(make_projections(plan.projections))
        self.trained = tuple(
            node.name
            for node in plan.models
            if any(target.kind == "model" and target.name == node.name for target in plan.stage.trains)
        )
        fixed = [node for node in plan.models if node.name not in self.trained]
        for node in plan.models:
            # Models that a caller has made are plain.
            if node.name in self.trained and node.info.build.lora is not None and not adapted(models[node.name]):
                with_lora(models[node.name], node.info, plan.stage.seed)
        # Names of a spec may be those of methods of a module ("train", "half"), or hold dots and slashes.
        self._models = nn.ModuleDict({f"model_{i}": models[name] for i, name in enumerate(self.trained)})
        self._blocks = nn.ModuleDict({f"block_{i}": blocks[node.name] for i, node in enumerate(plan.projections)})
        self.models: dict[str, PreTrainedModel] = {name: models[name] for name in self.trained}
        self.projections: dict[str, nn.Module] = {node.name: blocks[node.name] for node in plan.projections}
        self._tappers = {
            node.name: Tapper(models[node.name], node.info) for node in plan.models if node.name in self.trained
        }
        self.teachers: TeacherSource = teachers if teachers is not None else LiveTeachers(fixed, models)
        self._forwards = {forward.key: forward for forward in plan.forwards}
        by_key = {node.key: blocks[node.name] for node in plan.projections} | self.projections
        self._valid = Program(plan.valid_program, by_key, ())
        self.gradients = Gradients(plan)
        special = {"policy": self.policies.draw, "gradient": self.gradients.take}
        self._program = Program(plan.program, by_key, plan.forwards, special)
        self._counted = {counted.key: counted for counted in plan.counted}
        self._fused = FusedLosses(self._head, self._counted, getattr(self.teachers, "stored", ()))
        fused_plan = self._fused.plan(plan)
        self._fused_forwards = {forward.key: forward for forward in fused_plan.forwards}
        self._fused_program = self._program
        if fused_plan is not plan:
            self._fused_program = Program(fused_plan.program, by_key, fused_plan.forwards, special)
        self._read_again = {
            key
            for item in plan.program
            if isinstance(item, Apply) and item.op != "gradient"
            for _, key in item.inputs
            if key in self._counted
        }
        for change in (change for forward in plan.forwards for change in forward.changes):
            if isinstance(change, ReplaceBlock):
                self._lend(change.model, change.layers)
        self._unchecked = set(self._counted)
        self._frozen = self._freeze([models[node.name] for node in fixed if node.name in models])

    def forward(self, batch: Batch, clock: Clock, denominators: Denominators, *, fused: bool = True) -> StepOutput:
        """The losses of one micro-batch, each sum divided by its denominator over all micro-batches of the step.

        With `fused`, losses over a language model's logits are run with its head where the plan allows it; their
        `values` then have no gradient of their own, and the gradient of `loss` can be taken once.

        Raises RunError: a column is missing, or a tensor, when first computed, has another shape than planned.
        """
        env = self._environment(batch)
        monitored = self._monitored(clock)
        losses = (*self.plan.losses, *monitored)
        coefficients = {loss.name: [(part.value(clock), key) for part, key in loss.parts] for loss in losses}
        used = {key for parts in coefficients.values() for amount, key in parts if amount != 0.0}
        # Shapes are compared where a loss is first computed: what has no weight yet must draw no random numbers, or a
        # run that goes on in the middle would not be the one that was not ended.
        check = self._shape_check(batch) if self._unchecked & used else None
        sums: dict[str, Tensor] = {}
        self.gradients.sums = sums

        program = self._fused_program if fused else self._program
        forwards = self._fused_forwards if fused else self._forwards
        scales = [schedule.value(clock) for schedule in self.plan.weights]
        part = FusedPart(_amounts(self.plan.losses, scales, coefficients), denominators)

        def forward(key: str, env: Env) -> None:
            env.update(self._run(forwards[key], batch, env, clock, check))

        def run_fused(step: Fused, env: Env) -> None:
            self._fused.run(step, env, clock, part)

        self._valid.run(env, clock, forward)
        see = self._reducing(sums, env, denominators, check)
        program.run(env, clock, forward, wanted=self._wanted(used), see=see, fused=run_fused)
        values: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        total = self._zero(batch)
        sums |= part.sums
        for loss, scale in zip(self.plan.losses, scales, strict=True):
            value = self._sum(coefficients[loss.name], sums, batch)
            values[loss.name], weights[loss.name] = value, scale
            # What is fused is in the totals of its pass, with the gradient.
            rest = [(amount, key) for amount, key in coefficients[loss.name] if key not in part.sums]
            total = total + scale * (self._sum(rest, sums, batch) if part.sums else value)
        for fused_total in part.totals:
            total = total + fused_total
        self._unchecked -= used
        self.gradients.sums = {}
        watched = {loss.name: self._sum(coefficients[loss.name], sums, batch).detach() for loss in monitored}
        return StepOutput(total, values, weights, watched)

    def count(self, batch: Batch, clock: Clock) -> dict[str, int]:
        """How many positions of each loss count in a micro-batch. Reads batch columns only."""
        env = self._environment(batch)
        self._valid.run(env, clock, _no_forward)
        size, length = _sizes(batch)
        return {
            counted.key: int(
                count_positions(
                    counted.dims,
                    {counted.dims[axis].name: 1 for axis in _unknown(counted.dims)},
                    env[counted.valid] if counted.valid else None,
                    size,
                    length,
                    counted.causal,
                )
            )
            for counted in self.plan.counted
        }

    def denominators(self, batches: Sequence[Batch], clock: Clock) -> dict[str, int]:
        """The counts over all micro-batches of a step."""
        totals = dict.fromkeys(self._counted, 0)
        for number, batch in enumerate(batches):
            # A mask may be drawn, in each micro-batch anew.
            for key, count in self.count(batch, replace(clock, micro=clock.micro + number)).items():
                totals[key] += count
        return totals

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """What the stage trains: names such as `s/encoder.layer.0.output.dense.weight` and `project/W/weight`."""
        return [(name, parameter) for name, parameter, _ in self._targets()]

    def train(self, mode: bool = True) -> StepModule:
        """Put the trained models in train mode (dropout) or eval mode; teachers are always in eval mode."""
        super().train(mode)
        return self

    def release(self) -> None:
        """Give every parameter the `requires_grad` that it had before."""
        for parameter, before in self._frozen:
            parameter.requires_grad_(before)
        self._frozen = []

    def _targets(self) -> list[tuple[str, nn.Parameter, TrainTarget]]:
        nodes = {node.name: node for node in self.plan.models}
        found: dict[int, tuple[str, nn.Parameter, TrainTarget]] = {}
        for target in self.plan.stage.trains:
            if target.kind == "project":
                if target.name not in self.projections:
                    continue
                prefix, named = f"project/{target.name}", list(self.projections[target.name].named_parameters())
            else:
                if target.name not in self.models:
                    continue
                prefix, model = target.name, self.models[target.name]
                if target.part is None:
                    named = list(model.named_parameters())
                elif target.part == "head" and nodes[target.name].info.task == "encoder":
                    continue
                else:
                    named = part_parameters(model, selected_modules(nodes[target.name].info, target.part))
                named = trainable(model, named)
            for name, parameter in named:
                found.setdefault(id(parameter), (f"{prefix}/{name}", parameter, target))
        return list(found.values())

    def _freeze(self, fixed: Sequence[nn.Module]) -> list[tuple[nn.Parameter, bool]]:
        trains = {id(parameter) for _, parameter, _ in self._targets()}
        if not trains:
            raise RunError(CANNOT_RUN, f"stage `{self.plan.name}` has no parameter to train")
        before: list[tuple[nn.Parameter, bool]] = []
        seen: set[int] = set()
        for module in (self, *fixed):
            for parameter in module.parameters():
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                before.append((parameter, parameter.requires_grad))
                parameter.requires_grad_(id(parameter) in trains)
        return before

    def _environment(self, batch: Batch) -> Env:
        missing = [column for column in self.plan.columns if column not in batch]
        if missing:
            raise RunError(
                SHAPES,
                f"stage `{self.plan.name}` reads `batch.{missing[0]}`, and the batch has none",
                f"it has {', '.join(sorted(batch))}",
            )
        return batch_keys(batch)

    def _run(
        self, plan: ForwardPlan, batch: Batch, env: Env, clock: Clock, check: ShapeCheck | None
    ) -> dict[str, Tensor]:
        forward = at_clock(plan, clock)
        taps = self._taps(forward, batch, env)
        if check is not None:
            for tap in forward.taps:
                check(tap.key, tap.type, taps[tap.key])
        return taps

    def _taps(self, forward: ForwardPlan, inputs: Batch, env: Env) -> dict[str, Tensor]:
        changes = edits(forward, env, self._lend, self.gradients.leaves.get(forward.key, ()))
        if forward.model not in self.models:
            return self.teachers.taps(forward, inputs, env, changes)
        return run_taps(self._tappers[forward.model], forward, inputs, env, changes)

    def _lend(self, model: str, layers: Sequence[int]) -> Sequence[nn.Module]:
        """Blocks of a model, to run in another's place."""
        if model in self.models:
            return self._tappers[model].blocks(layers)
        return self.teachers.blocks(model, layers)

    def _head(self, model: str, module: str) -> nn.Module | None:
        """A module of a model by its name, where the model is in memory."""
        if model in self.models:
            return dict(self.models[model].named_modules()).get(module)
        find = getattr(self.teachers, "head", None)
        return find(model, module) if find is not None else None

    def _monitored(self, clock: Clock) -> tuple[LossPlan, ...]:
        """The losses that policies and counters read at this step: of a counter's family, the present member alone."""
        read = {policy.reward for policy in self.plan.policies}
        for counter in self.plan.counters:
            if schedules.counted(clock, counter.name, counter.start) < counter.stop:
                read |= schedules.watched(counter.when, clock)
        return tuple(loss for loss in self.plan.monitored if loss.name in read)

    def _wanted(self, used: Collection[str]) -> set[str]:
        # A policy chooses at every step, so that what is pending never hangs on a weight of the moment.
        wanted = set(used) | self.policies.keys
        for key in used:
            counted = self._counted[key]
            wanted |= {name for name in (counted.valid, counted.token_weight, counted.sample_weight) if name}
        return wanted

    def _reducing(self, sums: dict[str, Tensor], env: Env, denominators: Denominators, check: ShapeCheck | None) -> Any:
        """What is done with each result: compare its shape, and reduce a loss at once, before its inputs are freed."""

        share = rows.current()
        idle = share is not None and share.idle

        def see(key: str, type: Any, value: Tensor) -> None:
            if check is not None:
                check(key, type, value)
            counted = self._counted.get(key)
            if counted is not None:
                sums[key] = _share(counted, value, env, denominators[key])
                if idle:
                    sums[key] = sums[key] * 0.0
                if key not in self._read_again:
                    del env[key]

        return see

    def _shape_check(self, batch: Batch) -> ShapeCheck:
        names = {tap.key: f"{forward.model}.{tap.path}" for forward in self.plan.forwards for tap in forward.taps}
        return ShapeCheck(*_sizes(batch), names)

    def _sum(self, parts: Iterable[tuple[float, str]], sums: Mapping[str, Tensor], batch: Batch) -> Tensor:
        value = self._zero(batch)
        for amount, key in parts:
            if amount != 0.0:
                value = value + amount * sums[key]
        return value

    def _zero(self, batch: Batch) -> Tensor:
        return torch.zeros((), device=next(iter(batch.values())).device)


def _amounts(
    losses: Iterable[LossPlan], scales: Iterable[float], coefficients: Mapping[str, list[tuple[float, str]]]
) -> dict[str, float]:
    """What multiplies each reduced loss in the objective, by its key."""
    found: dict[str, float] = {}
    for loss, scale in zip(losses, scales, strict=True):
        for amount, key in coefficients[loss.name]:
            found[key] = found.get(key, 0.0) + scale * amount
    return found


def _no_forward(key: str, env: Env) -> None:
    raise AssertionError(f"the valid program runs {key}")


def _share(counted: Counted, values: Tensor, env: Env, denominator: int) -> Tensor:
    total, _ = reduce_loss(
        values,
        counted.dims,
        env[counted.valid] if counted.valid else None,
        causal=counted.causal,
        token_weight=env[counted.token_weight] if counted.token_weight else None,
        sample_weight=env[counted.sample_weight] if counted.sample_weight else None,
    )
    # An axis whose size no config says is counted as 1 beforehand.
    missed = math.prod(values.shape[axis] for axis in _unknown(counted.dims))
    # Where nothing counts the sum is 0, and so is the loss.
    return total / max(1, denominator * missed)


def _unknown(dims: Sequence[Dim]) -> list[int]:
    """The axes whose size only the values show."""
    return [axis for axis, dim in enumerate(dims) if dim.size is None and dim.name not in ("B", "L")]


def _sizes(batch: Batch) -> tuple[int, int | None]:
    """B and L of a batch."""
    ids = batch.get("input_ids", batch.get("attention_mask"))
    if ids is not None:
        return ids.shape[0], ids.shape[1]
    first = next(iter(batch.values()))
    return first.shape[0], first.shape[1] if first.ndim > 1 else None
