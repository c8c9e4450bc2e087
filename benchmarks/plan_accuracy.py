"""What `gkd plan` says of memory, beside the memory that a step takes.

Each spec is checked and planned from its configs; then its models are made with random weights, one step is run so that
the optimiser's state is there, and the second is measured. On the CPU the bytes of all tensors that live before it are
counted, and the allocations of the profiler on top; with `--device cuda` it is the peak that torch's allocator reports.
One row of every batch is shorter than the others, so that there is padding.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import parser, report, table
from methods_table_cost import living, most
from transformers import PreTrainedModel

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.passes.sparse import sparse
from gkd_dsl.graph.plan import ForwardPlan, StagePlan
from gkd_dsl.graph.stored import sparse_keys
from gkd_dsl.meaning.check import check_path
from gkd_dsl.planning.estimate import estimate_stage
from gkd_dsl.planning.layout import Setup
from gkd_dsl.planning.machine import Machine
from gkd_dsl.planning.units import in_bytes
from gkd_dsl.runtime.backends.local import LocalBackend
from gkd_dsl.runtime.backends.make import make_backend
from gkd_dsl.runtime.models.halved import untrained
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.step import StepModule, make_projections
from gkd_dsl.runtime.teachers.base import TeacherSource
from gkd_dsl.runtime.teachers.live import LiveTeachers
from gkd_dsl.runtime.teachers.make import Placement, layout_of
from gkd_dsl.runtime.teachers.parts import Layout
from gkd_dsl.runtime.teachers.streamed import StreamedTeachers, in_host_memory
from gkd_dsl.schedules import Clock

GOAL = 0.10


@dataclass(frozen=True)
class Size:
    """Sizes of the models; the teacher is twice as deep and wide as the student. `fewer` halves the rows."""

    width: int = 192
    layers: int = 3
    heads: int = 6
    words: int = 8000
    fewer: bool = False


USUAL = Size()
MINIATURE = Size(96, heads=12, words=2000, fewer=True)
# Of so much that the workspace of cuBLAS and the rounding of the allocator are little beside it.
GPU = Size(768, 6, 12, 32000)


@dataclass(frozen=True)
class Case:
    """A spec: its models, its losses or a method of the library, a micro-batch, how it is run."""

    name: str
    family: str
    losses: Mapping[str, str]
    rows: int = 8
    length: int = 128
    accumulate: int = 1
    runtime: str = ""
    teachers: int = 1
    task: str = "classification"
    projects: bool = False
    method: str = ""
    placement: str = "resident"


HIDDEN = "mean(mse(s.layer[i].out |> W <- t.layer[j].out) for (i, j) in uniform(s.layer, t.layer))"
ATTENTION = (
    "mean(attention_kl(s.layer[i].attn.scores <- t.layer[j].attn.scores) for (i, j) in uniform(s.layer, t.layer))"
)
SOFT = {"hard": "cross_entropy(s.logits, batch.labels)", "soft": "kl(s.logits <- t.logits, temperature = 2.0)"}
NAIVE = "fuse_logits = off"
CASES = (
    Case("BERT, logits", "bert", SOFT),
    Case("BERT, hidden taps", "bert", {**SOFT, "hid": HIDDEN}, projects=True),
    Case("BERT, attention taps", "bert", {**SOFT, "attn": ATTENTION}),
    Case("BERT, hidden taps, checkpointing", "bert", {"hid": HIDDEN}, 16, runtime="checkpoint = true", projects=True),
    Case("BERT, 32 x 64 tokens, two micro-batches", "bert", SOFT, 32, 64, accumulate=2),
    Case("BERT, 4 x 384 tokens", "bert", SOFT, 4, 384),
    Case("BERT, two teachers", "bert", {**SOFT, "two": "kl(s.logits <- t1.logits)"}, teachers=2),
    Case("DistilBERT, masked tokens", "distilbert", SOFT, 8, 96, task="masked_lm", runtime=NAIVE),
    Case("GPT-2, next token", "gpt2", SOFT, 4, task="causal_lm", runtime=NAIVE),
    Case("Llama, next token", "llama", SOFT, 4, task="causal_lm", runtime=NAIVE),
    Case("Llama, generalized JSD", "llama", {"soft": "jsd(s.logits <- t.logits)"}, 4, task="causal_lm", runtime=NAIVE),
    Case("Llama, next token, bf16", "llama", SOFT, 4, runtime=f"{NAIVE}\n  precision = bf16", task="causal_lm"),
    Case("RoBERTa, masked tokens, fused", "roberta", SOFT, task="masked_lm"),
    Case("MobileBERT, logits", "mobilebert", SOFT),
    Case("Qwen3, logits", "qwen3", SOFT),
    Case("GPT-2, logits, bf16", "gpt2", SOFT, runtime="precision = bf16"),
    Case("MiniLMv2", "bert", {}, method="minilmv2"),
    Case("MGSKD", "bert", {}, method="mgskd"),
    Case("CKD", "bert", {}, method="ckd"),
    Case("LRC-BERT", "bert", {}, method="lrc_bert"),
    Case("BERT, hidden taps, offload", "bert", {**SOFT, "hid": HIDDEN}, projects=True, placement="offload"),
    Case("Llama, next token, cached", "llama", SOFT, 8, task="causal_lm", placement="cached"),
    Case("GPT-2, next token, cached", "gpt2", {"soft": SOFT["soft"]}, 4, 256, task="causal_lm", placement="cached"),
    Case("Llama, next token, offload, fused", "llama", SOFT, 8, task="causal_lm", placement="offload"),
    Case("GPT-2, fused", "gpt2", SOFT, 8, task="causal_lm"),
    Case("Llama, fused", "llama", SOFT, 8, 256, task="causal_lm"),
    Case("Llama, fused, hidden taps, checkpointing", "llama", {**SOFT, "hid": HIDDEN}, 4, 256,
         runtime="checkpoint = true", task="causal_lm", projects=True),
    Case("Llama, fused, bf16", "llama", SOFT, 8, 256, runtime="precision = bf16", task="causal_lm"),
)  # fmt: skip


def config(family: str, layers: int, width: int, size: Size) -> dict[str, Any]:
    """A config of a family: `layers` x `width`; teacher and student have as many heads."""
    heads, words = size.heads, size.words
    if family == "distilbert":
        sizes = {"dim": width, "n_layers": layers, "n_heads": heads, "hidden_dim": 4 * width}
    elif family == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads}
    else:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        decoder = family in ("llama", "mistral", "qwen2", "qwen3")
        sizes |= {"intermediate_size": (3 if decoder else 4) * width}
        if decoder:
            sizes |= {"num_key_value_heads": heads // 2, "head_dim": width // heads}
        if family == "mobilebert":
            sizes |= {"embedding_size": 64, "intra_bottleneck_size": 16 * heads, "intermediate_size": width}
    return {"model_type": family, "vocab_size": words, "pad_token_id": 0, **sizes}


def write(case: Case, folder: Path, size: Size) -> Path:
    """The spec and the configs of a case."""
    teachers = ["t", *(f"t{i}" for i in range(1, case.teachers))]
    for name, layers, wide in (
        *((t, 2 * size.layers, 2 * size.width) for t in teachers),
        ("s", size.layers, size.width),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config(case.family, layers, wide, size)))
    head = "num_labels = 3" if case.task == "classification" else f"task = {case.task}"
    lines = ["gkd 1", *(f'teacher {t} = random_init("./{t}", {head})' for t in teachers)]
    lines += [f'student s = random_init("./s", {head})']
    source = 'csv(rows, text = "text", label = "label")' if case.task == "classification" else "text(rows)"
    lines += ['param rows: text "never read: batches are drawn"', f"data d = {source}"]
    lines += ["project W = linear(s.H -> t.H)"] if case.projects else []
    lines += [f"loss {name} = {text}" for name, text in case.losses.items()]
    if case.method:
        lines[1:1] = [f'import "gkd:{case.method}" use {case.method}']
        lines += [f"use {case.method}(t -> s) as m"]
    objective = "m" if case.method else " + ".join(case.losses)
    rows = case.rows // 2 if size.fewer else case.rows
    lines += ["stage main for 1 epochs {", f"  minimize {objective}", f"  batch_size = {rows}"]
    lines += [f"  accumulate = {case.accumulate}", f"  max_length = {case.length}", "}"]
    folder_of = '    cache = "kept"\n' if case.placement == "cached" else ""
    placed = "" if case.placement == "resident" else f"teacher t {{\n    placement = {case.placement}\n{folder_of}  }}"
    lines += ["runtime {", f"  {case.runtime}", f"  {placed}", "}"] if case.runtime or placed else []
    path = folder / "spec.gkd"
    path.write_text("\n".join(lines) + "\n")
    return path


def batches(stage: StagePlan, words: int) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of a step."""
    node, rows, length = stage.stage, stage.stage.batch_size, stage.stage.max_length or 1
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(node.accumulate):
        ids = torch.randint(3, words, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, length - 2 :] = 0
        one_each = all(model.info.task == "classification" for model in stage.models)
        labels = torch.randint(0, 3, (rows,), generator=generator) if one_each else ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found


