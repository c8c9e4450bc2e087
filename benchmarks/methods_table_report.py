"""The methods table as a page, and what is wrong with it."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import methods_table_data as data
import torch
from methods_table_remarks import AT_CHANCE, REMARKS
from methods_table_specs import BASELINE, Settings

from gkd_dsl import library

HEADER = (
    "method",
    "held-out accuracy",
    "less no teacher",
    "agreement with the teacher",
    "step over plain",
    "step over KD",
    "peak memory over plain",
)
Rows = Sequence[Mapping[str, Any]]


def problems(rows: Rows, costs: Mapping[str, Mapping[str, Any]], labels: Sequence[int], *, quick: bool) -> list[str]:
    """What makes the run a failure.

    A run of a few steps asks of KD alone that it beats chance; in a whole one every student must, but where it is known
    why one does not.
    """
    found = []
    for row in rows:
        where = f"{row['method']}, seed {row['seed']}"
        if "error" in row:
            found.append(f"{where}: {row['error']}")
        elif (row["method"] == "kd" or not (quick or row["method"] in AT_CHANCE)) and not data.beats_chance(
            row["accuracy"], labels
        ):
            found.append(f"{where}: an accuracy of {row['accuracy']:.4f} does not beat chance")
    return found + [f"{name}, timing: {row['error']}" for name, row in costs.items() if "error" in row]


def write(
    options: argparse.Namespace,
    settings: Settings,
    source: str,
    held_out: int,
    names: Sequence[str],
    teachers: Rows,
    rows: Rows,
    costs: Mapping[str, Mapping[str, Any]],
    failed: Sequence[str],
) -> None:
    """Write `methods.md` and `methods.json`, or those ending in `-quick`."""
    _bare_command_line()
    gpu = options.device == "cuda"
    shown = {
        "device": torch.cuda.get_device_name(0) if gpu else f"cpu, {torch.get_num_threads()} threads for the timing",
        "data": f"{source}; {held_out} sentences held out, the same in every run",
        "seeds": ", ".join(str(seed) for seed in options.seeds),
        "student": f"{settings.steps} optimiser steps of {settings.batch_size} sentences of at most "
        f"{settings.max_length} tokens, AdamW at {settings.lr:g}, warm-up {settings.warmup} %",
        "teachers": f"{settings.teacher_steps} steps at {settings.teacher_lr:g}",
        "worker processes": options.jobs,
    }
    if costs:
        shown["timing"] = f"{options.rounds} rounds of {options.timed_steps} steps a stage, all methods in turn, alone"
    # What is remarked on was measured in whole runs.
    body = page(names, teachers, rows, costs, failed, {} if options.quick else REMARKS)
    figures = {"settings": {**asdict(settings), "encoder": Path(settings.encoder).name}, "teachers": [
        {key: value for key, value in row.items() if key not in ("predictions", "key")} for row in teachers
    ], "rows": list(rows), "costs": dict(costs)}  # fmt: skip
    title = "All methods on real sentences"
    common.report("methods", options.out, title, shown, body, figures, quick=options.quick)


def write_timing(
    options: argparse.Namespace,
    settings: Settings,
    source: str,
    names: Sequence[str],
    costs: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write `methods_timing.md` and `methods_timing.json`: what a step costs, dearest last."""
    _bare_command_line()
    gpu = options.device == "cuda"
    shown = {
        "device": torch.cuda.get_device_name(0) if gpu else f"cpu, {torch.get_num_threads()} threads",
        "data": source,
        "step": f"{settings.batch_size} sentences of at most {settings.max_length} tokens, student of three layers",
        "timing": f"{options.rounds} rounds of {options.timed_steps} steps a stage, all methods in turn",
    }
    lines = []
    for name in sorted(names, key=lambda name: costs[name].get("seconds", math.inf)):
        row = costs[name]
        if "error" in row:
            lines.append((_name(name), f"failed: {row['error'].splitlines()[0]}", *[""] * 4))
            continue
        spread = f"{min(row['over_kd']):.2f} .. {max(row['over_kd']):.2f}" if "over_kd" in row else ""
        lines.append((
            _name(name), f"{row['seconds']:.3f}", _ratio(row.get("over_plain")), _ratio(row.get("over_kd")), spread,
            f"{row['memory_over_plain']:.2f}" if "memory_over_plain" in row else "",
        ))  # fmt: skip
    header = ("method", "seconds a step", "over plain", "over KD", "over KD, least .. most", "peak memory over plain")
    body = common.table(header, lines) + (
        "\n\nThe mean step of a method's own stages that train the student, over that of plain fine-tuning and of KD "
        "in the same round: median. Memory: most bytes of tensors in a step, models and optimiser included."
    )
    figures = {"settings": {**asdict(settings), "encoder": Path(settings.encoder).name}, "costs": dict(costs)}
    title = "What a step of each method costs"
    common.report("methods_timing", options.out, title, shown, body, figures, quick=False)


