"""Planted mistakes: when does each tool find them, and what does it say?

Each mistake is written for gkd-dsl, TextBrewer and ModelOpt, as a user of the tool would make it, on tiny BERT models
that are saved to a folder with their tokenizers. A run goes through the phases of a script, and the first exception
ends it:

  configuration   config objects and criteria, made before any model is loaded (the best case for the tool)
  loading         `from_pretrained` of both models
  set-up          `GeneralDistiller(...)`, `mtd.convert(...)`
  data            reading and tokenising the rows
  step n          training; without an exception in 20 steps the mistake is not found

Times of TextBrewer and ModelOpt are from the first line after the imports to the exception. Imports come on top, and
loading is quick only because the models are tiny. The time of gkd-dsl is that of `gkd check` as a whole process.
The first row is a control without a mistake: all must take it. The last rows are mistakes of judgement that are legal.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, parser, report, table
from mistake_scripts import Found, Script, attempt, modelopt, textbrewer, write

PAGE = ROOT / "docs" / "compare-mistakes.md"

HEAD = """gkd 1

teacher t = hf("{teacher}"{teacher_options})
student s = hf("{student}"{student_options})
data rows = {data}

{body}

stage main for 3 epochs {{
  source = rows
  {minimize}
  {stage}
}}
"""
CSV = 'csv("rows.csv", text = "text", label = "label")'


@dataclass
class Mistake:
    """A mistake: the changes to the control, in a spec and in the scripts."""

    title: str
    spec: str
    script: Script
    modelopt: Script | None = None
    say: str = ""


def spec(
    body: str = "loss soft = kl(s.logits <- t.logits, temperature = 4.0)",
    minimize: str = "minimize soft",
    stage: str = "optim = adamw(lr = 1e-4)",
    data: str = CSV,
    **names: str,
) -> str:
    """A spec from its changing parts."""
    parts = {"teacher": "teacher", "student": "student", "teacher_options": "", "student_options": ""} | names
    return HEAD.format(body=body, minimize=minimize, stage=stage, data=data, **parts)


def hidden(student: int, teacher: int, **more: Any) -> dict[str, Any]:
    match = {
        "layer_S": student,
        "layer_T": teacher,
        "feature": "hidden",
        "loss": "hidden_mse",
        "weight": 1,
        "proj": ["linear", 24, 32],
    }
    return match | more


def pair(student: str, teacher: str, make: str = "hidden") -> Callable[[Any], dict[tuple[str, str], Any]]:
    return lambda tools: {(student, teacher): getattr(tools, make)()}


def mistakes() -> list[Mistake]:
    """The control, what can be found before a model is loaded, and what is legal."""
    block = "bert.encoder.layer.{}".format
    project = "project W = linear(s.H -> t.H)\n"
    attention = "loss att = mse(s.layer[1].attn.probs <- t.layer[3].attn.probs)"
    match = {"layer_S": 1, "layer_T": 3, "feature": "attention", "loss": "attention_mse", "weight": 1}
    inner = ("bert.encoder.layer.1.attention.self", "bert.encoder.layer.3.attention.self")
    mapped = project + "loss hid = mse(s.layer[1].out |> W <- t.layer[3].out)"
    return [
        Mistake(
            "none (control)",
            spec(mapped, "minimize hid"),
            Script(matches=[hidden(2, 4)], criterion=pair(block(1), block(3))),
        ),
        Mistake(
            "a layer that the student does not have",
            spec(project + "loss hid = mse(s.layer[2].out |> W <- t.layer[3].out)", "minimize hid"),
            Script(matches=[hidden(3, 4)], criterion=pair(block(2), block(3))),
        ),
        Mistake(
            "hidden sizes 24 and 32, no projection",
            spec("loss hid = mse(s.layer[1].out <- t.layer[3].out)", "minimize hid"),
            Script(matches=[hidden(2, 4, proj=None)], criterion=pair(block(1), block(3), "plain")),
        ),
        Mistake(
            "attention maps of 2 and 4 heads",
            spec(attention, "minimize att"),
            Script(matches=[match], criterion=pair(*inner, "maps"), eager=True),
        ),
        Mistake(
            "vocabularies of 60 and 64 (padded)",
            spec(teacher="teacher_mlm", student="student_mlm", data='text("lines.txt")'),
            Script(teacher="teacher_mlm", student="student_mlm", kind="AutoModelForMaskedLM", rows="lines.csv"),
        ),
        Mistake(
            "tokenizers that give other ids, vocabularies of one size",
            spec(teacher="other_tokenizer"),
            Script(teacher="other_tokenizer"),
        ),
        Mistake(
            "a teacher with 1 class, a student with 2", spec(teacher_options=", num_labels = 1"), Script(labels=(1, 2))
        ),
        Mistake(
            "a teacher with 3 classes, a student with 2",
            spec(teacher_options=", num_labels = 3"),
            Script(labels=(3, 2)),
        ),
        Mistake(
            "labels 0, 1, 2 in the data, 2 classes",
            spec(
                "loss hard = cross_entropy(s.logits, batch.labels)\nloss soft = kl(s.logits <- t.logits)",
                "minimize hard + soft",
                data='csv("three.csv", text = "text", label = "label")',
            ),
            Script(hard=True, rows="three.csv", config={"hard_label_weight": 1}),
        ),
        Mistake(
            "a misspelt tap",
            spec(project + "loss hid = mse(s.layre[1].out |> W <- t.layer[3].out)", "minimize hid"),
            Script(matches=[hidden(2, 4, feature="hiden")], criterion=pair("bert.encoder.layre.1", block(3))),
        ),
        Mistake(
            "a misspelt loss",
            spec(project + "loss hid = msee(s.layer[1].out |> W <- t.layer[3].out)", "minimize hid"),
            Script(matches=[hidden(2, 4, loss="hidden_msee")], criterion=pair(block(1), block(3), "misspelt")),
        ),
        Mistake(
            "a misspelt argument",
            spec("loss soft = kl(s.logits <- t.logits, temprature = 4.0)"),
            Script(config={"temprature": 4.0}, logits={"temprature": 4.0}),
        ),
        Mistake(
            "logits of a model without a head",
            spec(student="headless"),
            Script(student="headless", student_kind="AutoModel"),
        ),
        Mistake(
            "teacher and student the wrong way round",
            spec("loss soft = kl(t.logits <- s.logits)"),
            Script(swapped=True),
        ),
        Mistake(
            "a warm-up of 0.06 where steps belong",
            spec(stage="optim = adamw(lr = 1e-4, warmup = 0.06)"),
            Script(warmup=0.06),
        ),
        Mistake(
            "temperature 0",
            spec("loss soft = kl(s.logits <- t.logits, temperature = 0.0)"),
            Script(config={"temperature": 0.0}, logits={"temperature": 0.0}),
        ),
        Mistake(
            "a column that the data does not have",
            spec(data='csv("rows.csv", text = "sentence", label = "label")'),
            Script(column="sentence"),
        ),
        Mistake(
            "one of two terms reaches nothing that is trained",
            spec(
                "loss soft = kl(s.logits <- t.logits)\nloss emb = mse(s.embed <- t.embed)",
                "minimize soft + emb",
                stage="train s.layer[1]",
                student="twin",
            ),
            Script(
                student="twin",
                matches=[hidden(0, 0, proj=None)],
                train_only="bert.encoder.layer.1",
                criterion=lambda tools: {
                    ("classifier", "classifier"): tools.logits(),
                    ("bert.embeddings", "bert.embeddings"): tools.plain(),
                },
            ),
        ),
        Mistake("a model folder that is not there", spec(teacher="teachr"), Script(teacher="teachr")),
        Mistake(
            "legal: the layers mapped in reverse",
            spec(
                "project W[i] = linear(s.H -> t.H)\nloss hid = sum(mse(s.layer[i].out |> W[i] <- t.layer[j].out) "
                "for (i, j) in [[0, 3], [1, 1]])",
                "minimize hid",
            ),
            Script(
                matches=[hidden(1, 4), hidden(2, 2)],
                criterion=lambda tools: {(block(0), block(3)): tools.hidden(), (block(1), block(1)): tools.hidden()},
            ),
        ),
        Mistake("legal: a learning rate of 0.9 for 0.00009", spec(stage="optim = adamw(lr = 0.9)"), Script(rate=0.9)),
    ]


def check(folder: Path, number: int, text: str) -> Found:
    """`gkd check` on a spec, as a whole process."""
    path = folder / f"mistake_{number}.gkd"
    path.write_text(text)
    command = [sys.executable, "-c", "from gkd_dsl.cli.main import main; main()", "check", path.name]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=dict(os.environ, HF_HUB_OFFLINE="1"))
    spent = time.perf_counter() - start
    said = [line for line in (done.stdout + done.stderr).splitlines() if re.match(r"(error|warning)\[", line)]
    if done.returncode == 0:
        return Found("not found", None, "", said[0] if said else "")
    return Found("check", spent, said[0] if said else (done.stdout + done.stderr).splitlines()[0])


def import_times() -> dict[str, float]:
    """Seconds that the imports of a script take in a process of its own."""
    found = {}
    for name, line in (
        ("TextBrewer", "import torch, textbrewer; from transformers import AutoModel"),
        ("ModelOpt", "import torch, modelopt.torch.distill; from transformers import AutoModel"),
    ):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-W", "ignore", "-c", line], check=True, capture_output=True)
        found[name] = time.perf_counter() - start
    return found


def shown(found: Found) -> str:
    """A cell of the table."""
    if found.when == "not found":
        return "not found" + (f" ({found.note})" if found.note else "")
    says = found.says[:150].replace("|", "\\|")
    quoted = f"`` {says} ``" if "`" in says else f"`{says}`"
    return f"{found.when}, {found.seconds:.2f} s: {quoted}"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--page", type=Path, default=PAGE, help="the page of the documentation to write")
    options = made.parse_args()
    import logging

    import transformers

    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"
    rows, data, results = [], {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for library in ("modelopt.torch.distill", "textbrewer"):
                importlib.import_module(library)
        warm = Script(matches=[hidden(2, 4)], criterion=pair("bert.encoder.layer.1", "bert.encoder.layer.3"))
        for tool in (textbrewer, modelopt):
            control = attempt(tool, folder, warm)
            assert control.when == "not found", control
        check(folder, 0, spec())
        for number, mistake in enumerate(mistakes()):
            found = (
                check(folder, number, mistake.spec),
                attempt(textbrewer, folder, mistake.script),
                attempt(modelopt, folder, mistake.modelopt or mistake.script),
            )
            print(mistake.title, "|", " | ".join(shown(f) for f in found), flush=True)
            results.append((mistake, found))
            rows.append([mistake.title, *(shown(f) for f in found)])
            data[mistake.title] = {
                t: vars(f) for t, f in zip(("gkd-dsl", "TextBrewer", "ModelOpt"), found, strict=True)
            }
        assert all(f.when == "not found" for f in results[0][1]), results[0][1]
    imports = import_times()
    count = [m for m, _ in results if m.title != "none (control)" and not m.title.startswith("legal")]
    planted = [f for m, f in results if m in count]
    totals = []
    for index, tool_name in enumerate(("gkd-dsl", "TextBrewer", "ModelOpt")):
        when = [f[index].when for f in planted]
        totals.append(
            [
                tool_name,
                sum(w in ("check", "configuration") for w in when),
                sum(w in ("loading", "set-up", "data") for w in when),
                sum(w.startswith("step") for w in when),
                sum(w == "not found" for w in when),
            ]
        )
    header = [
        "tool",
        "before a model is loaded",
        "while loading, setting up, reading data",
        "in a training step",
        "not found",
    ]
    summary = table(header, totals)
    full = table(["mistake", "gkd-dsl: `gkd check`", "TextBrewer", "ModelOpt"], rows)
    notes = (
        f"Of {len(count)} planted mistakes. Imports take TextBrewer {imports['TextBrewer']:.1f} s and ModelOpt "
        f"{imports['ModelOpt']:.1f} s more, which is not in their times; that of gkd-dsl is of a whole process."
    )
    settings = {
        "models": "BERT, 4 x 32 and 2 x 24, saved to a folder; `not found` means 20 steps without an exception",
        "seed": 0,
        "repeats": 1,
    }
    body = f"## Count\n\n{summary}\n\n{notes}\n\n## Each\n\n{full}"
    data = {"cases": data, "counts": totals, "import_seconds": imports}
    report("mistakes", options.out, "Planted mistakes", settings, body, data, quick=options.quick)
    if not options.quick:
        options.page.write_text(page(summary, notes, full), encoding="utf-8")
        print(f"wrote {options.page}")


def page(summary: str, notes: str, full: str) -> str:
    """The page of the documentation."""
    where = (
        json.loads((ROOT / "benchmarks" / "results" / "mistakes.json").read_text())["machine"]["date"]
        if (ROOT / "benchmarks" / "results" / "mistakes.json").exists()
        else ""
    )
    return f"""# Where mistakes are found

