"""Epochs with the teacher in memory beside epochs from its stored outputs, read from disk.

A BERT-base teacher (12 x 768, random weights), a 4 x 312 student, texts of 128 tokens, fp32, dropout off. The objective
is KL over 3 classes and four MSE terms through projections, from the ends of the student's layers to those of every
third layer of the teacher. Both are whole runs of the same spec, the second with `placement = cached`.

First the losses of the same steps are asserted equal: what hangs on whole logits to rounding, features to that of bf16.
Then the two take turns, an epoch each. The stored one opens its folder anew for each epoch, after the system was asked
to let go of the files, so that each of its epochs reads them from the disk and compares their checksums.
"""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import torch
from common import in_turn, keep_memory, parser, quartiles, ratios, report, spread, table
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from gkd_dsl.graph.plan import StagePlan
from gkd_dsl.meaning.check import check_path
from gkd_dsl.runtime import rng
from gkd_dsl.runtime.backends.base import StepResult
from gkd_dsl.runtime.session import plan_of
from gkd_dsl.runtime.stages import Run
from gkd_dsl.runtime.step import StepModule
from gkd_dsl.runtime.teachers.fill import fill
from gkd_dsl.runtime.teachers.make import Made
from gkd_dsl.schedules import Clock

LENGTH = 128
PAIRS = ((1, 3), (2, 6), (3, 9), (4, 12))
SPEC = """gkd 1
teacher t = hf("teacher")
student s = random_init("student", hidden_dropout_prob = 0.0, attention_probs_dropout_prob = 0.0)
data d = csv("rows.csv", text = "text", label = "label")
project W[i] = linear(s.H -> t.H)
loss soft = kl(s.logits <- t.logits, temperature = 2.0)
HIDDEN
stage main for 3 epochs {
  batch_size = 16
  max_length = 128
  minimize soft + SUM
}
runtime {
  device = cpu
  PLACEMENT
}
"""
CACHED = """teacher t {
    placement = cached
    cache = "stored"
  }"""


def world(folder: Path, rows: int, seed: int, small: bool) -> None:
    """Models, a tokenizer of made-up words, and a table of texts that fill their rows."""
    words = [f"w{number}" for number in range(2000)]
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=LENGTH,
    )  # fmt: skip
    torch.manual_seed(seed)
    teacher, student = ((12, 768, 12), (4, 312, 12)) if not small else ((12, 48, 12), (4, 24, 12))
    for name, (layers, width, heads) in (("teacher", teacher), ("student", student)):
        config = BertConfig(
            vocab_size=len(words) + len(special), hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=4 * width, num_labels=3,
        )  # fmt: skip
        config.architectures = ["BertForSequenceClassification"]
        if name == "teacher":
            BertForSequenceClassification(config).save_pretrained(folder / name)
        else:
            config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    drawn = random.Random(seed)
    lines = [f"{' '.join(drawn.choices(words, k=LENGTH))},{drawn.randint(0, 2)}" for _ in range(rows)]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n")


class Contestant:
    """A spec, one epoch at a time. `reopen` makes the source of the teacher's outputs anew for each."""

    def __init__(self, folder: Path, placement: str, reopen: bool) -> None:
        hidden = "\n".join(f"loss h{i} = mse(s.hidden[{i}] |> W[{i}] <- t.hidden[{j}])" for i, j in PAIRS)
        text = SPEC.replace("HIDDEN", hidden).replace("SUM", " + ".join(f"h{i}" for i, _ in PAIRS))
        path = folder / ("cached.gkd" if reopen else "live.gkd")
        path.write_text(text.replace("PLACEMENT", placement))
        checked = check_path(path)
        assert checked.ok, [d.message for d in checked.diagnostics]
        self.plan, self.folder, self.reopen = plan_of(checked), folder, reopen
        self.number, self.step = 0, 0
        if reopen:
            self.stored = fill(self.plan, root=folder)
        self.run = Run(self.plan, root=folder)
        self.stage: StagePlan = self.plan.stages[0]
        self.run.make_projections(self.stage)
        self.made: Made = self.run.placed(self.stage)
        self.module = StepModule(self.made.plan, self.made.models, self.run.projections, self.made.teachers)
        self.run.backend.begin(self.module, self.stage.stage.optim)
        rng.seed_all(0)

    def epoch(self) -> list[StepResult]:
        """All steps of the next epoch."""
        if self.reopen:
            for item in self.stored:
                forget(item.folder)
            self.made = self.run.placed(self.stage)
            self.module.teachers = self.made.teachers
        found = []
        for batch in self.made.loader.epoch(self.number):
            clock = Clock(self.step, 1000, 100.0, seed=0)
            found.append(self.run.backend.step([batch], clock, 1e-4))
            self.step += 1
        self.number += 1
        return found


