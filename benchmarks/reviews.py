"""Reviews: a fine-tuned teacher, its distilled student, and the same student trained without a teacher.

Runs `examples/reviews.gkd` on a labelled file, for each seed twice: as it stands, and with the weights of all terms
that read the teacher set to 0 (same steps, same seed, same start). Writes `benchmarks/results/reviews.md` and
`.json`: held-out accuracy of the three by seed, mean and spread, and agreement with the teacher.

    python benchmarks/reviews.py --data reviews.tsv
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from common import machine as describe_machine

import gkd_dsl

HERE = Path(__file__).resolve().parent
SPEC = HERE.parent / "examples" / "reviews.gkd"
ALONE = {"soft_weight": 0.0, "inner_weight": 0.0}


def one(data: Path, seed: int, extra: dict[str, float], folder: Path) -> dict[str, float]:
    """The metrics of the last stage of one run."""
    started = time.perf_counter()
    spec = gkd_dsl.load(SPEC, params={"data": str(data), "seed": seed, **extra})
    outcome = spec.run(out=folder, measure=False)
    found = dict(outcome.metrics["distil"])
    found["seconds"] = time.perf_counter() - started
    return found


def main() -> None:
    """Run, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a tab-separated file of id, rating, text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            distilled = one(options.data.resolve(), seed, {}, Path(folder) / f"distilled-{seed}")
            alone = one(options.data.resolve(), seed, ALONE, Path(folder) / f"alone-{seed}")
            row = {
                "seed": seed,
                "teacher": distilled["teacher_accuracy"],
                "distilled": distilled["student_accuracy"],
                "alone": alone["student_accuracy"],
                "agreement_distilled": distilled["agreement"],
                "agreement_alone": alone["agreement"],
                "seconds": distilled["seconds"] + alone["seconds"],
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    machine = device()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "reviews.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (options.out / "reviews.md").write_text(table(rows, machine, options.data.name))


def device() -> dict[str, object]:
    """The machine, with its GPU where one is used, and the versions that matter."""
    import torch
    import transformers

    found: dict[str, object] = {
        **describe_machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    found["device"] = (
        torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    )
    return found


def table(rows: list[dict[str, float]], machine: dict[str, object], data: str) -> str:
    """The results as a page."""
    names = ("teacher", "distilled", "alone", "agreement_distilled", "agreement_alone")
    titles = ("teacher", "distilled student", "student alone", "agreement, distilled", "agreement, alone")
    lines = ["# Reviews: teacher, distilled student, student without a teacher", ""]
    lines += [f"{key}: {value}  " for key, value in machine.items()]
    lines += [f"data: {data}, held-out share 20 %  ", "spec: `examples/reviews.gkd`  "]
    lines += ["alone: the same spec with `soft_weight = 0` and `inner_weight = 0`  ", ""]
    lines += [f"| seed | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for row in rows:
        lines.append(f"| {row['seed']:.0f} | " + " | ".join(f"{100 * row[name]:.2f} %" for name in names) + " |")
    means = [statistics.mean(row[name] for row in rows) for name in names]
    spreads = [statistics.stdev(row[name] for row in rows) if len(rows) > 1 else 0.0 for name in names]
    lines.append("| mean | " + " | ".join(f"**{100 * mean:.2f} %**" for mean in means) + " |")
    lines.append("| standard deviation | " + " | ".join(f"{100 * spread:.2f}" for spread in spreads) + " |")
    gains = [100 * (row["distilled"] - row["alone"]) for row in rows]
    lines += [
        "",
        f"Distilled less alone, by seed: {', '.join(f'{gain:+.2f}' for gain in gains)} points "
        f"(mean {statistics.mean(gains):+.2f}).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
