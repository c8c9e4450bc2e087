"""Time of one training step of feature distillation, against hand-written loops and other tools.

A BERT-base teacher (12 x 768, random weights) and a 4 x 312 student with 12 heads, 16 x 128 tokens, fp32, two
threads, dropout off. The objective is KL at T = 4 on the logits and five MSE terms through projections: the
embeddings, and four layers on the uniform map. Three runs:

  hidden   as above
  scores   and MSE of the attention scores of the four mapped layers (before the softmax); only hand-placed hooks on
           query and key, and gkd-dsl, have them
  probs    and MSE of their attention probabilities; the other tools need eager attention in all layers for it

First every contestant is asserted to give the same loss and the same gradient of the student. Then they take turns,
step by step, in one process, the order moving on by one each round; a ratio compares steps of one round. Each owns a
copy of both models, so that no one profits from another's caches. The bare sum is the teacher's forward, the
student's forward and backward, and the optimiser, without any distillation.

Taps: one forward of the teacher's body with 1, 6 and 12 layers tapped, against hooks placed and taken away by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import in_turn, keep_memory, parser, quartiles, ratios, report, spread, table
from contestants import Bare, Contestant, Hooks, ModelOpt, Ours, Outputs, Setup, Task, TextBrewer, agree, setup

PAIRS = ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))
MAPS = ((0, 2), (1, 5), (2, 8), (3, 11))
TOLERANCE = 1e-5


def field(run: str, made: Setup) -> tuple[dict[str, Contestant], list[str]]:
    """The contestants of a run, and who cannot take part."""
    missing: list[str] = []
    makers: dict[str, Callable[[], Contestant]] = {"bare sum": lambda: Bare(made)}
    if run == "hidden":
        makers |= {
            "hand-placed hooks": lambda: Hooks(made),
            "output_hidden_states": lambda: Outputs(made),
            "TextBrewer": lambda: TextBrewer(made),
            "ModelOpt": lambda: ModelOpt(made),
        }
    elif run == "scores":
        makers["hand-placed hooks"] = lambda: Hooks(made)
    else:
        makers |= {
            "hand-placed hooks, eager": lambda: Hooks(made, "eager"),
            "output_attentions, eager": lambda: Outputs(made, "eager"),
            "TextBrewer, eager": lambda: TextBrewer(made, "eager"),
            "ModelOpt, eager": lambda: ModelOpt(made, "eager"),
        }
    makers["gkd-dsl"] = lambda: Ours(made)
    contestants: dict[str, Contestant] = {}
    for name, make in makers.items():
        try:
            contestants[name] = make()
        except ImportError as error:
            missing.append(f"{name}: not installed ({error.name})")
    return contestants, missing


def compare(run: str, options: Any) -> tuple[str, dict[str, Any]]:
    maps = {"hidden": {}, "scores": {"maps": MAPS, "what": "scores"}, "probs": {"maps": MAPS, "what": "probs"}}[run]
    made = setup(Task(PAIRS, **maps), small=options.quick, seed=options.seed)
    contestants, missing = field(run, made)
    reference = next(name for name in contestants if name.startswith("hand-placed"))
    equal = agree(contestants, reference, TOLERANCE)
    steps = {name: contestant.step for name, contestant in contestants.items()}
    times = in_turn(steps, options.rounds, options.warmup, lambda n: print(f"{run}: round {n}", flush=True))
    rows, data = [], {}
    differences = {row["name"]: row for row in equal}
    for name in contestants:
        seconds = quartiles(times[name])
        over_bare = quartiles(ratios(times, name, "bare sum"))
        over_hand = quartiles(ratios(times, name, reference))
        over_ours = quartiles(ratios(times, "gkd-dsl", name))
        found = differences.get(name)
        rows.append(
            [
                name,
                spread(seconds),
                spread(over_bare),
                spread(over_hand),
                spread(over_ours),
                "" if found is None else f"{found['loss_difference']:.0e} / {found['gradient_difference']:.0e}",
            ]
        )
        data[name] = {
            "seconds": seconds,
            "over_bare": over_bare,
            "over_hand": over_hand,
            "gkd_over_it": over_ours,
            "times": times[name],
            "agreement": found,
        }
    text = table(
        [
            "",
            "seconds a step",
            "over the bare sum",
            "over hand-placed hooks",
            "gkd-dsl over it",
            "loss / gradient apart",
        ],
        rows,
    )
    if missing:
        text += "\n\nNot run: " + "; ".join(missing) + "."
    return text, data


def taps(options: Any) -> tuple[str, dict[str, Any]]:
    rows, data = [], {}
    sizes = [("12 x 48, 4 x 16 tokens", True)]
    if not options.quick:
        sizes.insert(0, ("BERT-base, 16 x 128 tokens", False))
    for label, small in sizes:
        made = setup(Task(PAIRS), small=small, seed=options.seed)
        for count in (1, 6, 12):
            times = _tapped(made, count, options.rounds * (20 if small else 1), options.warmup)
            over = quartiles(ratios(times, "gkd-dsl", "hooks by hand"))
            micro = {
                name: quartiles([1e6 * (a - b) for a, b in zip(times[name], times["no taps"], strict=True)])
                for name in times
                if name != "no taps"
            }
            untapped = spread(quartiles(times["no taps"]), 4)
            rows.append([label, count, untapped, spread(over), *(f"{micro[name]['median']:.0f}" for name in micro)])
            data[f"{label}, {count}"] = {"times": times, "gkd_over_hand": over, "microseconds_over_no_taps": micro}
    header = ["body", "taps", "untapped, s", "gkd-dsl over hooks by hand"]
    header += [f"{name}: us more" for name in ("hooks by hand", "gkd-dsl", "output_hidden_states")]
    return table(header, rows), data


def _tapped(made: Setup, count: int, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of a forward of the teacher's body with its last layers tapped; the taps are asserted equal."""
    from gkd_dsl.models.describe import describe
    from gkd_dsl.models.taps import TapPath
    from gkd_dsl.runtime.models.tapper import Tapper

    tapper = Tapper(made.teacher.eval(), _described(made, describe))
    body, batch, layers = made.teacher.bert, made.batch, range(12 - count, 12)
    paths = [TapPath("hidden", layer + 1) for layer in layers]

    def by_hand() -> dict[int, torch.Tensor]:
        seen: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(_: Any, __: Any, output: Any) -> None:
                seen[layer] = output if isinstance(output, torch.Tensor) else output[0]

            return hook

        handles = [body.encoder.layer[layer].register_forward_hook(keep(layer)) for layer in layers]
        body(**batch)
        for handle in handles:
            handle.remove()
        return seen

    contestants = {
        "no taps": lambda: body(**batch),
        "hooks by hand": by_hand,
        "gkd-dsl": lambda: tapper.run(batch, paths),
        "output_hidden_states": lambda: body(**batch, output_hidden_states=True),
    }
    with torch.no_grad():
        hand, ours = by_hand(), tapper.run(batch, paths)
        for layer, path in zip(layers, paths, strict=True):
            assert torch.equal(hand[layer], ours[path])
        return in_turn(contestants, rounds, warmup)