The same mistakes, planted in a spec and in scripts for TextBrewer and ModelOpt: two tools that match hidden states of
transformers models and install beside current releases of torch. TRL is not in the table, since it compares logits
only. Written by `benchmarks/mistakes.py` ({where}); the scripts are beside it, in `mistake_scripts.py`.

{summary}

{notes}

## How to read it

- **configuration** is before any model is loaded. The scripts make config objects first, which is the best case for
  those tools.
- **loading** is `from_pretrained`, **set-up** the making of the distiller: both models are in memory by then. With
  models of this size that takes a fraction of a second; with real ones it takes what loading them takes.
- **step n** is inside training: models loaded, data read and tokenised.
- **not found**: 20 steps ran without an exception. The number is the loss at the end.

## What the others do find

Both tools are Python libraries, so Python finds an argument that does not exist, and a function that does not exist,
at the line that names it. TextBrewer checks the name of a feature in its config, without saying which one is wrong,
but looks a loss up by name only in the first step. ModelOpt resolves module names when it converts the student, so a
misspelt or missing module is an error then, with the name. A shape that does not fit ends the first step of both with
torch's own message, which names two sizes and no layer. A missing folder is transformers' error in both, a missing
column Python's.

What neither finds are mistakes that tensors can bear: a teacher with one class broadcasts against any student,
tokenizers that differ give ids that are all legal, a term without a gradient is a number like any other, and a model
on the wrong side is still a model.

## What gkd-dsl does not find

The rows marked legal. A map that pairs the wrong layers, or a learning rate that is merely far too large, is a valid
spec; so is a data file whose labels are wrong. `gkd explain` prints the map and the weights for a person to look at.
A check reads configs, tokenizer files and data files, not weights: a checkpoint whose tensors differ from its config
is found when it is loaded.

## All of them

{full}
"""


if __name__ == "__main__":
    main()
