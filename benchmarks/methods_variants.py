"""Why some methods of the methods table do worse than no teacher: the same runs with one thing changed.

Every row is a method (or the student alone) with other arguments or another number of steps than in the table, on the
same data, from the same start, with the same teachers and seeds; those of the table itself are run again beside them.
Besides: how sure a teacher is of the sentences that it was trained on, which are also those that it teaches, and of
the held-out ones.

    python benchmarks/methods_variants.py --data reviews.tsv --device cuda --jobs 15
    python benchmarks/methods_variants.py --quick

A finished row is stored in the work folder, as by methods_table.py; `--stored` reports what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import methods_table as whole
import methods_table_data as data
import methods_table_work as work
import torch
import transformers
from methods_table_specs import BASELINE, Settings


@dataclass(frozen=True)
class Variant:
    """A method with other arguments, as the language writes them; `times` the steps of the table."""

    method: str
    weights: str = ""
    times: float = 1.0


VARIANTS = (
    Variant(BASELINE),
    Variant(BASELINE, times=0.25),
    Variant(BASELINE, times=0.3),
    Variant(BASELINE, times=0.5),
    Variant(BASELINE, times=3),
    Variant("kd"),
    Variant("kd", "T = 1.0"),
    Variant("kd", "T = 1.0, alpha = 0.9"),
    Variant("kd", times=3),
    Variant("pkd", "T = 1.0"),
    Variant("alp_kd", "T = 1.0"),
    Variant("annealing_kd", times=3),
    Variant("dgkd", "T = 1.0"),
    Variant("takd", "T = 1.0"),
    Variant("rail_kd", "T = 1.0"),
    Variant("rail_kd", "layer_weight = 0.0"),
    Variant("rail_kd", times=3),
    Variant("rl_kd", "T = 1.0"),
    Variant("rl_kd", times=3),
    Variant("mt_bert", "hidden_weight = 0.0"),
    Variant("sid", times=3),
)

COSTS = {"mt_bert": 3.5, "dgkd": 2.4, "takd": 2.0, "rl_kd": 1.6}
"""About how long some methods take, over KD: those that train others first, or have several teachers."""


def main() -> int:
    """Run what is missing, then write the report; the exit code."""
    options = arguments()
    work.begin(os.cpu_count() or 1)
    rows, source = data.read(options.data)
    limit = whole.TRAINING_ROWS if options.quick else None
    settings = whole.settings_of(options, data.write(rows, options.work / "data", limit))
    work.start(settings, options.work)
    variants = [each for each in VARIANTS if options.methods is None or each.method in options.methods]
    tasks = [(each, seed) for each in variants for seed in options.seeds]
    # The longest first, so that no worker is left with one of them at the end; before them those that are soon done.
    tasks.sort(key=lambda task: -task[0].times * COSTS.get(task[0].method, 1.0) if task[0].times >= 1 else -math.inf)
    there = stored(options.rows)
    missing = [(each, seed) for each, seed in tasks if named(settings, each, seed) not in there]
    sure: list[dict[str, Any]] = [row for row in whole.lines_of(options.rows) if "sure" in row]
    if not options.stored and missing:
        train(options, settings, variants, missing)
        if not sure:
            sure = [sureness(settings, options.work, seed) for seed in options.seeds]
            for row in sure:
                whole.store(options.rows, row)
    write(options, settings, source, variants, sure)
    failed = [row for row in stored(options.rows).values() if "error" in row]
    for row in failed:
        print(f"FAILED {row['method']}, seed {row['seed']}: {row['error']}", file=sys.stderr)
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = whole.shared_arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no row after so long")
    parser.add_argument("--stored", action="store_true", help="run nothing: report the rows that are there")
    options = whole.completed(parser.parse_args(), "methods-variants")
    options.only_timing = False
    options.steps = 12 if options.quick else 600
    options.batch = 32 if options.device == "cuda" and not options.quick else 16
    return options


def with_steps(settings: Settings, variant: Variant) -> Settings:
    """The table's settings with a variant's steps; the teachers stay those of the table."""
    return replace(settings, steps=max(1, round(settings.steps * variant.times)))


def named(settings: Settings, variant: Variant, seed: int) -> tuple[str, int]:
    """What a stored row is found by."""
    return work.key_of(with_steps(settings, variant), variant.method, variant.weights), seed


def stored(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The finished rows."""
    return {(row["key"], row["seed"]): row for row in whole.lines_of(file) if "method" in row}


