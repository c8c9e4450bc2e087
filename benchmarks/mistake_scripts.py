"""The scripts of TextBrewer and ModelOpt that `mistakes.py` plants its mistakes in, and the models that they load."""

from __future__ import annotations

import csv
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 20


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
