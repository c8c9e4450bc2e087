"""What the benchmarks share: models, specs, timing in turn, and the report with its machine and versions."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PACKAGES = (
    "torch",
    "transformers",
    "lark",
    "networkx",
    "typer",
    "pydantic",
    "textbrewer",
    "nvidia-modelopt",
    "trl",
    "nnsight",
    "liger-kernel",
    "colossalai",
    "triton",
)


def parser(doc: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a smoke run; its result file ends in -quick")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return made


def keep_memory() -> None:
    """Start the script again with an allocator that gives nothing back to the system (glibc; elsewhere no change).

    Large temporaries are otherwise mapped and unmapped at every use, and the page faults, which are no one's merit,
    scatter the times of all contestants.
    """
    if "MALLOC_MMAP_MAX_" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def machine() -> dict[str, Any]:
    """CPU, cores, memory, system, date."""
    model = platform.processor() or platform.machine()
    memory = 0.0
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
        model = f"{fields.get('model name', model)} (family {fields.get('cpu family')}, model {fields.get('model')})"
        memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """The installed versions of what is compared."""
    found = {}
    for name in (*PACKAGES, "gkd-dsl"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def in_turn(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    on_round: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; they take turns, the order moving on by one each round."""
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            contestants[name]()
            spent = clock() - start
            if number >= warmup:
                times[name].append(spent)
        if on_round is not None:
            on_round(number)
    return times


def ratios(times: Mapping[str, Sequence[float]], name: str, base: str) -> list[float]:
    """Seconds over those of `base` in the same round."""
    return [a / b for a, b in zip(times[name], times[base], strict=True)]


def spread(stats: Mapping[str, float], digits: int = 3) -> str:
    """`1.034 (1.021 .. 1.047)`."""
    return f"{stats['median']:.{digits}f} ({stats['q1']:.{digits}f} .. {stats['q3']:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---" for _ in header) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def command() -> str:
    """The command line of the script, without the folder of the results."""
    words = sys.argv[1:]
    while "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def report(
    name: str,
    out: Path,
    title: str,
    settings: Mapping[str, Any],
    body: str,
    data: Any,
    *,
    quick: bool,
    quiet: bool = False,
) -> None:
    """Write `name.md` and `name.json`, and print the first unless `quiet`."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-quick" if quick else name
    where, found = machine(), versions()
    lines = [
        f"# {title}",
        "",
        f"- date: {where['date']}",
        f"- machine: {where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, {where['system']};"
        f" load average at the end {where['load_average']}",
        f"- versions: Python {where['python']}, " + ", ".join(f"{key} {value}" for key, value in found.items()),
        *(f"- {key}: {value}" for key, value in settings.items()),
        f"- command: `{command()}`",
        "",
        body.strip(),
        "",
    ]
    text = "\n".join(lines)
    (out / f"{stem}.md").write_text(text, encoding="utf-8")
    record = {"machine": where, "versions": found, "settings": dict(settings), "data": data}
    (out / f"{stem}.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    if not quiet:
        print(text)
        print(f"wrote {out / stem}.md and .json")
