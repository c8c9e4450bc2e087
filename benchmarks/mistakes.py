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

import csv
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, parser, report, table

STEPS = 20
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
class Script:
    """What a mistake changes in the scripts; the rest is as in the control."""

    teacher: str = "teacher"
    student: str = "student"
    labels: tuple[int, int] = (2, 2)
    kind: str = "AutoModelForSequenceClassification"
    student_kind: str | None = None
    matches: list[dict[str, Any]] = field(default_factory=list)
    criterion: Callable[[Any], dict[tuple[str, str], Any]] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    logits: dict[str, Any] = field(default_factory=dict)
    eager: bool = False
    swapped: bool = False
    warmup: float = 0
    rate: float = 1e-4
    column: str = "text"
    hard: bool = False
    rows: str = "rows.csv"
    train_only: str | None = None


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


# ---- models and data ------------------------------------------------------------------------------------------------

WORDS = (
    *("a", "the", "film", "plot", "cast", "is", "it", "and", "warm", "funny", "dull", "great"),
    *("good", "bad", "too", "long", "was", "old", "new", "well", "made"),
)


def write(folder: Path) -> None:
    """Tiny models with their tokenizers, and rows."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, BertTokenizer

    torch.manual_seed(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

    def save(
        name: str, kind: Any, layers: int, hidden: int, heads: int, vocabulary: int = 64, turned: bool = False
    ) -> None:
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=2 * hidden,
            max_position_embeddings=64,
        )
        kind(config).save_pretrained(folder / name)
        words = [*special, *(WORDS[::-1] if turned else WORDS)]
        (folder / name / "vocab.txt").write_text("\n".join(words) + "\n")
        BertTokenizer(str(folder / name / "vocab.txt")).save_pretrained(folder / name)

    save("teacher", BertForSequenceClassification, 4, 32, 4)
    save("student", BertForSequenceClassification, 2, 24, 2)
    save("twin", BertForSequenceClassification, 2, 32, 4)
    save("other_tokenizer", BertForSequenceClassification, 4, 32, 4, turned=True)
    save("headless", BertModel, 2, 24, 2)
    save("teacher_mlm", BertForMaskedLM, 4, 32, 4, 64)
    save("student_mlm", BertForMaskedLM, 2, 24, 2, 60)
    texts = [f"{a} {b} {c}" for a in WORDS[:2] for b in WORDS[2:5] for c in WORDS[8:12]]
    (folder / "lines.txt").write_text("\n".join(texts) + "\n")
    for name, classes in (("rows", 2), ("three", 3), ("lines", 2)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows((text, n % classes) for n, text in enumerate(texts))


# ---- the scripts of the other tools ---------------------------------------------------------------------------------


@dataclass
class Found:
    """When a mistake was found, after how many seconds, and the first line of what was said."""

    when: str
    seconds: float | None = None
    says: str = ""
    note: str = ""


class Tools:
    """Criteria for ModelOpt."""

    def __init__(self, logits: dict[str, Any]) -> None:
        self._logits = logits

    def logits(self) -> Any:
        import modelopt.torch.distill as mtd

        return mtd.LogitsDistillationLoss(**({"temperature": 4.0, "reduction": "batchmean"} | self._logits))

    def plain(self) -> Any:
        return _criterion(None)

    def hidden(self) -> Any:
        import torch

        return _criterion(torch.nn.Linear(24, 32))

    def maps(self) -> Any:
        return _criterion(None, 1)

    def misspelt(self) -> Any:
        import torch

        return torch.nn.MSELos()  # type: ignore[attr-defined]


def _criterion(projection: Any, element: int = 0) -> Any:
    import torch
    from torch.nn.modules.loss import _Loss

    class MSE(_Loss):
        def __init__(self) -> None:
            super().__init__()
            self.projection = projection if projection is not None else torch.nn.Identity()

        def forward(self, student: Any, teacher: Any) -> Any:
            s, t = (v if isinstance(v, torch.Tensor) else v[element] for v in (student, teacher))
            return torch.nn.functional.mse_loss(self.projection(s), t)

    return MSE()


class Run:
    """The phases of a script, timed."""

    def __init__(self, folder: Path, script: Script) -> None:
        self.folder, self.script = folder, script
        self.phase = "configuration"

    def models(self) -> tuple[Any, Any]:
        import transformers

        self.phase = "loading"
        script = self.script
        found = []
        for name, kind, labels in (
            (script.teacher, script.kind, script.labels[0]),
            (script.student, script.student_kind or script.kind, script.labels[1]),
        ):
            options: dict[str, Any] = {"ignore_mismatched_sizes": True}
            if kind == "AutoModelForSequenceClassification":
                options["num_labels"] = labels
            if script.eager:
                options["attn_implementation"] = "eager"
            found.append(getattr(transformers, kind).from_pretrained(str(self.folder / name), **options))
        teacher, student = found
        if script.train_only is not None:
            student.requires_grad_(False)
            student.get_submodule(script.train_only).requires_grad_(True)
        return teacher, student

    def batches(self, labels: bool) -> list[dict[str, Any]]:
        import torch
        from transformers import AutoTokenizer

        self.phase = "data"
        tokenizer = AutoTokenizer.from_pretrained(str(self.folder / self.script.student))
        with (self.folder / self.script.rows).open(newline="") as file:
            rows = list(csv.DictReader(file))
        texts = [row[self.script.column] for row in rows]
        batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        if labels:
            batch["labels"] = torch.tensor([int(row["label"]) for row in rows])
        return [batch] * STEPS

    def schedule(self, optimizer: Any) -> Any:
        from transformers import get_linear_schedule_with_warmup

        return get_linear_schedule_with_warmup(optimizer, self.script.warmup, STEPS)


def textbrewer(run: Run) -> float:
    import textbrewer as tb
    import torch
    from transformers import get_linear_schedule_with_warmup

    script = run.script
    config = tb.DistillationConfig(**({"temperature": 4.0, "intermediate_matches": script.matches} | script.config))
    teacher, student = run.models()
    run.phase = "set-up"

    def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
        # A user who matches hidden states only gives no logits.
        found = {"hidden": outputs.hidden_states}
        if script.eager:
            return found | {"attention": outputs.attentions}
        if not script.matches or script.train_only is not None:
            found["logits"] = outputs.logits
        if script.hard:
            found["losses"] = outputs.loss
        return found

    sides = (student, teacher) if script.swapped else (teacher, student)
    with tempfile.TemporaryDirectory() as output:
        distiller = tb.GeneralDistiller(
            tb.TrainingConfig(device="cpu", output_dir=output, ckpt_steps=10**6), config, *sides, adaptor, adaptor
        )
        optimizer = torch.optim.AdamW(student.parameters(), lr=script.rate)
        batches = run.batches(labels=script.hard)
        last = [0.0]

        def watch(batch: Any) -> Any:
            run.phase = f"step {len(seen) + 1}"
            seen.append(1)
            return batch

        seen: list[int] = []
        write_loss = distiller.write_loss

        def keep(total: Any, *rest: Any) -> None:
            last[0] = float(total.detach())
            write_loss(total, *rest)

        distiller.write_loss = keep
        asked = {"output_hidden_states": True} | ({"output_attentions": True} if script.eager else {})
        with distiller:
            distiller.train(
                optimizer,
                batches,
                num_steps=STEPS,
                batch_postprocessor=watch,
                callback=None,
                scheduler_class=get_linear_schedule_with_warmup,
                scheduler_args={"num_warmup_steps": script.warmup, "num_training_steps": STEPS},
                **asked,
            )
    return last[0]


def modelopt(run: Run) -> float:
    import modelopt.torch.distill as mtd
    import torch

    class Sum(mtd.DistillationLossBalancer):
        def forward(self, losses: dict[str, Any]) -> Any:
            return sum(losses.values())

    script, tools = run.script, Tools(run.script.logits)
    criterion = script.criterion(tools) if script.criterion is not None else tools.logits()
    several = isinstance(criterion, dict) or script.hard
    if not isinstance(criterion, dict) and script.student_kind is None:
        criterion = (
            {("classifier", "classifier"): criterion}
            if "MLM" not in script.kind and "Masked" not in script.kind
            else {("cls", "cls"): criterion}
        )
    teacher, student = run.models()
    run.phase = "set-up"
    if script.swapped:
        teacher, student = student, teacher
    mode = ("kd_loss", {"teacher_model": teacher, "criterion": criterion, "loss_balancer": Sum() if several else None})
    model = mtd.convert(student, mode=[mode])
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad] if not script.swapped else list(teacher.parameters())
    optimizer = torch.optim.AdamW(trained, lr=script.rate)
    batches = run.batches(labels=script.hard)
    scheduler = run.schedule(optimizer)
    last = 0.0
    for number, batch in enumerate(batches):
        run.phase = f"step {number + 1}"
        outputs = model(**batch)
        loss = model.compute_kd_loss(student_loss=outputs.loss if script.hard else None)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        last = float(loss.detach())
    return last


def attempt(tool: Callable[[Run], float], folder: Path, script: Script) -> Found:
    """Run a script up to its first exception."""
    import torch

    torch.manual_seed(0)
    run = Run(folder, script)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            last = tool(run)
        except Exception as error:  # what a user would see, whatever it is
            spent = time.perf_counter() - start
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), "(no message)")
            line = line.replace(f"{folder}/", "")
            return Found(run.phase, spent, f"{type(error).__name__}: {line}")
    said = [str(w.message).splitlines()[0] for w in heard if "target size" in str(w.message)]
    return Found(
        "not found", None, "", f"loss {last:.4g} after {STEPS} steps" + (f"; warns: {said[0][:90]}" if said else "")
    )


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
only. Written by `benchmarks/mistakes.py` ({where}); the scripts are in that file.

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
