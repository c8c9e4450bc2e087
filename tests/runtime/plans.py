"""Tiny BERT models, data in memory, and plans written by hand."""

from __future__ import annotations

import atexit
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from gkd_dsl.graph.nodes import (
    EvaluateSpec,
    MetricNode,
    ModelNode,
    OptimSpec,
    ProjectNode,
    SourceSpec,
    StageNode,
    TrainTarget,
)
from gkd_dsl.graph.plan import (
    Apply,
    Counted,
    ForwardPlan,
    Free,
    LossPlan,
    MetricPlan,
    Run,
    SpecPlan,
    StagePlan,
    TapPlan,
)
from gkd_dsl.models.describe import describe, random_init
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models.load import load
from gkd_dsl.schedules import Constant, Ramp, Span
from gkd_dsl.types import BATCH, LENGTH, LossType, TensorType

VOCABULARY, CLASSES, HEADS = 37, 3, 4
BASE = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "num_attention_heads": HEADS,
    "intermediate_size": 28,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


@cache
def info(name, dropout=0.1):
    """The student has 2 blocks of 16 features, the teacher 3 of 20."""
    sizes = {"s": (16, 2), "t": (20, 3)}[name]
    folder = Path(mkdtemp(prefix="gkd-tiny-")) / name
    folder.mkdir()
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    config = {**BASE, "hidden_size": sizes[0], "num_hidden_layers": sizes[1]}
    config |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    (folder / "config.json").write_text(json.dumps(config))
    return replace(
        random_init(describe(str(folder)), task="classification", num_labels=CLASSES), location=f"tiny-{name}"
    )


def models(dtype=torch.float32, dropout=0.1, seed=0):
    return {
        "s": load(info("s", dropout), dtype=dtype, seed=seed),
        "t": load(info("t", dropout), dtype=dtype, seed=seed + 1),
    }


