"""Specs with several tiny teachers and one student, and what a compiled stage over them gives."""

from __future__ import annotations

import copy

import torch
from method_world import HEADS, Step, batch_of, folder, made, plans
from torch import Tensor

NAMES = "abcd"


def text(method: str, *body: str, args: str = "", teachers=((3, 24), (4, 16)), student=(2, 16), order="") -> str:
    """A spec that uses a method over teachers `a`, `b`, ... of (layers, width); `order` names them in another one."""
    names = NAMES[: len(teachers)]
    lines = ["gkd 1"]
    for name, (layers, width) in zip(names, teachers, strict=True):
        lines.append(f'teacher {name} = random_init("{folder("classification", layers, width, HEADS)}")')
    lines.append(f'student s = random_init("{folder("classification", *student, HEADS)}")')
    lines.append('data rows = csv("rows.csv", text = "text", label = "label")')
    lines.append(f'import "gkd:{method}" use {method}')
    lines.append(f"use {method}([{', '.join(order or names)}] -> s{args and ', ' + args}) as m")
    return "\n".join([*lines, *(body or ("run m",))]) + "\n"


def step_of(spec: str, stage: str, models=None, seed: int = 0) -> Step:
    plan = plans(spec)[stage]
    found = dict(models or {})
    own = made(plan, seed)
    return Step(plan, {node.name: found.get(node.name, own[node.name]) for node in plan.models})


def batch(seed: int = 0, pad: int = 0) -> dict[str, Tensor]:
    return batch_of((7, 4, 2, 5), seed=seed, pad=pad)


def logits(step: Step, rows) -> dict[str, Tensor]:
    """The logits of every model of a stage, by a copy of it in eval mode."""
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return {name: copy.deepcopy(model).eval()(**inputs).logits for name, model in step.models.items()}
