"""Tiny models, a stage made by hand over them, and a loader of random rows."""

import json
from dataclasses import replace

import torch
from plans import accuracy_plan, spec, tap

from gkd_dsl.graph.nodes import ModelNode, OptimSpec, ProjectNode, SourceSpec, StageNode, TrainTarget
from gkd_dsl.graph.plan import (
    Apply,
    Counted,
    ForwardPlan,
    Free,
    LossPlan,
    Run,
    StagePlan,
    TapPlan,
)
from gkd_dsl.models.describe import describe, random_init
from gkd_dsl.models.taps import TapPath
from gkd_dsl.runtime.models.load import load
from gkd_dsl.schedules import Clock, Constant, Ramp, Span
from gkd_dsl.types import BATCH, LENGTH, Dim, LossType, TensorType

CLASSES = 3
LOGITS, S_HIDDEN, T_HIDDEN = TapPath("logits"), TapPath("hidden", 1), TapPath("hidden", 2)
S_SCORES, T_SCORES = TapPath("layer", 1, "attn.scores"), TapPath("layer", 2, "attn.scores")
START = Clock(0, 10, 10.0)
_VOCABULARY = 40


def infos(folder, *, dropout=0.0):
    """A teacher of 3 x 24 and a student of 2 x 16, both with 2 heads and 3 classes."""
    made = {}
    for name, layers, width in (("t", 3, 24), ("s", 2, 16)):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        config = {
            "model_type": "bert", "vocab_size": _VOCABULARY, "hidden_size": width, "num_hidden_layers": layers,
            "num_attention_heads": 2, "intermediate_size": 2 * width, "max_position_embeddings": 32,
            "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "classifier_dropout": dropout,
        }  # fmt: skip
        (place / "config.json").write_text(json.dumps(config))
        made[name] = random_init(describe(str(place)), task="classification", num_labels=CLASSES)
    return made


def models(found):
    return {name: load(info, seed=number + 1) for number, (name, info) in enumerate(found.items())}


