"""A run of two stages with dropout, for tests that end it; as a script it is a process that can be killed.

python killable_run.py RUN_FOLDER CONFIG_FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path

from tiny_runs import Rows, infos, models, spec_of, stage_plan, with_metric

from gkd_dsl.graph.nodes import EvaluateSpec, OptimSpec
from gkd_dsl.runtime.run_folder import RunFolder
from gkd_dsl.runtime.stages import Run as SpecRun
from gkd_dsl.schedules import Span

STEPS = 6 + 5


class Slow:
    """Tells each step on standard output, and waits for a line, so that the other side can choose when to kill."""

    def on_stage(self, record):
        pass

    def on_step(self, record):
        print(record.stage, record.step, flush=True)
        sys.stdin.readline()

    def on_evaluate(self, record):
        pass

    def close(self):
        pass


def make(configs, folder, *, listeners=(), dropout=0.2, loaders=None, **optim):
    """The run: 2 epochs of accumulated micro-batches with `keep best`, then 5 steps of momentum."""
    found = infos(configs, dropout=dropout)
    every = EvaluateSpec(("acc",), Span(2, "steps"))
    first = with_metric(
        stage_plan(
            found,
            duration=Span(2, "epochs"),
            accumulate=2,
            seed=3,
            optim=OptimSpec(lr=3e-3, warmup=Span(2, "steps"), **optim),
        ),
        evaluate=(every,),
        keep_best="acc",
        checkpoint_every=Span(2, "steps"),
    )
    second = stage_plan(
        found,
        duration=Span(5, "steps"),
        seed=4,
        optim=OptimSpec("sgd", lr=1e-2, momentum=0.9),
        checkpoint_every=Span(3, "steps"),
    )
    plan = spec_of(first, second)
    plan = replace(plan, stages=tuple(plan.stages))
    return SpecRun(
        plan,
        folder=folder,
        models=models(found),
        loaders=loaders or (lambda stage: Rows(seed=stage.stage.order)),
        listeners=listeners,
    )


if __name__ == "__main__":
    make(Path(sys.argv[2]), RunFolder.create("killed", out=Path(sys.argv[1])), listeners=[Slow()]).run()