def measure(case: Case, folder: Path, device: str, size: Size) -> dict[str, Any]:
    """A case planned and run."""
    checked = check_path(write(case, folder, size))
    if not checked.ok:
        raise SystemExit(f"{case.name}: {[d.message for d in checked.diagnostics]}")
    plan = compile_plan(checked.graph, runtime=checked.runtime)
    stage = plan.stages[0]
    kind = "cuda" if device == "cuda" else "cpu"
    planned = estimate_stage(stage, Machine(1, 2**40, 2**40, kind=kind), Setup.of(plan))  # type: ignore[arg-type]
    backend = make_backend(replace(plan, runtime=tuple({**dict(plan.runtime), "device": device}.items())))
    assert isinstance(backend, LocalBackend)
    half = untrained(plan, backend.settings.precision)
    models = {node.name: load(node.info, seed=1, half=half.get(node.name)) for node in stage.models}
    for name, model in models.items():
        if name != "t" or case.placement == "resident":
            backend.place(model)
    # Otherwise this name keeps the last of them.
    del model
    run, teachers = placed(stage, case.placement, models, backend, plan.runtime)
    step = StepModule(run, models, make_projections(stage.projections), teachers)
    backend.begin(step, stage.stage.optim)
    words = next(node.info.size("V") or 8 for node in stage.models)
    made = batches(stage, words)
    backend.step(made, Clock(0, 4, 4.0), 1e-4)
    found = peak(backend, made)
    backend.end()
    # On the CPU the host's memory is the device's.
    total = planned.device_bytes + (planned.host_bytes if device == "cpu" else 0)
    return {
        "case": case.name,
        "planned": total,
        "measured": found,
        "ratio": total / found,
        "parts": dict(planned.device),
        "moment": planned.moment,
    }