def batch_of(rows=4, length=9, seed=0):
    """Rows of different lengths, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, _VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def cut(batch, start, stop):
    """Some rows of a batch, without the padding that they do not need."""
    part = {name: value[start:stop] for name, value in batch.items()}
    length = int(part["attention_mask"].sum(1).max())
    return {name: value[:, :length] if value.ndim == 2 else value for name, value in part.items()}


class Rows:
    """A loader whose batches follow from seed and epoch alone."""

    def __init__(self, batches=5, rows=4, held_out=2, seed=0):
        self.batches, self.rows, self.seed = batches, rows, seed
        self._held_out = held_out

    def steps_per_epoch(self, accumulate=1):
        return -(-self.batches // accumulate)

    def epoch(self, epoch, start=0):
        for number in range(start, self.batches):
            yield batch_of(self.rows, 6 + number % 3, 1000 * self.seed + 100 * epoch + number)

    def held_out(self):
        for number in range(self._held_out):
            yield batch_of(self.rows, 8, 9000 + number)

    @staticmethod
    def tokens(batch):
        return int(batch["attention_mask"].sum())


def _float(*dims):
    return TensorType("float", dims)


def stage_plan(found, **stage):
    """KD, a hidden state with a projection, and attention: all that a step does, in one plan. `stage` changes it."""
    width = {name: info.dim("H", name) for name, info in found.items()}
    heads = {name: info.dim("A", name) for name, info in found.items()}
    classes = {name: Dim(f"{name}.C", CLASSES, f"config `num_labels` of {name}") for name in found}

    def forward(name, grad, hidden, scores):
        taps = (
            tap(name, LOGITS, BATCH, classes[name]),
            TapPlan(f"{name}/hidden", hidden, _float(BATCH, LENGTH, width[name])),
            TapPlan(f"{name}/scores", scores, _float(BATCH, heads[name], LENGTH, LENGTH)),
        )
        return ForwardPlan(f"{name}/forward", name, grad, taps)

    mask = TensorType("bool", (BATCH, LENGTH))
    detached = tuple(
        Apply(f"op/detach.{part}", "detach", (("x", f"t/{part}"),), (), tap.type)
        for part, tap in zip(("logits", "hidden", "scores"), forward("t", False, T_HIDDEN, T_SCORES).taps, strict=True)
    )
    both = (BATCH, heads["s"], LENGTH)
    program = (
        Run("t/forward"),
        *detached,
        Free(("t/logits", "t/hidden", "t/scores")),
        Run("s/forward"),
        Apply("op/ce", "cross_entropy", (("labels", "batch/labels"), ("student", "s/logits")), (("dims", ("B",)),),
              LossType((BATCH,))),
        Apply("op/kl", "kl", (("student", "s/logits"), ("teacher", "op/detach.logits")),
              (("dims", ("B",)), ("temperature", 2.0)), LossType((BATCH,))),
        Free(("s/logits", "op/detach.logits")),
        Apply("op/project", "project", (("block", "project/W"), ("x", "s/hidden")), (),
              _float(BATCH, LENGTH, width["t"])),
        Free(("s/hidden",)),
        Apply("op/mse", "mse", (("student", "op/project"), ("teacher", "op/detach.hidden"), ("valid", "op/valid")),
              (("causal", False), ("dims", ("B", "L"))), LossType((BATCH, LENGTH))),
        Free(("op/project", "op/detach.hidden")),
        Apply("op/akl", "attention_kl", (("student", "s/scores"), ("teacher", "op/detach.scores"), ("valid", "op/valid")),
              (("causal", False), ("dims", ("B", "*", "L"))), LossType(both)),
        Free(("s/scores", "op/detach.scores")),
    )  # fmt: skip
    node = StageNode(
        "stage/main",
        name="main",
        order=0,
        duration=Span(10, "steps"),
        source=SourceSpec("rows", "csv", ()),
        weights=(),
        trains=(TrainTarget("model", "s"), TrainTarget("project", "W")),
        optim=OptimSpec(lr=1e-2),
    )
    return StagePlan(
        name="main",
        stage=replace(node, **stage),
        models=tuple(
            ModelNode(f"model/{name}", name=name, role=role, info=found[name])
            for name, role in (("s", "student"), ("t", "teacher"))
        ),
        projections=(ProjectNode("project/W", name="W", in_features=16, out_features=24),),
        forwards=(forward("t", False, T_HIDDEN, T_SCORES), forward("s", True, S_HIDDEN, S_SCORES)),
        valid_program=(Apply("op/valid", "valid_tokens", (("x", "batch/attention_mask"),), (), mask),),
        counted=(
            Counted("op/ce", (BATCH,), None),
            Counted("op/kl", (BATCH,), None),
            Counted("op/mse", (BATCH, LENGTH), "op/valid"),
            Counted("op/akl", both, "op/valid"),
        ),
        program=program,
        losses=(
            LossPlan("hard", ((Constant(1.0), "op/ce"),)),
            LossPlan("soft", ((Constant(1.0), "op/kl"),)),
            LossPlan("inside", ((Constant(0.5), "op/mse"), (Constant(2.0), "op/akl"))),
        ),
        weights=(Constant(0.3), Constant(0.7), Ramp(0.5, 1.0, Span(50, "percent"))),
        columns=("attention_mask", "input_ids", "labels"),
    )


def with_metric(plan, **stage):
    """The plan with the held-out accuracy of the student as metric `acc`."""
    student = next(node.info for node in plan.models if node.name == "s")
    return replace(plan, metrics=(accuracy_plan(student),), stage=replace(plan.stage, **stage))


def spec_of(*plans, runtime=()):
    named = (
        replace(plan, name=name, stage=replace(plan.stage, name=name, order=order, key=f"stage/{name}"))
        for order, (name, plan) in enumerate(zip(("first", "second", "third"), plans, strict=False))
    )
    return spec(*named, runtime=runtime)
