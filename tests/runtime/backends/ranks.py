"""Methods of the library run for a few steps, in this process or in several that a test starts.

python ranks.py OUT ROWS BACKEND METHOD...   under RANK and WORLD_SIZE
"""

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "methods")]

from cases import CASES, full_args  # noqa: E402
from forked import LIBRARIES, Forked  # noqa: E402
from harness import batch_of, errors, spec, spec_plan, use  # noqa: E402

from gkd_dsl.runtime.stages import Run  # noqa: E402
from gkd_dsl.schedules import Span  # noqa: E402

STEPS = 3


class Heard:
    """The loss, the terms and the norm of each step."""

    def __init__(self):
        self.found = []

    def on_stage(self, record):
        pass

    def on_step(self, record):
        self.found.append([record.loss, record.gradient_norm, *record.terms.values(), *record.rewards.values()])

    def on_evaluate(self, record):
        pass

    def close(self):
        pass


class Data:
    """Micro-batches of so many rows, the second of an epoch with one row fewer."""

    def __init__(self, task, rows):
        self.task, self.rows = task, rows

    def steps_per_epoch(self, accumulate=1):
        return -(-2 // accumulate)

    def epoch(self, epoch, start=0):
        for number in range(start, 2):
            lengths = [3 + (row * 5 + number) % 4 for row in range(max(1, self.rows - number))]
            yield batch_of(self.task, (7, *lengths[1:]), 10 * epoch + number)

    def held_out(self):
        yield batch_of(self.task, (5, 3), 9000)

    @staticmethod
    def tokens(batch):
        return int(batch["attention_mask"].sum())


def losses(name, rows, backend="local", runtime=(), micro=1):
    """What each step of a method gives, without dropout. A large eps, as AdamW makes steps of what is but rounding."""
    case = CASES[name]
    plan = spec_plan(spec(case.models, *use(name, case.call, full_args(name)), "run m"), case.warns)
    stages = [
        replace(s, stage=replace(s.stage, optim=replace(s.stage.optim, lr=1e-2, eps=0.1), duration=Span(STEPS, "steps"),
                                 accumulate=micro))
        for s in plan.stages
    ]  # fmt: skip
    heard = Heard()
    plan = replace(plan, stages=tuple(stages), backend=backend, runtime=tuple(runtime))
    Run(plan, loaders=lambda stage: Data(case.models.task, rows), listeners=[heard]).run()
    return heard.found


def refusals(name, backend):
    """What the check says against a method under a backend: (code, sentence)."""
    case = CASES[name]
    block = f"runtime {{\n  backend = {backend}\n}}"
    return errors(spec(case.models, *use(name, case.call, full_args(name)), "run m", block))


def takes_gradients(name):
    """Whether a step of the method takes the gradient of a loss on its way."""
    case = CASES[name]
    plan = spec_plan(spec(case.models, *use(name, case.call, full_args(name)), "run m"), case.warns)
    return any(getattr(item, "op", None) == "gradient" for stage in plan.stages for item in stage.program)


def started(count, script, *arguments, modules=LIBRARIES, **more):
    """A script as so many processes that find each other; torchrun's variables. `modules` are there at its start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        Forked(
            modules,
            [str(script), *map(str, arguments)],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            **more,
        )
        for rank in range(count)
    ]  # fmt: skip


if __name__ == "__main__":
    out, rows, backend, *names = sys.argv[1:]
    settings = {}
    if backend == "gemini":
        from host_accelerator import install

        install()
        # Chunks so small that these models have several, on each rank a part.
        settings = {"precision": "bf16", "min_chunk_size_m": 0.001, "search_range_m": 1}
    found = {}
    for name in names:
        if refused := refusals(name, backend):
            found[name] = {"refused": refused}
            continue
        # Some accumulate.
        found[name] = losses(name, int(rows), backend, settings.items(), 1 + (len(name) % 2))
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(found))
