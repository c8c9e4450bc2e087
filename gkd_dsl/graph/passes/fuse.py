"""Fuse: losses over the logits of language models whose logits are then never made.

Losses that read the same logits share one pass over the vocabulary, in which the head is applied too, the student's
and, where nothing else reads them, the teachers'. A plan stays right without: `fuse` makes of it one that is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gkd_dsl.graph.nodes import ReplaceBlock
from gkd_dsl.graph.passes import liveness
from gkd_dsl.graph.passes.sparse import TOP_K
from gkd_dsl.graph.plan import Apply, ForwardPlan, Free, Fused, HeadPlan, Instruction, Run, StagePlan, TapPlan
from gkd_dsl.graph.stored import OVER_TOP_K
from gkd_dsl.models.heads import linear_head
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.resolve import part_modules
from gkd_dsl.models.taps import TapPath
from gkd_dsl.types import BATCH, LENGTH, Dim, LossType, TensorType

_OVER_LOGITS = ("cross_entropy", *OVER_TOP_K, *(TOP_K + op for op in OVER_TOP_K))

There = Callable[[HeadPlan], bool]
"""Whether the head of a model is at hand and a plain linear map; what a plan cannot know."""


def logit_groups(program: tuple[Instruction, ...]) -> tuple[tuple[str, ...], ...]:
    """Groups of two losses or more over the same student logits, by their keys."""
    groups: dict[str, list[str]] = {}
    for step in program:
        if isinstance(step, Apply) and step.op in _OVER_LOGITS:
            groups.setdefault(dict(step.inputs)["student"], []).append(step.key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)


def fuse(plan: StagePlan, there: There = lambda head: True) -> StagePlan:
    """The plan with `Fused` in the place of losses that can be fused; the same plan where there are none."""
    found = fusions(plan, there)
    if not found:
        return plan
    heads = {head.logits: head for group in found for head in (group.student, *group.teachers)}
    names = {name for head in heads.values() for name in head.names}
    forwards = tuple(_without_logits(forward, heads) for forward in plan.forwards)
    last = {group.terms[-1].key: group for group in found}
    gone = names | {term.key for group in found for term in group.terms}
    steps: list[Instruction] = []
    freed = any(isinstance(step, Free) for step in plan.program)
    for step in plan.program:
        if isinstance(step, Apply) and step.key in last:
            steps.append(last[step.key])
        elif not (isinstance(step, Free) or (isinstance(step, Apply) and step.key in gone)):
            steps.append(step)
    keep = {entry.key for entry in plan.counted}
    program = liveness.with_frees(steps, keep, forwards) if freed else tuple(steps)
    return replace(plan, forwards=forwards, program=program)


def fusions(plan: StagePlan, there: There = lambda head: True) -> tuple[Fused, ...]:
    """The groups of losses of a plan that can be fused, one for each student's logits, in the order of the program."""
    if plan.fuse_logits == "off":
        return ()
    return _Search(plan, there).groups()


def refusals(plan: StagePlan) -> dict[str, str]:
    """Why losses over the logits of language models are not fused, by their keys."""
    return _Search(plan, lambda head: True).reasons()