def _described(made: Setup, describe: Callable[..., Any]) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        made.teacher.config.save_pretrained(name)
        return describe(name)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=25, help="timed steps of each contestant")
    made.add_argument("--warmup", type=int, default=3)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--only", choices=["hidden", "scores", "probs", "taps"], action="append")
    options = made.parse_args()
    if options.quick:
        options.rounds, options.warmup = 5, 2
    keep_memory()
    torch.set_num_threads(options.threads)
    titles = {
        "hidden": "KL and five hidden terms",
        "scores": "and the attention scores of four layers",
        "probs": "and the attention probabilities of four layers",
        "taps": "Taps: one forward of a body",
    }
    body, data = [], {}
    for run in options.only or titles:
        text, data[run] = taps(options) if run == "taps" else compare(run, options)
        body.append(f"## {titles[run]}\n\n{text}")
    if data.keys() - {"taps"}:
        body.append(
            'Median and quartiles. "Apart": relative difference of the loss, and of the student\'s gradient, from the '
            f"loop with hand-placed hooks (asserted to be at most {TOLERANCE:.0e} and {10 * TOLERANCE:.0e})."
        )
    settings = {
        "setting": "fp32, dropout off, AdamW, no clipping; contestants have their own models; memory is kept"
        + (" (miniature models: a smoke run, not a measurement)" if options.quick else ""),
        "threads": options.threads,
        "seed": options.seed,
        "repeats": f"{options.rounds} steps each after {options.warmup}, taking turns",
    }
    partial = "step_time" if not options.only else "step_time_" + "_".join(options.only)
    report(partial, options.out, "Time of a training step", settings, "\n\n".join(body), data, quick=options.quick)


if __name__ == "__main__":
    main()
