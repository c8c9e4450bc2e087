"""What a stage trains."""

from __future__ import annotations

from dataclasses import dataclass

from gkd_dsl import schedules
from gkd_dsl.graph.nodes import TrainTarget
from gkd_dsl.meaning import adapters, paths
from gkd_dsl.meaning.context import Context
from gkd_dsl.meaning.scope import Scope
from gkd_dsl.meaning.values import Block, Family, Items, Layers, Loss, Model, TapPart, Unknown, Value, kind
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.resolve import has_rest, part_modules
from gkd_dsl.syntax import ast

PARTS = ("body", "embed", "head")


@dataclass(frozen=True)
class Training:
    """The targets; `said` where the stage lists them itself."""

    targets: tuple[TrainTarget, ...]
    said: bool

    def trains(self, name: str) -> bool:
        """Whether a model of this name, or a projection of this key, is trained at least in part."""
        return any(
            target.name == name if target.kind == "model" else f"project/{target.name}" == name
            for target in self.targets
        )


def training(ctx: Context, scope: Scope, decl: ast.Stage, objective: Loss | None) -> Training | None:
    """The targets of a stage: what `train` lists, else the students and the projections that the objective uses."""
    carries = objective.carries if objective is not None else frozenset()
    listed = [target for stmt in decl.body if isinstance(stmt, ast.Train) for target in stmt.targets]
    frozen = [target for stmt in decl.body if isinstance(stmt, ast.Freeze) for target in stmt.targets]
    targets: list[TrainTarget] = []
    good = True
    if listed:
        for written in listed:
            found = _targets(ctx, scope, written, carries)
            good = good and found is not None
            targets += found or []
            if found:
                good = _holds(ctx, scope, found, written) and good
    else:
        terms = objective.terms if objective is not None else ()
        used = frozenset().union(*(term.loss.carries for term in terms if not schedules.is_zero(term.weight)))
        for name in sorted(carries):
            if name.startswith("project/") and name in used:
                targets.append(TrainTarget("project", name.removeprefix("project/")))
            elif name in ctx.models and ctx.models[name].role != "teacher":
                targets.append(TrainTarget("model", name))
    for written in frozen:
        found = _targets(ctx, scope, written, carries)
        if found is None:
            good = False
            continue
        targets = _without(ctx, scope, targets, found, written)
    unique = tuple(target for target in dict.fromkeys(targets) if not _frozen(ctx, target))
    return Training(unique, bool(listed)) if good else None


def _targets(ctx: Context, scope: Scope, written: ast.Expr, carries: frozenset[str]) -> list[TrainTarget] | None:
    value = ctx.evaluate(scope, written)
    if isinstance(value, Unknown):
        return None
    found = _of(value, carries)
    if found is None:
        ctx.error(
            scope, "E0417", f"{_what(value, written)} is not something that trains", written.span,
            "a model, `s.body`, `s.embed`, `s.head`, `s.layer[i]`, or a projection",
        )  # fmt: skip
    return found if found is None or _there(ctx, scope, found, written) else None


def _there(ctx: Context, scope: Scope, found: list[TrainTarget], written: ast.Expr) -> bool:
    """Whether the models have the parts that are listed; else it was reported."""
    for target in found:
        info = ctx.models[target.name].info if target.kind == "model" and target.name in ctx.models else None
        if target.part is None or info is None or info.formal:
            continue
        try:
            part_modules(info, target.part)
        except ModelError as error:
            ctx.error(
                scope, "E0417", f"`{written.span.text}` does not train: {error.reason}", written.span, error.hint,
                notes=paths.defined(ctx.models[target.name]),
            )  # fmt: skip
            return False
    return True


def _frozen(ctx: Context, target: TrainTarget) -> bool:
    """Whether a part of a model with an adapter is all frozen."""
    return target.kind == "model" and adapters.frozen(ctx.models.get(target.name), target)


def _holds(ctx: Context, scope: Scope, found: list[TrainTarget], written: ast.Expr) -> bool:
    """Whether what `train` lists holds anything that an adapter leaves to train; else it was reported."""
    if not all(_frozen(ctx, target) for target in found):
        return True
    ctx.error(
        scope, "E0417", f"`{written.span.text}` is frozen: `{found[0].name}` trains its adapter alone", written.span,
        "it holds no adapter", notes=["the adapters are in its blocks: `s.layer[i]`, or all of them: `s`"],
    )  # fmt: skip
    return False


def _what(value: Value, written: ast.Expr) -> str:
    return f"the tap `{written.span.text}`" if isinstance(value, TapPart) else kind(value)


def _of(value: Value, carries: frozenset[str]) -> list[TrainTarget] | None:
    match value:
        case Model():
            return [TrainTarget("model", value.name)]
        case Block():
            return [TrainTarget("project", value.name)]
        case Family():
            # Every member that the objective uses.
            names = sorted(key.removeprefix("project/") for key in carries if key.startswith("project/"))
            return [
                TrainTarget("project", name) for name in names if name.rsplit("/", 1)[-1].split(".")[0] == value.name
            ]
        case Layers():
            return [TrainTarget("model", value.model.name, f"layer.{i}") for i in value.indices]
        case TapPart(parts=((name, index),)):
            model = value.model
            if name in PARTS and index is None:
                return [TrainTarget("model", model.name, name)]
            if name == "layer":
                count = model.info.size("N") or 0
                numbers = range(count) if index is None else [int(index[0]) % count if count else 0]
                return [TrainTarget("model", model.name, f"layer.{i}") for i in numbers]
        case Items():
            found: list[TrainTarget] = []
            for item in value.items:
                inner = _of(item, carries)
                if inner is None:
                    return None
                found += inner
            return found
    return None


def _without(
    ctx: Context, scope: Scope, targets: list[TrainTarget], frozen: list[TrainTarget], written: ast.Expr
) -> list[TrainTarget]:
    """The targets less what is frozen; a part frozen out of a model, or out of its body, leaves the other parts."""
    left = list(targets)
    for target in frozen:
        if target.kind == "project" or target.part is None:
            left = [other for other in left if (other.kind, other.name) != (target.kind, target.name)]
            continue
        gone = set(_parts(ctx, target))
        kept: list[TrainTarget] = []
        for other in left:
            parts = _parts(ctx, other) if (other.kind, other.name) == ("model", target.name) else []
            if gone.isdisjoint(parts):
                kept.append(other)
            else:
                kept += [TrainTarget("model", other.name, part) for part in parts if part not in gone]
        left = kept
    return left


def _parts(ctx: Context, target: TrainTarget) -> list[str]:
    """The parts of a model that a target is made of, none inside another."""
    if target.part not in (None, "body"):
        return [target.part or ""]
    info = ctx.models[target.name].info
    count = info.size("N") or 0
    body = ["embed", *(f"layer.{i}" for i in range(count)), *(["rest"] if has_rest(info) else [])]
    return body if target.part == "body" or info.task == "encoder" else [*body, "head"]