@dataclass
class _Search:
    """Heads and losses that fit each other: whoever is left out takes along what needs it."""

    plan: StagePlan
    there: There

    def __post_init__(self) -> None:
        self.steps = [step for step in self.plan.program if not isinstance(step, Free)]
        applied = [step for step in self.steps if isinstance(step, Apply)]
        self.counted = {entry.key: entry for entry in self.plan.counted}
        self.flows = _flows(self.plan)
        self.read = {key for step in applied for _, key in step.inputs}
        self.infos = {node.name: node.info for node in self.plan.models}
        self.heads: dict[str, HeadPlan] = {}
        self.why: dict[str, str] = {}
        self.tapped: dict[str, str] = {}
        for forward in self.plan.forwards:
            for tap in forward.taps:
                if tap.path.kind == "logits" and self.infos[forward.model].task in ("causal_lm", "masked_lm"):
                    self._head(forward, tap, applied)
        by_name = {name: head for head in self.heads.values() for name in head.names}
        self.losses = {step.key: step for step in applied if step.op in _OVER_LOGITS and _per_token(step)}
        self.kept = {key: step for key, step in self.losses.items() if not self._refused(step, by_name)}
        self._settle(applied)

    def _head(self, forward: ForwardPlan, tap: TapPlan, applied: Sequence[Apply]) -> None:
        names = [tap.key]
        for step in applied:
            if step.op == "detach" and dict(step.inputs).get("x") in names:
                names.append(step.key)
        self.tapped |= dict.fromkeys(names, tap.key)
        info = self.infos[forward.model]
        found = linear_head(info)
        if found is None:
            self.why[tap.key] = f"the head of `{forward.model}` ({info.architecture}) is not known as a linear map"
            return
        if reason := _inside(forward, info):
            self.why[tap.key] = f"{reason} the logits of `{forward.model}`"
            return
        path = TapPath("module", part="in", name=found.module)
        width = info.size("H")
        hidden = TapPlan(
            f"{tap.key}:{path.key}", path, TensorType("float", (BATCH, LENGTH, Dim(f"{forward.model}.H", width)))
        )
        head = HeadPlan(
            forward.key, forward.model, found.module, tap.key, tuple(names), hidden, found.scale, found.divide,
            found.softcap,
        )  # fmt: skip
        if self.there(head):
            self.heads[tap.key] = head
        else:
            self.why[tap.key] = f"the head of `{forward.model}` is not at hand"

    def _refused(self, step: Apply, by_name: Mapping[str, HeadPlan]) -> bool:
        slots = dict(step.inputs)
        student, teacher = slots["student"], slots.get("teacher")
        others = [key for slot, key in step.inputs if slot not in ("student", "teacher")]
        why = ""
        if step.key not in self.counted or step.key in self.read:
            why = "its values are read, not only their mean"
        elif student not in self.tapped:
            why = "what it compares is no tap of logits"
        elif student not in self.heads:
            why = self.why.get(self.tapped[student], "the student's logits are detached")
        elif teacher in self.flows:
            why = "its gradient goes into the teacher too"
        elif teacher is not None and teacher in by_name and by_name[teacher].logits == student:
            why = "it compares logits with themselves"
        elif any(key in self.flows for key in others):
            why = "its weights have a gradient"
        self.why[step.key] = why
        return bool(why)

    def _settle(self, applied: Sequence[Apply]) -> None:
        """Leave out heads whose logits something else reads, then losses whose student is left out, until all fit."""
        while True:
            dropped = {key: reader for key, head in self.heads.items() if (reader := self._reader(head, applied))}
            for key, reader in dropped.items():
                del self.heads[key]
                self.why[key] = f"{reader} reads the same logits"
            lost = [key for key, step in self.kept.items() if dict(step.inputs)["student"] not in self.heads]
            for key in lost:
                self.why[key] = self.why[dict(self.kept.pop(key).inputs)["student"]]
            if not dropped and not lost:
                return

    def _reader(self, head: HeadPlan, applied: Sequence[Apply]) -> str:
        """What reads the logits of a head and is no fused loss."""
        names = set(head.names)
        for step in self.steps:
            if isinstance(step, Run):
                if names & set(self.plan.forward(step.forward).reads):
                    return f"the forward `{step.forward}`"
            elif isinstance(step, Apply) and step.key not in names and names & {key for _, key in step.inputs}:
                slots = {slot for slot, key in step.inputs if key in names}
                if step.key not in self.kept or not slots <= {"student", "teacher"}:
                    return f"`{step.op}`"
        return ""

    def groups(self) -> tuple[Fused, ...]:
        by_student: dict[str, list[Apply]] = {}
        for step in self.kept.values():
            by_student.setdefault(dict(step.inputs)["student"], []).append(step)
        by_name = {name: head for head in self.heads.values() for name in head.names}
        found = []
        for student, terms in by_student.items():
            teachers = [by_name[key] for term in terms if (key := dict(term.inputs).get("teacher", "")) in by_name]
            found.append(Fused(self.heads[student], tuple(dict.fromkeys(teachers)), tuple(terms)))
        return tuple(found)

    def reasons(self) -> dict[str, str]:
        over = {key for key, step in self.losses.items() if dict(step.inputs)["student"] in self.tapped}
        return {key: self.why[key] for key in self.losses if key in over and key not in self.kept}


def _per_token(step: Apply) -> bool:
    return isinstance(step.type, LossType) and tuple(dim.name for dim in step.type.dims) == ("B", "L")


def _inside(forward: ForwardPlan, info: ModelInfo) -> str:
    """What else happens in or to the head of a forward."""
    if any(
        not isinstance(change, ReplaceBlock) and change.path.kind in ("logits", "module") for change in forward.changes
    ):
        return "the pass changes"
    if info.family is None:
        known: Iterable[str] = ("lm_head",)
    else:
        known = part_modules(info, "head")
    for tap in forward.taps:
        name = tap.path.name or ""
        if tap.path.kind == "module" and any(name == part or name.startswith(f"{part}.") for part in known):
            return f"`{tap.path}` is read beside"
    return ""


def _flows(plan: StagePlan) -> set[str]:
    """The keys of the environment through which a gradient goes."""
    found = {tap.key for forward in plan.forwards if forward.grad for tap in forward.taps}
    for step in plan.program:
        if not isinstance(step, Apply) or step.op in ("detach", "gradient"):
            continue
        if step.op in ("project", "policy") or any(key in found for _, key in step.inputs):
            found.add(step.key)
    return found


def _without_logits(forward: ForwardPlan, heads: Mapping[str, HeadPlan]) -> ForwardPlan:
    """The forward up to the head, in the place of the logits what the head is given."""
    taps = tuple(heads[tap.key].hidden if tap.key in heads else tap for tap in forward.taps)
    if taps == forward.taps:
        return forward
    stop = next(tap.path for old, tap in zip(forward.taps, taps, strict=True) if old is not tap)
    return replace(forward, taps=taps, stop_after=stop)
