"""Time and memory of `gkd check` as a whole process, speed of the parser, and time of imports.

Every command runs in a process of its own, taking turns with the others; time is from the start of the process to its
end, memory is the peak resident size that the kernel reports for it (`wait4`). The specs are the smallest and the
largest that come with the project (by bytes) and a generated one. The first use of a grammar builds a parser and keeps
it in the user's cache; "cold" has an empty cache.

The parser and the checker are also timed in one process, on generated specs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, parser, quartiles, report, spread, table

MODEL = """{{
 "architectures": ["BertForSequenceClassification"], "model_type": "bert", "vocab_size": 30522, "hidden_size": {h},
 "num_hidden_layers": {n}, "num_attention_heads": 12, "intermediate_size": {f}, "max_position_embeddings": 512,
 "type_vocab_size": 2, "pad_token_id": 0
}}
"""


def child(command: list[str], environment: dict[str, str]) -> tuple[float, float, int]:
    """Seconds, peak MiB, exit code."""
    with Path(os.devnull).open("w") as nowhere:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=nowhere, stderr=nowhere, env=environment, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        spent = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    return spent, usage.ru_maxrss / 1024, process.returncode


def shipped() -> tuple[Path, Path]:
    """The smallest and the largest spec of the project."""
    found = sorted((*ROOT.glob("examples/*.gkd"), *ROOT.glob("stdlib_methods/*.gkd")), key=lambda p: p.stat().st_size)
    return found[0], found[-1]


def generate(losses: int) -> str:
    """A spec with that many projections and losses, with comments and blank lines, and a stage for every 20."""
    lines = [
        "gkd 1",
        "",
        "# A generated spec.",
        "",
        'param T: float = 4.0 in 1.0 ..= 20.0 "softmax temperature"',
        "",
        'teacher t = random_init("teacher")',
        'student s = random_init("student")',
        'data rows = csv("rows.csv", text = "text", label = "label")',
        "",
        "loss hard = cross_entropy(s.logits, batch.labels)",
        "loss soft = kl(s.logits <- t.logits, temperature = T)",
    ]
    for n in range(losses):
        i = n % 4
        lines += [
            "",
            f"# term {n}",
            f"project W_{n} = linear(s.H -> t.H)",
            f"loss hid_{n} = mse(s.layer[{i}].out |> W_{n} <- t.layer[{3 * i + 2}].out)",
        ]
    for first in range(0, losses, 20):
        lines += [
            "",
            f"stage part_{first // 20} for 3 epochs {{",
            "  source = rows",
            "  minimize 0.3 * hard + 0.7 * soft",
        ]
        lines += [f"    + ramp(0 -> 1, until = 10%) * hid_{n}" for n in range(first, min(losses, first + 20))]
        lines += ["  optim = adamw(lr = 5e-5, warmup = 6%)", "}"]
    lines.append("")
    return "\n".join(lines)


def write_models(folder: Path) -> None:
    """Configs of the generated spec's models; no weights."""
    for name, n, h, f in (("teacher", 12, 768, 3072), ("student", 4, 312, 1200)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(MODEL.format(n=n, h=h, f=f))
    (folder / "rows.csv").write_text("text,label\na,0\nb,1\n")


def processes(options: Any, folder: Path) -> tuple[str, dict[str, Any]]:
    python = sys.executable
    gkd = [python, "-c", "from gkd_dsl.cli.main import main; main()", "check"]
    smallest, largest = shipped()
    generated = folder / "generated.gkd"
    generated.write_text(generate(100))
    lines = {path: len(path.read_text().splitlines()) for path in (smallest, largest, generated)}
    warm = dict(os.environ, HF_HUB_OFFLINE="1", XDG_CACHE_HOME=str(folder / "cache"))
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "python -c pass": ([python, "-c", "pass"], warm),
        "import gkd_dsl": ([python, "-c", "import gkd_dsl"], warm),
        "import lark, networkx, typer, rich, pydantic, huggingface_hub": (
            [python, "-c", "import lark, networkx, typer, rich, pydantic, huggingface_hub"],
            warm,
        ),
        "import torch": ([python, "-c", "import torch"], warm),
        "import torch; from transformers import AutoModel": (
            [python, "-c", "import torch; from transformers import AutoModel"],
            warm,
        ),
        f"gkd check {smallest.relative_to(ROOT)} ({lines[smallest]} lines)": ([*gkd, str(smallest)], warm),
        f"gkd check {largest.relative_to(ROOT)} ({lines[largest]} lines)": ([*gkd, str(largest)], warm),
        f"gkd check of a generated spec ({lines[generated]} lines, 102 losses)": ([*gkd, str(generated)], warm),
    }
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
    names = list(commands)
    for number in range(options.rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            result = child(*commands[name])
            assert result[2] == 0, f"{name} ended with {result[2]}"
            if number:
                found[name].append(result)
    cold = f"gkd check {largest.relative_to(ROOT)}, no parser in the cache"
    found[cold] = []
    for number in range(max(3, options.rounds // 3)):
        empty = dict(warm, XDG_CACHE_HOME=str(folder / f"cold{number}"))
        found[cold].append(child([*gkd, str(largest)], empty))
    rows, data = [], {}
    for name, results in found.items():
        seconds, memory = quartiles([r[0] for r in results]), quartiles([r[1] for r in results])
        rows.append(
            [f"`{name}`" if name.startswith(("import", "python")) else name, spread(seconds), f"{memory['median']:.0f}"]
        )
        data[name] = {"seconds": seconds, "peak_mib": memory, "runs": results}
    return table(["process", "seconds", "peak MiB"], rows), data


def in_process(options: Any, folder: Path) -> tuple[str, dict[str, Any]]:
    from gkd_dsl.meaning.check import check_path
    from gkd_dsl.syntax import parse
    from gkd_dsl.text import Source

    assert "torch" not in sys.modules
    assert "transformers" not in sys.modules
    parse(Source("warm", generate(1)))
    rows, data = [], {}
    for losses in (10, 100) if options.quick else (10, 100, 1000):
        text = generate(losses)
        path = folder / f"generated_{losses}.gkd"
        path.write_text(text)
        lines = len(text.splitlines())
        parsing, checking = [], []
        for _ in range(options.rounds if losses < 1000 else max(3, options.rounds // 5)):
            start = time.perf_counter()
            _, diagnostics = parse(Source("generated", text))
            parsing.append(time.perf_counter() - start)
            assert diagnostics.ok
            start = time.perf_counter()
            assert check_path(path).ok
            checking.append(time.perf_counter() - start)
        parsed, checked = quartiles(parsing), quartiles(checking)
        rows.append(
            [
                lines,
                losses + 2,
                spread(parsed, 4),
                f"{lines / parsed['median']:.0f}",
                spread(checked, 4),
                f"{lines / checked['median']:.0f}",
            ]
        )
        data[str(lines)] = {"parse_seconds": parsed, "check_seconds": checked}
    header = [
        "lines",
        "losses",
        "parse, s",
        "parsed lines a second",
        "check (parsing included), s",
        "checked lines a second",
    ]
    return table(header, rows), data


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=15)
    options = made.parse_args()
    if options.quick:
        options.rounds = 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        whole, data = processes(options, folder)
        parts, more = in_process(options, folder)
    body = f"## Whole processes\n\n{whole}\n\n## In one process\n\n{parts}\n\nMedian and quartiles."
    settings = {"repeats": f"{options.rounds} of each process after one, taking turns"}
    report(
        "check_speed",
        options.out,
        "Time of a check",
        settings,
        body,
        {"processes": data, "in_process": more},
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