def placed(
    stage: StagePlan,
    where: str,
    models: dict[str, PreTrainedModel],
    backend: LocalBackend,
    runtime: Sequence[tuple[str, Any]] = (),
) -> tuple[StagePlan, TeacherSource]:
    """The plan that is run, and where the teacher's taps come from; `t` alone is placed."""
    trained = {target.name for target in stage.stage.trains}
    fixed = [node for node in stage.models if node.name not in trained]
    if where == "resident":
        return stage, LiveTeachers(fixed, models)
    teacher = next(node for node in fixed if node.name == "t")
    if where == "offload":
        return stage, StreamedTeachers(teacher, models["t"], backend.device, in_host_memory)
    if where == "gemini":
        from gkd_dsl.runtime.teachers.gemini import GeminiTeachers

        chunks = {name: value for name, value in runtime if "." not in name}
        return stage, GeminiTeachers(teacher, lambda: models.pop("t"), chunks=chunks)
    layout = layout_of(stage, "t", Placement("cached"))
    live = LiveTeachers([teacher], {"t": backend.place(models.pop("t"))})
    found = sparse_keys(stage, "t", None)
    run = sparse(stage, dict.fromkeys(found, layout.top_k)) if layout.top_k is not None else stage
    return run, Stored(live, layout, stage)


class Stored:
    """A teacher of which only stored outputs are left after the first step, as `gkd cache` would have them."""

    def __init__(self, live: LiveTeachers, layout: Layout, stage: StagePlan) -> None:
        self.live: LiveTeachers | None = live
        self.layout, self.stage, self.parts = layout, stage, {}

    def taps(self, forward: ForwardPlan, inputs: Any, env: Any, changes: Any) -> dict[str, torch.Tensor]:
        """The taps of a forward, from what is stored."""
        if self.live is not None:
            plain = next(found for found in self.stage.forwards if found.model == "t")
            with torch.no_grad():
                values = self.live.taps(plain, inputs, {}, changes)
            self.parts = self.layout.encode({tap.path: values[tap.key] for tap in plain.taps}, inputs["attention_mask"])
            self.live = None
        return self.layout.decode(self.parts, forward, inputs["attention_mask"].device)


def peak(backend: LocalBackend, made: Sequence[dict[str, torch.Tensor]]) -> int:
    """The most bytes while a step runs."""
    gc.collect()
    if backend.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        backend.step(made, Clock(1, 4, 4.0), 1e-4)
        return torch.cuda.max_memory_allocated()
    before = living()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        backend.step(made, Clock(1, 4, 4.0), 1e-4)
    return before + most(seen)


def main() -> None:
    options_ = parser(__doc__)
    options_.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options_.add_argument("--only", help="cases whose name has this word")
    options_.add_argument("--threads", type=int, default=1)
    options = options_.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    for case in CASES:
        if options.only and options.only not in case.name:
            continue
        with TemporaryDirectory() as place:
            size = MINIATURE if options.quick else GPU if options.device == "cuda" else USUAL
            row = measure(case, Path(place), options.device, size)
        gc.collect()
        found.append(row)
        print(f"{row['case']:48} {row['ratio']:.3f}  {row['moment']}  {row['parts']}", flush=True)
    rows = [
        [row["case"], in_bytes(row["planned"]), in_bytes(row["measured"]), f"{row['ratio']:.3f}", row["moment"]]
        for row in found
    ]
    body = table(["spec", "planned", "measured", "planned over measured", "where the plan has its peak"], rows)
    outside = [row["case"] for row in found if abs(row["ratio"] - 1) > GOAL]
    body += f"\n\nWithin 10 %: {len(found) - len(outside)} of {len(found)}."
    if outside:
        body += f" Outside: {'; '.join(outside)}."
    settings = {
        "device": options.device,
        "threads": options.threads,
        "models": "teacher 12 x 1536, student 6 x 768, 32,000 words, random weights"
        if options.device == "cuda" and not options.quick
        else "teacher 6 x 384, student 3 x 192, 8,000 words, random weights"
        if not options.quick
        else "miniature models: a smoke run, not a measurement",
    }
    name = "plan_accuracy" if options.device == "cpu" else f"plan_accuracy_{options.device}"
    report(name, options.out, "Planned memory beside measured memory", settings, body, found, quick=options.quick)


if __name__ == "__main__":
    main()
