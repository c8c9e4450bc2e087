"""What of a model's outputs a stage reads, and whether it can be stored instead of computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gkd_dsl.graph.nodes import ReplaceBlock
from gkd_dsl.graph.plan import Apply, ForwardPlan, Instruction, StagePlan
from gkd_dsl.models.info import Task
from gkd_dsl.models.taps import TapPath
from gkd_dsl.schedules import Constant
from gkd_dsl.types import TensorType

WHOLE_UP_TO = 1024
"""Up to so many classes, logits are stored whole unless `top_k` says otherwise."""
DEFAULT_TOP_K = 64

OVER_TOP_K = ("kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy")
"""The operators that can do with the k largest of a teacher's logits."""
NEEDS_TAIL = ("reverse_kl", "jsd")
"""Those that are not finite where the teacher has no mass outside of its k largest."""


def kept(classes: int | None, asked: int | None) -> int | None:
    """How many logits of a row are stored: None for all. `asked` is `top_k` (0: all; None: by the classes)."""
    if classes is None or asked == 0 or (asked is None and classes <= WHOLE_UP_TO):
        return None
    count = DEFAULT_TOP_K if asked is None else asked
    return count if count < classes else None


def forwards_of(plan: StagePlan, model: str) -> list[ForwardPlan]:
    """All forwards of a model in a stage, those of its metrics included."""
    found = [*plan.forwards, *(forward for item in plan.metrics for forward in item.forwards)]
    return [forward for forward in found if forward.model == model]


def taps_of(plan: StagePlan, model: str) -> dict[TapPath, TensorType]:
    """The tensors of a model that a stage reads, in their order."""
    return {tap.path: tap.type for forward in forwards_of(plan, model) for tap in forward.taps}


def temperatures(plan: StagePlan, model: str) -> tuple[float, ...]:
    """1 and the constant temperatures at which a stage reads a model's logits."""
    keys = {tap.key for forward in forwards_of(plan, model) for tap in forward.taps if tap.path.kind == "logits"}
    found = {1.0}
    for step in _readers(plan.program, keys):
        value = dict(step.attrs).get("temperature", 1.0)
        value = value.amount if isinstance(value, Constant) else value
        if step.op in OVER_TOP_K and isinstance(value, int | float):
            found.add(float(value))
    return tuple(sorted(found))


def refusals(
    plans: Sequence[StagePlan], model: str, *, tasks: Sequence[str], top_k: int | None = None, tail: str = "bucket"
) -> Iterator[str]:
    """Why the outputs of a model cannot be stored: what a stage does with it. `tasks` are those of the stages' rows."""
    for plan, task in zip(plans, tasks, strict=True):
        where = f"stage `{plan.name}`"
        if any(target.kind == "model" and target.name == model for target in plan.stage.trains):
            yield f"{where} trains `{model}`"
            continue
        for forward in (*plan.forwards, *(forward for item in plan.metrics for forward in item.forwards)):
            if any(isinstance(change, ReplaceBlock) and change.model == model for change in forward.changes):
                yield f"{where} runs blocks of `{model}` inside `{forward.model}`"
        own = forwards_of(plan, model)
        if not own:
            continue
        if task == "masked_lm":
            yield f"{where} masks its texts anew in each epoch"
        for forward in own:
            if forward.changes:
                yield f"{where} changes a forward of `{model}` from inside"
            elif forward.inputs:
                yield f"{where} runs `{model}` on more than its texts"
            elif forward.grad:
                yield f"{where} takes a gradient through `{model}`"
        yield from _not_over_top_k(plan, model, top_k, tail)


def _not_over_top_k(plan: StagePlan, model: str, top_k: int | None, tail: str) -> Iterator[str]:
    keys = sparse_keys(plan, model, top_k)
    if not keys:
        return
    for step in _readers(plan.program, keys):
        slots = [slot for slot, key in step.inputs if key in _aliases(plan.program, keys)]
        if step.op not in OVER_TOP_K or slots != ["teacher"] or dict(step.attrs).get("align", "exact") != "exact":
            yield f"`{step.op}` reads all logits of `{model}`, and of these the {min(keys.values())} largest are stored"
        elif tail == "renormalise" and step.op in NEEDS_TAIL:
            yield f"`{step.op}` is not finite with `tail = renormalise`"
    for item in plan.metrics:
        read = {key for _, key in item.inputs} | {
            key for step in item.program if isinstance(step, Apply) for _, key in step.inputs
        }
        if read & keys.keys():
            yield f"the metric `{item.metric.name}` reads all logits of `{model}`"


def sparse_keys(plan: StagePlan, model: str, top_k: int | None) -> dict[str, int]:
    """The keys of a model's logits that are stored as their k largest, with k."""
    found: dict[str, int] = {}
    for forward in forwards_of(plan, model):
        for tap in forward.taps:
            count = kept(tap.type.dims[-1].size, top_k) if tap.path.kind == "logits" else None
            if count is not None:
                found[tap.key] = count
    return found


def _aliases(program: Sequence[Instruction], keys: dict[str, int] | set[str]) -> set[str]:
    """These keys, and those of the same tensors detached."""
    found = set(keys)
    for step in program:
        if isinstance(step, Apply) and step.op == "detach" and any(key in found for _, key in step.inputs):
            found.add(step.key)
    return found


def _readers(program: Sequence[Instruction], keys: dict[str, int] | set[str]) -> list[Apply]:
    """What reads these tensors, themselves or detached."""
    same = _aliases(program, keys)
    return [
        step
        for step in program
        if isinstance(step, Apply) and step.op != "detach" and any(key in same for _, key in step.inputs)
    ]


def student_task(plan: StagePlan) -> Task:
    """The head of the model whose tokenizer reads the stage's source: the first that the stage trains."""
    trained = [target.name for target in plan.stage.trains if target.kind == "model"]
    nodes = {node.name: node for node in plan.models}
    name = next((name for name in trained if name in nodes), next(iter(nodes)))
    return nodes[name].info.task