def train(
    options: argparse.Namespace, settings: Settings, variants: Sequence[Variant], tasks: Sequence[tuple[Variant, int]]
) -> None:
    """The teachers, then the rows that are missing, each stored as it is done."""
    started = time.monotonic()
    threads = 1 if options.device == "cuda" else max(1, (os.cpu_count() or 1) // options.jobs)
    pool = ProcessPoolExecutor(
        options.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=work.begin, initargs=(threads,)
    )
    methods = list(dict.fromkeys(each.method for each in variants))
    with whole.stopping(pool):
        for _, done in whole.each(
            pool, work.train_teacher, whole.teacher_tasks(options, settings, methods, options.seeds)
        ):
            print(f"teacher {done['teacher']}, seed {done['seed']}: {done.get('accuracy')}", flush=True)
        until = started + 60 * options.minutes
        arguments_ = [
            (with_steps(settings, each), options.work, each.method, seed, each.weights, until) for each, seed in tasks
        ]
        for number, row in whole.each(pool, run, arguments_):
            told = row.get("error") or (f"accuracy {row['accuracy']:.4f}" if "accuracy" in row else "no time")
            if "accuracy" in row or "error" in row:
                whole.store(options.rows, row)
            where = f"{number}/{len(tasks)} {row['method']}({row['weights']}), {row['steps']} steps, seed {row['seed']}"
            print(f"{where}: {told}, {row.get('seconds', 0):.0f} s", flush=True)


def run(settings: Settings, folder: Path, method: str, seed: int, weights: str, until: float) -> dict[str, Any]:
    """A row; without an accuracy where it is too late to begin one. `until` is a time of the monotonic clock."""
    row: dict[str, Any] = {"method": method, "seed": seed}
    if time.monotonic() < until:
        row = work.run_method(settings, folder, method, seed, work.key_of(settings, method, weights), weights)
    return row | {"weights": weights, "steps": settings.steps}


@torch.no_grad()
def sureness(settings: Settings, folder: Path, seed: int) -> dict[str, Any]:
    """How often a teacher is right on the sentences it was trained on and on the held-out ones, and how sure it is.

    `doubt` is the mean probability of the class that it does not choose, by temperature.
    """
    place = folder / "models" / str(seed) / "teacher"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place).to(settings.device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    found: dict[str, Any] = {"sure": seed}
    for part in ("train", "held_out"):
        lines = (folder / "data" / f"{part}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        texts, labels = zip(*(line.rsplit("\t", 1) for line in lines), strict=True)
        logits = []
        for start in range(0, len(texts), 64):
            batch = tokenizer(
                list(texts[start : start + 64]), truncation=True, max_length=settings.max_length, padding=True,
                return_tensors="pt",
            ).to(settings.device)  # fmt: skip
            logits.append(model(**batch).logits.float().cpu())
        said = torch.cat(logits)
        right = said.argmax(-1) == torch.tensor([int(label) for label in labels])
        doubt = {T: float((1 - (said / T).softmax(-1).amax(-1)).mean()) for T in (1, 4)}
        found[part] = {"accuracy": float(right.float().mean()), "doubt": doubt}
    return found


def write(
    options: argparse.Namespace,
    settings: Settings,
    source: str,
    variants: Sequence[Variant],
    sure: Sequence[Mapping[str, Any]],
) -> None:
    """Write `methods_variants.md` and `.json`."""
    rows = stored(options.rows)
    by_steps: dict[int, dict[int, float]] = {}
    for variant in variants:
        if variant.method == BASELINE:
            own = with_steps(settings, variant)
            by_steps[own.steps] = accuracies(rows, settings, variant, options.seeds)
    lines = []
    for variant in variants:
        own = accuracies(rows, settings, variant, options.seeds)
        steps = with_steps(settings, variant).steps
        if not own:
            lines.append((variant.method, f"`{variant.weights}`" if variant.weights else "", steps, "not run", "", ""))
            continue
        alone = by_steps.get(steps, {})
        gains = [100 * (value - alone[seed]) for seed, value in own.items() if seed in alone]
        lines.append((
            f"*{variant.method}*" if variant.method == BASELINE else f"`{variant.method}`",
            f"`{variant.weights}`" if variant.weights else "", steps,
            spread(list(own.values())),
            f"{statistics.mean(gains):+.2f}" if gains and variant.method != BASELINE else "",
            ", ".join(f"{gain:+.2f}" for gain in gains) if variant.method != BASELINE else "",
        ))  # fmt: skip
    header = ("method", "arguments", "steps", "held-out accuracy", "less no teacher of as many steps", "by seed")
    body = common.table(header, lines)
    if sure:
        body += "\n\n## What the teacher knows\n\n" + common.table(
            ("sentences", "accuracy", "mean doubt, T = 1", "mean doubt, T = 4"),
            [
                (
                    title, f"{100 * statistics.mean(row[part]['accuracy'] for row in sure):.2f}",
                    *(f"{statistics.mean(doubts(row[part])[T] for row in sure):.4f}" for T in ("1", "4")),
                )
                for part, title in (("train", "that it was trained on, and teaches"), ("held_out", "held out"))
            ],
        ) + "\n\nDoubt: the probability of the class that the teacher does not choose. Mean over seeds."  # fmt: skip
    gpu = options.device == "cuda"
    shown = {
        "device": (torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cuda") if gpu else "cpu",
        "data": source,
        "seeds": ", ".join(str(seed) for seed in options.seeds),
        "student": f"steps of {settings.batch_size} sentences of at most {settings.max_length} tokens, AdamW at "
        f"{settings.lr:g}, warm-up {settings.warmup} %",
        "teachers": f"{settings.teacher_steps} steps at {settings.teacher_lr:g}",
    }
    sys.argv[1:] = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    figures = {"rows": list(rows.values()), "sure": list(sure)}
    common.report(
        "methods_variants", options.out, "The methods table with one thing changed", shown, body, figures,
        quick=options.quick,
    )  # fmt: skip


def accuracies(
    rows: Mapping[tuple[str, int], Mapping[str, Any]], settings: Settings, variant: Variant, seeds: Sequence[int]
) -> dict[int, float]:
    """The accuracies of a variant by seed."""
    found = {seed: rows.get(named(settings, variant, seed), {}) for seed in seeds}
    return {seed: row["accuracy"] for seed, row in found.items() if "accuracy" in row}


def doubts(part: Mapping[str, Any]) -> dict[str, float]:
    """Doubt by temperature, whose keys JSON has made texts."""
    return {str(T): value for T, value in json.loads(json.dumps(part["doubt"])).items()}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in per cent."""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
