"""The fields of a compiled spec, flat, so that two specs can be compared and the difference named."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

from gkd_dsl.graph.plan import SpecPlan, StagePlan

# What is long and has no words of its own is kept as one digest.
_DIGESTED = ("forwards", "valid_program", "counted", "program")
# Where a file lies says nothing of what is in it.
_PLACES = ("path", "file", "locations", "location")


_HOW = ("backend", "device", "checkpoint", "fuse_logits")
"""Settings of the runtime block that say how, and not what: a run may go on with others."""


def fingerprint(plan: SpecPlan) -> dict[str, str]:
    """Every field of the plan by a name that a user can read: "stage `main`: optim.lr" -> "5e-05"."""
    found: dict[str, str] = {}
    for number, stage in enumerate(plan.stages):
        found[f"stage {number + 1}"] = stage.name
        for name, value in _stage(stage).items():
            found[f"stage `{stage.name}`: {name}"] = value
    found |= {f"runtime: {name}": _text(value) for name, value in plan.runtime if _counts(name, value)}
    return found | {"backend": "gemini" if plan.backend == "gemini" else "local"}


def _counts(name: str, value: Any) -> bool:
    """Whether a setting of the runtime block changes more than rounding, speed and memory.

    Local and ddp are one: they make the same steps, and have the same checkpoints.
    """
    last = name.rpartition(".")[2]
    if last == "placement":
        return value == "cached"
    return value == "auto" if last == "cache" else last not in _HOW


def _stage(plan: StagePlan) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in fields(plan.stage):
        if item.compare and item.name not in ("key", "locations", "name", "weights"):
            _flatten(item.name, getattr(plan.stage, item.name), found)
    for loss, weight in zip(plan.losses, plan.weights, strict=True):
        found[f"weight of `{loss.name}`"] = str(weight)
        found[f"loss `{loss.name}`"] = _digest(loss)
    for item in fields(plan):
        value = getattr(plan, item.name)
        if item.name in _DIGESTED:
            found[item.name] = _digest(value)
        elif item.name in ("models", "projections", "metrics", "columns"):
            _flatten(item.name, value, found)
        elif item.name == "counters":
            for counter in plan.counters:
                found[f"counter `{counter.name}`"] = f"from {counter.start} to {counter.stop}, {counter.when}"
                for loss in plan.monitored:
                    if loss.name in counter.losses:
                        found[f"watched loss `{loss.name}`"] = _digest(loss)
        elif item.name == "policies":
            for policy in plan.policies:
                _flatten(f"policy `{policy.node.name}`", policy.node, found)
                reward = next(loss for loss in plan.monitored if loss.name == policy.reward)
                found[f"reward of `{policy.node.name}`"] = _digest(reward)
    return found


def _flatten(name: str, value: Any, found: dict[str, str]) -> None:
    if is_dataclass(value) and not hasattr(value, "value") and type(value).__name__ != "Span":
        for item in fields(value):
            if item.compare and item.name not in _PLACES:
                _flatten(f"{name}.{item.name}", getattr(value, item.name), found)
    elif isinstance(value, tuple) and value and all(is_dataclass(entry) for entry in value):
        for number, entry in enumerate(value):
            label = getattr(entry, "name", None) or getattr(getattr(entry, "metric", None), "name", None) or number
            _flatten(f"{name}.{label}", entry, found)
    elif name.endswith((".forwards", ".program")):
        found[name] = _digest(value)
    else:
        found[name] = _text(value)


def _text(value: Any) -> str:
    return str(value) if is_dataclass(value) else repr(value)


def _digest(value: Any) -> str:
    flat = hashlib.sha256(_canonical(value).encode()).hexdigest()
    return f"(digest {flat[:16]})"


def _canonical(value: Any) -> str:
    if is_dataclass(value):
        inner = ",".join(
            f"{item.name}={_canonical(getattr(value, item.name))}" for item in fields(value) if item.compare
        )
        return f"{type(value).__name__}({inner})"
    if isinstance(value, tuple):
        return f"({','.join(_canonical(entry) for entry in value)})"
    return repr(value)
