"""Rows of `gpu.py`: named measurements, each in a group that shares a process, and what became of them.

A worker runs the rows of a group and writes a line of JSON after each. Where one fails, or the process dies or runs out
of time, the row keeps its error and a new process goes on with the next.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

PARTS: dict[int, str] = {1: "gpu_losses", 2: "gpu_memory", 3: "gpu_speed", 4: "gpu_large", 5: "gpu_heads"}
"""The module of each part: its `ROWS(options)`, and `table(found)` for the report."""
TRACE = 30
"""The last lines of a traceback, or of what a process was doing when its time was up, that are kept."""
AT_ONCE = {2: 4}
"""How many processes of a part run side by side on a GPU: where nothing is timed."""


_NO_TIME = "not run: the part's time was up"


@dataclass(frozen=True)
class Options:
    """What all rows are given."""

    device: str = "cuda"
    quick: bool = False
    seed: int = 0

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Row:
    """A measurement. Rows of one group follow each other in one process; `seconds` is the most that this one takes.

    `env` is added to the environment of the process; all rows of a group have the same. A `base` is what other rows are
    held against, and is measured in every run.
    """

    name: str
    run: Callable[[Options], dict[str, Any]]
    group: str = ""
    seconds: float = 120.0
    env: Mapping[str, str] = field(default_factory=dict)
    base: bool = False


def rows_of(part: int, options: Options) -> list[Row]:
    """The rows of a part, in their order."""
    return importlib.import_module(PARTS[part]).rows(options)


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by group, in the order of their first rows; a row without a group is alone."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group or f"alone/{row.name}", []).append(row)
    return list(found.values())


def work(part: int, names: Sequence[str], options: Options, out: Path) -> None:
    """Run rows in this process; a line of JSON for each. Ends at the first that fails."""
    faulthandler.register(signal.SIGUSR1)
    rows = {row.name: row for row in rows_of(part, options)}
    for name in names:
        began = time.perf_counter()
        failed = False
        try:
            found = rows[name].run(options)
        except BaseException as error:
            failed = True
            found = {"error": _said(error), "trace": traceback.format_exc().splitlines()[-TRACE:]}
        found = {"row": name, **found, "wall_seconds": time.perf_counter() - began, "date": date.today().isoformat()}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found, default=str) + "\n")
        if failed:
            # What an error leaves behind (memory, a GPU that no longer answers) is not for the next row.
            os._exit(3)
    # Whatever libraries do at the end of a process is not measured.
    os._exit(0)


def kept(part: int, options: Options, before: Mapping[str, Any], again: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier result that need not be measured again, each with the `base` that it is held against.

    `again` are parts of the names of rows that are measured again all the same.
    """
    rows = {row.name: row for row in rows_of(part, options)}
    good = {entry["row"]: entry for entry in before["data"] if "error" not in entry and entry["row"] in rows}
    base = next((entry for name, entry in good.items() if rows[name].base), None)
    found = {}
    for name, entry in good.items():
        if rows[name].base or any(words in name for words in again):
            continue
        found[name] = {"date": before["machine"]["date"], "base": base, **entry, "kept": True}
    if base is not None and all(row.base or row.name in found for row in rows.values()):
        found[base["row"]] = base
    return found


def run_part(
    part: int,
    options: Options,
    until: float,
    folder: Path,
    done: Callable[[list[dict[str, Any]]], None],
    kept: Mapping[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """All rows of a part but those `kept`, before the time `until` (of time.monotonic).

    `done` is told of them after each process.
    """
    rows = rows_of(part, options)
    found: dict[str, dict[str, Any]] = dict(kept or {})
    missing = [row for row in rows if row.name not in found]
    writing = threading.Lock()

    def tell() -> None:
        with writing:
            done([found[row.name] for row in rows if row.name in found])

    def run(number: int, group: list[Row]) -> None:
        waiting = list(group)
        while waiting:
            left = until - time.monotonic()
            if left < 5:
                found.update({row.name: {"row": row.name, "error": _NO_TIME} for row in waiting})
                break
            line = folder / f"part{part}-{number}-{len(waiting)}.jsonl"
            log = line.with_suffix(".log")
            ended = _process(part, waiting, options, line, log, until)
            written = {entry["row"]: entry for entry in _lines(line)}
            found.update(written)
            waiting = [row for row in waiting if row.name not in written]
            if ended and waiting and not any("error" in entry for entry in written.values()):
                error = ended if ended.startswith("stopped") else f"{ended}; {_tail(log, 1)}"
                found[waiting[0].name] = {"row": waiting[0].name, "error": error, "trace": _tail(log, TRACE)}
                del waiting[0]
            for name in written:
                print(f"part {part}: {name}: {short(written[name])}", flush=True)
            tell()

    with ThreadPoolExecutor(AT_ONCE.get(part, 1) if options.cuda else 1) as pool:
        for each in [pool.submit(run, number, group) for number, group in enumerate(groups(missing))]:
            each.result()
    tell()
    return [found[row.name] for row in rows if row.name in found]


def _process(part: int, rows: list[Row], options: Options, line: Path, log: Path, until: float) -> str:
    """Run rows in a new process; why it ended before the last, or nothing."""
    words = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--worker", str(part), str(line)]
    words += ["--device", options.device, "--seed", str(options.seed), *(["--quick"] if options.quick else [])]
    words += ["--names", json.dumps([row.name for row in rows])]
    with log.open("w") as file:
        # A group of processes of its own, so that nothing that it starts outlives it.
        started = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **rows[0].env}, start_new_session=True
        )
        seen, since = 0, time.monotonic()
        while started.poll() is None:
            time.sleep(0.1)
            count = len(_lines(line))
            if count > seen:
                seen, since = count, time.monotonic()
            row = rows[min(seen, len(rows) - 1)]
            late = time.monotonic() - since > row.seconds
            if late or time.monotonic() > until:
                _kill(started)
                limit = f"{row.seconds:.0f} s" if late else "the part's"
                return f"stopped: its time ({limit}) was up"
    return f"the process ended with {started.returncode}" if started.returncode else ""


def _kill(started: subprocess.Popen[bytes]) -> None:
    """End a process, after it has written where it stands."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(started.pid, signal.SIGUSR1)
        time.sleep(0.5)
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _tail(log: Path, count: int) -> Any:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-count:]
    return (lines[0][:300] if lines else "nothing was printed") if count == 1 else lines


def _said(error: BaseException) -> str:
    """The class and the first line of an error, the hint of one of ours too."""
    text = str(error).strip().splitlines()
    hint = getattr(error, "hint", None)
    return f"{type(error).__name__}: {text[0][:400] if text else ''}" + (f" ({str(hint)[:300]})" if hint else "")


def short(entry: Mapping[str, Any]) -> str:
    """A row in a line of the log."""
    if "error" in entry:
        return f"FAILED {entry['error']}"
    plain = {k: v for k, v in entry.items() if isinstance(v, (int, float, str, bool)) and k != "row"}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items())[:400]