def forget(folder: Path) -> None:
    """Ask the system to let go of the pages of these files."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def agree(live: Contestant, stored: Contestant, epochs: int) -> dict[str, float]:
    """The largest relative difference of each loss over the first epochs. Raises AssertionError beyond rounding."""
    worst: dict[str, float] = {}
    first: dict[str, float] = {}
    for _ in range(epochs):
        for a, b in zip(live.epoch(), stored.epoch(), strict=True):
            for name, value in a.terms.items():
                off = abs(b.terms[name] - value) / abs(value)
                first.setdefault(name, off)
                worst[name] = max(worst.get(name, 0.0), off)
    # Before any update the two students are one, and only whole logits separate them: not at all.
    assert first["soft"] < 1e-5, first
    assert max(worst.values()) < 1e-2, worst
    return worst


def main() -> None:
    options_ = parser(__doc__)
    options_.add_argument("--rounds", type=int, default=7, help="timed epochs of each")
    options_.add_argument("--warmup", type=int, default=1)
    options_.add_argument("--rows", type=int, default=48)
    options_.add_argument("--threads", type=int, default=2)
    options_.add_argument("--seed", type=int, default=0)
    options = options_.parse_args()
    if options.quick:
        options.rounds, options.rows = 3, 32
    keep_memory()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="gkd-cached-") as name:
        folder = Path(name)
        os.environ.setdefault("GKD_CACHE", str(folder / "tokens"))
        world(folder, options.rows, options.seed, options.quick)
        live, stored = Contestant(folder, "", False), Contestant(folder, CACHED, True)
        worst = agree(live, stored, 1)
        size = sum(item.bytes for item in stored.stored)
        times = in_turn(
            {"teacher in memory": live.epoch, "from the cache": stored.epoch},
            options.rounds,
            options.warmup,
            lambda n: print(f"round {n}", flush=True),
        )
    base = "teacher in memory"
    rows = [[name, spread(quartiles(times[name])), spread(quartiles(ratios(times, name, base)))] for name in times]
    data = {"times": times, "loss_difference": worst, "bytes": size, "rows": options.rows}
    data["ratio"] = quartiles(ratios(times, "from the cache", base))
    body = table(["", "seconds an epoch", "over the teacher in memory"], rows)
    body += (
        f"\n\nMedian, quartiles; an epoch has {options.rows} texts of {LENGTH} tokens, 16 a step. The stored outputs "
        f"take {size / 2**20:.1f} MiB, {size / options.rows / 2**10:.0f} KiB a text, and each epoch opens them, "
        f"compares their checksums and reads them from the disk. In the first epoch no loss differs by more than "
        f"{max(worst.values()):.0e} of it (soft: {worst['soft']:.0e})."
    )
    settings = {
        "setting": "fp32, dropout off, AdamW; each contestant has its own student; the allocator keeps memory"
        + (" (miniature models: a smoke run, not a measurement)" if options.quick else ""),
        "threads": options.threads,
        "seed": options.seed,
        "repeats": f"{options.rounds} epochs each after {options.warmup + 1}, taking turns",
    }
    report("cached_teacher", options.out, "Epochs from stored outputs", settings, body, data, quick=options.quick)


if __name__ == "__main__":
    main()
