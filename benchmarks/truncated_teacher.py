"""A stage that needs only the teacher's first six of twelve layers: who stops there?

A BERT-base teacher (12 x 768, random weights), a 4 x 312 student, 16 x 128 tokens, fp32, two threads, dropout off. The
objective is four MSE terms through projections, from the ends of the student's four layers to those of the teacher's
layers 1, 2, 4 and 6 (from 1); no logits. gkd-dsl stops the teacher's forward after its sixth layer by itself; "whole
teacher" is the same plan with that taken out. The loop cut by hand drops layers 7 to 12 from its copy of the teacher:
what is possible. The other tools run the teacher to its end.

First all are asserted to give the same loss and gradient, then they take turns, step by step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import in_turn, keep_memory, parser, quartiles, ratios, report, spread, table
from contestants import Bare, Contestant, Hooks, ModelOpt, Ours, Outputs, Task, TextBrewer, agree, setup

PAIRS = ((1, 1), (2, 2), (3, 4), (4, 6))
TOLERANCE = 1e-5


def main() -> None:
    options_ = parser(__doc__)
    options_.add_argument("--rounds", type=int, default=25, help="timed steps of each contestant")
    options_.add_argument("--warmup", type=int, default=3)
    options_.add_argument("--threads", type=int, default=2)
    options_.add_argument("--seed", type=int, default=0)
    options = options_.parse_args()
    if options.quick:
        options.rounds, options.warmup = 5, 2
    keep_memory()
    torch.set_num_threads(options.threads)
    made = setup(Task(PAIRS, logits=False), small=options.quick, seed=options.seed)
    makers: dict[str, Callable[[], Contestant]] = {
        "bare sum, whole teacher": lambda: Bare(made),
        "hand-placed hooks, whole teacher": lambda: Hooks(made),
        "hand-placed hooks, teacher cut by hand": lambda: Hooks(made, layers=6),
        "output_hidden_states": lambda: Outputs(made),
        "TextBrewer": lambda: TextBrewer(made),
        "ModelOpt": lambda: ModelOpt(made),
        "gkd-dsl, whole teacher": lambda: Ours(made, whole_teacher=True),
        "gkd-dsl": lambda: Ours(made),
    }
    contestants: dict[str, Contestant] = {}
    missing = []
    for name, make in makers.items():
        try:
            contestants[name] = make()
        except ImportError as error:
            missing.append(f"{name} ({error.name} is not installed)")
    reference, base = "hand-placed hooks, whole teacher", "bare sum, whole teacher"
    equal = agree(contestants, reference, TOLERANCE)
    steps = {name: contestant.step for name, contestant in contestants.items()}
    times = in_turn(steps, options.rounds, options.warmup, lambda n: print(f"round {n}", flush=True))
    rows, data = [], {"agreement": equal}
    for name in contestants:
        seconds, over_bare = quartiles(times[name]), quartiles(ratios(times, name, base))
        ours = quartiles(ratios(times, "gkd-dsl", name))
        rows.append([name, spread(seconds), spread(over_bare), spread(ours)])
        data[name] = {"seconds": seconds, "over_bare": over_bare, "gkd_over_it": ours, "times": times[name]}

    teacher, distiller = made.teacher.eval(), contestants["gkd-dsl"]
    assert isinstance(distiller, Ours)
    forward = next(f for f in distiller.plan.forwards if f.model == "t")
    teachers = distiller.distiller.module.teachers
    with torch.no_grad():
        alone = in_turn(
            {"whole": lambda: teacher.bert(**made.batch), "stopped": lambda: teachers.taps(forward, made.batch)},
            options.rounds,
            options.warmup,
        )
    share = quartiles(ratios(alone, "stopped", "whole"))
    data["forward"] = {"times": alone, "stopped_over_whole": share}
    body = table(["", "seconds a step", "over the bare sum", "gkd-dsl over it"], rows)
    body += (
        f"\n\nThe teacher's forward alone: whole {spread(quartiles(alone['whole']))} s, stopped after "
        f"`t.{forward.stop_after}` {spread(quartiles(alone['stopped']))} s, a share of {spread(share)}."
        "\n\nMedian, quartiles. The bare sum is the whole teacher's forward, the student's forward and backward, and "
        f"the optimiser. Losses agree to {max(row['loss_difference'] for row in equal):.0e}, gradients of the student "
        f"to {max(row['gradient_difference'] for row in equal):.0e}."
    )
    if missing:
        body += "\n\nNot run: " + "; ".join(missing) + "."
    settings = {
        "setting": "fp32, dropout off, AdamW, no clipping; contestants have their own models; memory is kept"
        + (" (miniature models: a smoke run, not a measurement)" if options.quick else ""),
        "threads": options.threads,
        "seed": options.seed,
        "repeats": f"{options.rounds} steps each after {options.warmup}, taking turns",
    }
    report(
        "truncated_teacher",
        options.out,
        "A teacher of which six layers are needed",
        settings,
        body,
        data,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
