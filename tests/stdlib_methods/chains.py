"""Chains of models: a teacher, two assistants and a student, and runs over them."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from method_world import Pair, batch_of, checked, folder

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.runtime.stages import Run
from gkd_dsl.schedules import Span

ASSISTANTS = (("a", 3, 20), ("b", 3, 16))
STEPS = 4


def spec(method: str, chain: str = "t, a, b", args: str = "") -> str:
    """A spec that runs the method of a chain over `s`."""
    made = [
        f'model {name} = random_init("{folder("classification", layers, width)}")'
        for name, layers, width in ASSISTANTS
        if name in chain
    ]
    given = f", {args}" if args else ""
    return Pair().spec(
        *made, f'import "gkd:{method}" use {method}', f"use {method}([{chain}] -> s{given}) as m", "run m"
    )


def compiled(method: str, chain: str = "t, a, b", args: str = ""):
    return compile_plan(checked(spec(method, chain, args)).graph)


def stages(method: str, chain: str = "t, a, b", args: str = ""):
    return {stage.name.removeprefix("m."): stage for stage in compiled(method, chain, args).stages}


class Data:
    """Batches that follow from stage and number alone."""

    def __init__(self, order: int) -> None:
        self.order = order

    def steps_per_epoch(self, accumulate=1):
        return 3

    def batch(self, epoch, number):
        return batch_of((5, 3, 4), 1000 * self.order + 10 * epoch + number)

    def epoch(self, epoch, start=0):
        for number in range(start, 3):
            yield self.batch(epoch, number)

    def held_out(self):
        yield batch_of((5, 3), 9000)

    @staticmethod
    def tokens(batch):
        return int(batch["attention_mask"].sum())


class Watch:
    """Keeps the records of a run; does something after one step of a stage."""

    def __init__(self, at=None, act=None) -> None:
        self.records, self.starts, self.at, self.act = [], [], at, act

    def on_stage(self, record):
        self.starts.append(record)

    def on_step(self, record):
        self.records.append(record)
        if self.at == (record.stage, record.step):
            self.act()

    def on_evaluate(self, record):
        pass

    def close(self):
        pass


def short(plan, steps: int = STEPS):
    """The plan with stages of a few steps and a checkpoint after each."""
    changes = {"duration": Span(steps, "steps"), "checkpoint_every": Span(1, "steps")}
    return replace(
        plan,
        stages=tuple(
            replace(s, stage=replace(s.stage, optim=replace(s.stage.optim, lr=1e-2), **changes)) for s in plan.stages
        ),
    )


def runner(plan, run_folder=None, watch=None) -> Run:
    return Run(
        plan, folder=run_folder, loaders=lambda stage: Data(stage.stage.order), listeners=[watch] if watch else []
    )


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def lines(run_folder) -> list[dict]:
    found = [json.loads(line) for line in run_folder.metrics.read_text().splitlines()]
    for line in found:
        line.pop("tokens_per_second", None)
    return found