def _bare_command_line() -> None:
    """Leave the folders of this machine out of the command that the report shows."""
    sys.argv[1:] = [Path(word).name if "/" in word else word for word in sys.argv[1:]]


def page(
    names: Sequence[str],
    teachers: Rows,
    rows: Rows,
    costs: Mapping[str, Mapping[str, Any]],
    failed: Sequence[str] = (),
    remarks: Mapping[str, str] = REMARKS,
) -> str:
    """The table, the rows that lose, and what failed."""
    plain = {row["seed"]: row["accuracy"] for row in rows if row["method"] == BASELINE and "error" not in row}
    taught = [row["accuracy"] for row in teachers if row["teacher"] == "teacher"]
    lines, losing = [], []
    for what, title in (("teacher", "teacher"), ("second", "second teacher"), ("small", "small teacher")):
        found = [row["accuracy"] for row in teachers if row["teacher"] == what]
        if found:
            over = f"{100 * (statistics.mean(found) - statistics.mean(plain.values())):+.2f}" if plain else ""
            lines.append((f"*{title}*", _spread(found), over, "", "", "", ""))
    for name in names:
        own = {row["seed"]: row for row in rows if row["method"] == name and "error" not in row}
        if not own:
            lines.append((_name(name), "failed", *[""] * 5))
            continue
        gains = [100 * (row["accuracy"] - plain[seed]) for seed, row in own.items() if seed in plain]
        gain = "" if name == BASELINE or not gains else f"{statistics.mean(gains):+.2f}"
        if gain and statistics.mean(gains) < 0:
            losing.append((name, gains))
        cost = costs.get(name, {})
        lines.append((
            _name(name), _spread([row["accuracy"] for row in own.values()]), gain,
            _spread([row["agreement"] for row in own.values()]), _ratio(cost.get("over_plain")),
            _ratio(cost.get("over_kd")), f"{cost['memory_over_plain']:.2f}" if "memory_over_plain" in cost else "",
        ))  # fmt: skip
    text = common.table(HEADER, lines)
    text += (
        "\n\nAccuracies in per cent: mean and standard deviation over the seeds. The difference to the student without "
        "a teacher is in points, seed by seed from the same start. Times: the mean step of a method's own stages over "
        "that of plain fine-tuning and of KD, median over the rounds (least and greatest in the JSON). Memory: most "
        "bytes of tensors in a step, models and optimiser included, over the same of plain fine-tuning."
    )
    if taught and plain:
        over = 100 * (statistics.mean(taught) - statistics.mean(plain.values()))
        text += f"\n\nThe teacher is {over:.2f} points above the student alone."
    text += "\n\n## Stages\n\n" + _stages(names, rows)
    if losing:
        text += "\n\n## Worse than no teacher\n"
        for name, gains in losing:
            by_seed = ", ".join(f"{gain:+.2f}" for gain in gains)
            text += f"\n- `{name}` ({by_seed}): {remarks.get(name, 'not explained yet.')}"
    others = [name for name in names if name in remarks and name not in [each for each, _ in losing]]
    if others:
        text += "\n\n## Remarks\n" + "".join(f"\n- `{name}`: {remarks[name]}" for name in others)
    if failed:
        text += "\n\n## Failed\n" + "".join(f"\n- {problem.splitlines()[0]}" for problem in failed)
    return text


def _stages(names: Sequence[str], rows: Rows) -> str:
    """How each method's steps are shared out; those that train others than the student in brackets."""
    lines = []
    for name in names:
        row = next((row for row in rows if row["method"] == name and "error" not in row), None)
        if row is None or name == BASELINE:
            continue
        counts: dict[tuple[str, bool], list[int]] = {}
        for stage in row["stages"]:
            title = stage["name"].split(".")[1] if "." in stage["name"] else stage["name"]
            counts.setdefault((title, stage["student"]), []).append(stage["steps"])
        told = []
        for (title, student), steps in counts.items():
            written = f"{title} {len(steps)} x {steps[0]}" if len(steps) > 1 else f"{title} {steps[0]}"
            told.append(written if student else f"({written})")
        lines.append((_name(name), ", ".join(told)))
    return common.table(("method", "stages and steps"), lines)


def _name(name: str) -> str:
    return f"*{name}*" if name == BASELINE else f"{library.describe(name).title} (`{name}`)"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def _ratio(values: Sequence[float] | None) -> str:
    return f"{statistics.median(values):.2f}" if values else ""