def batch(rows=4, length=7, seed=0, lengths=None):
    """Random tokens, padded on the right, with a label per row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    if lengths is None:
        lengths = torch.randint(2, length + 1, (rows,), generator=generator).tolist()
        lengths[0] = length
    mask = (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).long()
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def rows_of(whole, start, end):
    return {name: value[start:end] for name, value in whole.items()}


class Data:
    """A loader over rows in memory."""

    def __init__(self, rows=24, batch_size=4, length=7, seed=0, spoil=None, held=8):
        self.rows = batch(rows, length, seed)
        self.held = batch(held, length, seed + 1) if held else None
        self.batch_size, self.seed, self.spoil = batch_size, seed, spoil

    @property
    def count(self):
        return -(-self.rows["labels"].shape[0] // self.batch_size)

    def steps_per_epoch(self, accumulate=1):
        return -(-self.count // accumulate)

    def epoch(self, epoch, start=0):
        order = torch.randperm(
            self.rows["labels"].shape[0], generator=torch.Generator().manual_seed(1000 * self.seed + epoch)
        )
        for number in range(start, self.count):
            places = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield {name: value[places] for name, value in self.rows.items()}

    def held_out(self):
        if self.held is not None:
            yield rows_of(self.held, 0, 5)
            yield rows_of(self.held, 5, 8)

    @staticmethod
    def tokens(made):
        return int(made["attention_mask"].sum())


def tap(model, path, *dims):
    return TapPlan(f"{model}/{path.key}", path, TensorType("float", dims))


LOSSES = ("hard", "soft", "hid", "att")


def stage_plan(
    losses=LOSSES,
    *,
    name="main",
    order=0,
    weights=None,
    trains=None,
    optim=None,
    duration=None,
    dropout=0.1,
    free=True,
    metrics=(),
    **settings,
):
    """`s` learns from `t`: cross entropy, soft labels at T = 2, a hidden state through W, attention scores."""
    s, t = info("s", dropout), info("t", dropout)
    at = {"logits": TapPath("logits"), "hid_s": TapPath("hidden", 1), "hid_t": TapPath("hidden", 2)}
    at |= {"att_s": TapPath("layer", 1, "attn.scores"), "att_t": TapPath("layer", 2, "attn.scores")}
    heads = [m.dim("A", n) for m, n in ((s, "s"), (t, "t"))]
    taps_s, taps_t = [], []
    valid = [
        Apply(
            "op/valid_tokens.1",
            "valid_tokens",
            (("x", "batch/attention_mask"),),
            (),
            TensorType("bool", (BATCH, LENGTH)),
        )
    ]
    valid.append(
        Apply("op/not_equal.1", "not_equal", (("a", "batch/labels"),), (("b", -100),), TensorType("bool", (BATCH,)))
    )
    ops, counted, named, weight_of = [], [], [], weights or {}
    if {"hard", "soft"} & set(losses):
        taps_s.append(tap("s", at["logits"], BATCH, s.dim("C", "s")))
    if "soft" in losses:
        taps_t.append(tap("t", at["logits"], BATCH, t.dim("C", "t")))
    if "hard" in losses:
        inputs = (("labels", "batch/labels"), ("student", "s/logits"), ("valid", "op/not_equal.1"))
        ops.append(Apply("op/cross_entropy.1", "cross_entropy", inputs, (("dims", ("B",)),), LossType((BATCH,))))
        counted.append(Counted("op/cross_entropy.1", (BATCH,), "op/not_equal.1"))
        named.append(LossPlan("hard", ((Constant(1.0), "op/cross_entropy.1"),)))
    if "soft" in losses:
        ops.append(Apply("op/detach.1", "detach", (("x", "t/logits"),), (), taps_t[-1].type))
        ops.append(Free(("t/logits",)))
        inputs = (("student", "s/logits"), ("teacher", "op/detach.1"))
        attrs = (("dims", ("B",)), ("temperature", Constant(2.0)))
        ops.append(Apply("op/kl.1", "kl", inputs, attrs, LossType((BATCH,))))
        ops.append(Free(("op/detach.1", "s/logits")))
        counted.append(Counted("op/kl.1", (BATCH,), None))
        named.append(LossPlan("soft", ((Constant(1.0), "op/kl.1"),)))
    projections = ()
    if "hid" in losses:
        taps_s.append(tap("s", at["hid_s"], BATCH, LENGTH, s.dim("H", "s")))
        taps_t.append(tap("t", at["hid_t"], BATCH, LENGTH, t.dim("H", "t")))
        projections = (ProjectNode("project/W", "W", s.size("H"), t.size("H")),)
        inputs = (("block", "project/W"), ("x", "s/hidden.1"))
        ops.append(Apply("op/project.1", "project", inputs, (), taps_t[-1].type))
        ops.append(Apply("op/detach.2", "detach", (("x", "t/hidden.2"),), (), taps_t[-1].type))
        inputs = (("student", "op/project.1"), ("teacher", "op/detach.2"), ("valid", "op/valid_tokens.1"))
        ops.append(Apply("op/mse.1", "mse", inputs, (("dims", ("B", "L")),), LossType((BATCH, LENGTH))))
        ops.append(Free(("op/detach.2", "op/project.1", "s/hidden.1", "t/hidden.2")))
        counted.append(Counted("op/mse.1", (BATCH, LENGTH), "op/valid_tokens.1"))
        named.append(LossPlan("hid", ((Constant(0.5), "op/mse.1"),)))
    if "att" in losses:
        cell = (BATCH, heads[0], LENGTH, LENGTH)
        taps_s.append(tap("s", at["att_s"], *cell))
        taps_t.append(tap("t", at["att_t"], BATCH, heads[1], LENGTH, LENGTH))
        inputs = (("student", taps_s[-1].key), ("teacher", taps_t[-1].key), ("valid", "op/valid_tokens.1"))
        attrs = (("dims", ("B", "*", "L", "L")),)
        ops.append(Apply("op/mse.2", "mse", inputs, attrs, LossType(cell)))
        counted.append(Counted("op/mse.2", cell, "op/valid_tokens.1"))
        named.append(LossPlan("att", ((Constant(1.0), "op/mse.2"),)))
    ops = [op for op in ops if free or not isinstance(op, Free)]
    runs = [Run("t/forward")] if taps_t else []
    usual = {
        "hard": Constant(0.3),
        "soft": Constant(0.7),
        "hid": Ramp(0.0, 1.0, Span(50, "percent")),
        "att": Constant(0.1),
    }
    forwards = [ForwardPlan("s/forward", "s", True, tuple(taps_s))]
    if taps_t:
        last = None if "soft" in losses else TapPath("layer", 2, "attn.scores") if "att" in losses else at["hid_t"]
        forwards.append(ForwardPlan("t/forward", "t", False, tuple(taps_t), last))
    if trains is None:
        trains = (TrainTarget("model", "s"), *(TrainTarget("project", node.name) for node in projections))
    used = tuple(weight_of.get(item.name, usual[item.name]) for item in named)
    plans = tuple(accuracy_plan(s) for metric in metrics if metric == "acc")
    stage = StageNode(
        f"stage/{name}",
        name,
        order,
        duration or Span(10, "steps"),
        SourceSpec("rows", "csv", ()),
        used,
        trains,
        optim or OptimSpec(lr=1e-3, warmup=Span(20, "percent")),
        batch_size=4,
        **settings,
    )
    nodes = [ModelNode("model/s", "s", "student", s)]
    if taps_t:
        nodes.append(ModelNode("model/t", "t", "teacher", t))
    return StagePlan(
        name,
        stage,
        tuple(nodes),
        projections,
        tuple(forwards),
        tuple(valid),
        tuple(counted),
        (*runs, Run("s/forward"), *ops),
        tuple(named),
        used,
        ("attention_mask", "labels"),
        plans,
    )


def accuracy_plan(s):
    logits = tap("s", TapPath("logits"), BATCH, s.dim("C", "s"))
    return MetricPlan(
        MetricNode("metric/acc", "acc", "accuracy", ()),
        (ForwardPlan("s/forward", "s", False, (logits,)),),
        (Run("s/forward"),),
        (("labels", "batch/labels"), ("student", "s/logits")),
    )


def teaching_plan(name="teach", order=0, **settings):
    """`t` is trained on the labels."""
    plan = stage_plan(("hard",), name=name, order=order, **settings)
    logits = tap("t", TapPath("logits"), BATCH, info("t").dim("C", "t"))
    apply = plan.program[-1]
    swapped = replace(apply, inputs=(("labels", "batch/labels"), ("student", "t/logits"), ("valid", "op/not_equal.1")))
    return replace(
        plan,
        stage=replace(plan.stage, trains=(TrainTarget("model", "t"),)),
        models=(ModelNode("model/t", "t", "model", info("t")),),
        forwards=(ForwardPlan("t/forward", "t", True, (logits,)),),
        program=(Run("t/forward"), swapped),
    )


def spec(*stages, runtime=()):
    return SpecPlan(tuple(stages), runtime=tuple(runtime))


def evaluating(every):
    return (EvaluateSpec(("acc",), every),)
