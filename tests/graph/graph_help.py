"""Graphs for tests: small ones by hand, random ones, checked specs; and an interpreter of plans without tensors."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import networkx as nx
from hypothesis import strategies as st

from gkd_dsl.graph.access import inputs, nodes
from gkd_dsl.graph.build import GraphBuilder
from gkd_dsl.graph.nodes import (
    BatchNode,
    ForwardNode,
    LossNode,
    MetricNode,
    ModelNode,
    OpNode,
    OptimSpec,
    ProjectNode,
    StageNode,
    TapNode,
    TrainTarget,
)
from gkd_dsl.graph.plan import Apply, Free, Instruction, Run, StagePlan
from gkd_dsl.meaning.check import check_path
from gkd_dsl.models.info import Build, ModelInfo, Vocabulary
from gkd_dsl.models.taps import TapPath
from gkd_dsl.schedules import Clock, Constant, Cosine, InDrawnMap, Ramp, Schedule, Span, StepAt, combine
from gkd_dsl.text import Location, Source
from gkd_dsl.text import Span as Place
from gkd_dsl.types import BATCH, LENGTH, Dim, LossType, TensorType

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = Source("spec.gkd", "loss a = mse(s.final <- t.final)\nloss b = mse(s.final <- t.final)\n")
HIDDEN = TensorType("float", (BATCH, LENGTH, Dim("s.H", 8, "config `hidden_size`")))
MASK = TensorType("bool", (BATCH, LENGTH))


def at(start: int, end: int | None = None) -> tuple[Location, ...]:
    return (Location(Place(TEXT, start, end or start + 4)),)


def model(name: str, layers: int = 4, role: str = "model") -> ModelNode:
    build = Build("hf", f"models/{name}", overrides=(("num_labels", 2),))
    info = ModelInfo(
        f"./{name}", f"models/{name}", "bert", "BertModel", "encoder",
        (("H", 8), ("N", layers), ("A", 2), ("D", 4)), (("H", "hidden_size"),), build,
        Vocabulary("ids:0", 30, "tokenizer.json"), config={"hidden_size": 8, "id2label": {"0": "a"}, "sizes": [1, 2]},
    )  # fmt: skip
    return ModelNode(f"model/{name}", name, role, info, (("dtype", "float32"),), locations=at(0))  # type: ignore[arg-type]


class Hand(GraphBuilder):
    """A builder with short words for the nodes of tests."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for column in ("input_ids", "attention_mask", "labels"):
            self.add(BatchNode(f"batch/{column}", column, TensorType("int", (BATCH, LENGTH))))
        for name in names or ("s", "t"):
            self.add(model(name))
            self.add(ForwardNode(f"{name}/forward", name))
            self.connect(f"model/{name}", f"{name}/forward", "model")
            self.connect("batch/input_ids", f"{name}/forward", "input_ids")

    def tap(self, name: str, index: int, key: str | None = None) -> str:
        path = TapPath("hidden", index)
        found = self.add(TapNode(key or f"{name}/{path.key}", name, path, HIDDEN, locations=at(9 + index)))
        self.connect(f"{name}/forward", found, "forward")
        return found

    def op(
        self, name: str, type_: TensorType | LossType = HIDDEN, place: int = 9, attrs: tuple = (), **slots: str
    ) -> str:
        found = self.add(OpNode(self.fresh(f"op/{name}"), name, attrs, type_, locations=at(place)))
        for slot, source in slots.items():
            self.connect(source, found, slot)
        return found

    def valid(self) -> str:
        return self.op("valid_tokens", MASK, x="batch/attention_mask")

    def atom(self, student: str, teacher: str, *, valid: str | None = None, op: str = "mse", place: int = 9) -> str:
        slots = {"student": student, "teacher": teacher} | ({"valid": valid} if valid else {})
        return self.op(op, LossType((BATCH, LENGTH)), place, (("causal", False),), **slots)

    def loss(self, name: str, *atoms: str, by: tuple[Schedule, ...] | None = None) -> str:
        by = by or tuple(Constant(1.0) for _ in atoms)
        found = self.add(LossNode(f"loss/{name}", name, by, f"text of {name}", locations=at(0)))
        for slot, atom in enumerate(atoms):
            self.connect(atom, found, str(slot))
        return found

    def project(self, name: str = "W") -> str:
        return self.add(ProjectNode(f"project/{name}", name, 8, 8))

    def metric(self, name: str, student: str, labels: str) -> str:
        found = self.add(MetricNode(f"metric/{name}", name, "accuracy", ()))
        self.connect(student, found, "student")
        self.connect(labels, found, "labels")
        return found

    def stage(
        self, name: str, *losses: str, weights: tuple[Schedule, ...] | None = None, metrics: tuple[str, ...] = (),
        trains: tuple[TrainTarget, ...] = (TrainTarget("model", "s"),), order: int = 0,
    ) -> str:  # fmt: skip
        weights = weights or tuple(Constant(1.0) for _ in losses)
        node = StageNode(f"stage/{name}", name, order, Span(3.0, "epochs"), None, weights, trains, OptimSpec())
        found = self.add(node)
        for slot, loss in enumerate(losses):
            self.connect(loss, found, str(slot))
        for slot, metric in enumerate(metrics):
            self.connect(metric, found, f"metric.{slot}")
        return found


def twice() -> Hand:
    """Two losses that say the same thing in other places, with nodes of their own."""
    hand = Hand()
    atoms = []
    for place in (9, 42):
        left, right = hand.tap("s", 2), hand.tap("t", 4)
        cut = hand.op("detach", x=right, place=place)
        atoms.append(hand.atom(left, cut, valid=hand.valid(), place=place))
    hand.stage("main", hand.loss("a", atoms[0]), hand.loss("b", atoms[1]))
    return hand


def checked(path: Path) -> nx.MultiDiGraph:
    result = check_path(path)
    assert result.ok, [d.message for d in result.diagnostics]
    return result.graph


def deep(folder: Path) -> Path:
    """A spec in the manner of TinyBERT: twelve layers on both sides, two stages."""
    for name, hidden in (("t", 48), ("s", 24)):
        config = {
            "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": hidden,
            "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 96, "vocab_size": 99,
            "max_position_embeddings": 64, "type_vocab_size": 2, "id2label": {"0": "no", "1": "yes"},
        }  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = "".join(f"text {i},{i % 2}\n" for i in range(20))
    (folder / "train.csv").write_text("text,label\n" + rows, encoding="utf-8")
    path = folder / "deep.gkd"
    path.write_text(
        """gkd 1
teacher t = hf("./t")
student s = hf("./s")
data d = csv("train.csv", text = "text", label = "label", held_out = 20%)
project W = linear(s.H -> t.H)
loss hid = sum(mse(s.layer[i].out |> W <- t.layer[j].out) for (i, j) in uniform(s.layer, t.layer))
loss emb = mse(s.embed |> W <- t.embed)
loss attn = sum(mse(s.layer[i].attn.scores <- t.layer[j].attn.scores) for (i, j) in uniform(s.layer, t.layer))
loss soft = kl(s.logits <- t.logits, temperature = 2.0)
loss hard = cross_entropy(s.logits, batch.labels)
metric acc = accuracy(s.logits, batch.labels)
stage inner for 3 epochs {
  minimize hid + emb + attn
}
stage outer for 200 steps {
  minimize ramp(0 -> 1, until = 50%) * soft + 0 * hard
  evaluate acc every 1 epoch
}
""",
        encoding="utf-8",
    )
    return path


def number(text: str) -> float:
    """A number in [0.5, 1.5) that stands for a text."""
    return 0.5 + zlib.crc32(text.encode()) / 2**32


def value(schedule: object, clock: Clock) -> float:
    assert isinstance(schedule, Schedule)
    return schedule.value(clock)


class Interpreter:
    """Runs a plan on plain numbers. A key that was let go, or never made, is a KeyError."""

    def __init__(self, plan: StagePlan) -> None:
        self.plan = plan
        self.most = 0

    def objective(self, clock: Clock) -> float:
        env = {f"batch/{column}": number(column) for column in self.plan.columns}
        env |= {f"project/{block.name}": number(block.name) for block in self.plan.projections}
        for step in self.plan.valid_program:
            env[step.key] = self.apply(step, env)
        env = self.run(self.plan.program, {f.key: f for f in self.plan.forwards}, env)
        self.left = set(env)
        return sum(
            value(weight, clock) * sum(value(by, clock) * env[key] for by, key in loss.parts)
            for weight, loss in zip(self.plan.weights, self.plan.losses, strict=True)
        )

    def metrics(self) -> dict[str, dict[str, float]]:
        found = {}
        for metric in self.plan.metrics:
            env = {f"batch/{column}": number(column) for column in self.plan.columns}
            env |= {f"project/{block.name}": number(block.name) for block in self.plan.projections}
            env = self.run(metric.program, {f.key: f for f in metric.forwards}, env)
            found[metric.metric.name] = {slot: env[key] for slot, key in metric.inputs}
        return found

    def run(self, program: tuple[Instruction, ...], forwards: dict, env: dict[str, float]) -> dict[str, float]:
        for step in program:
            if isinstance(step, Run):
                plan = forwards[step.forward]
                env |= {tap.key: number(f"{plan.model} {tap.path}") for tap in plan.taps}
            elif isinstance(step, Free):
                for key in step.keys:
                    del env[key]
            else:
                env[step.key] = self.apply(step, env)
        return env

    def apply(self, step: Apply, env: dict[str, float]) -> float:
        total = number(f"{step.op} {step.attrs}")
        for slot, key in step.inputs:
            total = total * 0.75 + number(slot) * env[key]
        return total


SCHEDULES = st.one_of(
    st.sampled_from([Constant(0.0), Constant(1.0), Constant(0.25)]),
    st.builds(Ramp, st.just(0.0), st.floats(0.5, 2.0), st.sampled_from([Span(50.0, "percent"), Span(7.0, "steps")])),
    st.builds(Cosine, st.just(1.0), st.floats(0.0, 0.5), st.just(Span(2.0, "epochs"))),
    st.just(StepAt(0.0, 1.0, Span(1e6, "tokens"))),
    st.builds(InDrawnMap, st.integers(0, 1), st.integers(0, 3), st.just(2), st.just(4), st.none(), st.integers(0, 3)),
    st.just(combine("*", Constant(2.0), Ramp(0.0, 1.0, Span(10.0, "percent")))),
)


@st.composite
def graphs(draw: st.DrawFn) -> nx.MultiDiGraph:
    """Random graphs that keep the rules: taps, chains of operators, many of them equal, losses, metrics, stages."""
    hand = Hand("s", "t", "u")
    blocks = [hand.project("W"), hand.project("P.1")]
    made = [hand.tap(draw(st.sampled_from(["s", "t", "u"])), draw(st.integers(0, 4))) for _ in range(3)]
    masks = [hand.valid()]
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["tap", "detach", "add", "scale", "project", "mask", "and"]))
        first, second = draw(st.sampled_from(made)), draw(st.sampled_from(made))
        if kind == "tap":
            made.append(hand.tap(draw(st.sampled_from(["s", "t", "u"])), draw(st.integers(0, 4))))
        elif kind == "detach":
            made.append(hand.op("detach", x=first))
        elif kind == "add":
            made.append(hand.op("add", a=first, b=second))
        elif kind == "scale":
            made.append(hand.op("scale", attrs=(("by", draw(st.sampled_from([1.0, 2.0]))),), x=first))
        elif kind == "project":
            made.append(hand.op("project", x=first, block=draw(st.sampled_from(blocks))))
        elif kind == "mask":
            masks.append(hand.valid())
        else:
            left, right = draw(st.sampled_from(masks)), draw(st.sampled_from(masks))
            masks.append(hand.op("and", MASK, a=left, b=right))
    losses = []
    for count in range(draw(st.integers(1, 4))):
        atoms = [
            hand.atom(
                draw(st.sampled_from(made)), draw(st.sampled_from(made)),
                valid=draw(st.sampled_from([None, *masks])), op=draw(st.sampled_from(["mse", "kl"])),
            )
            for _ in range(draw(st.integers(1, 3)))
        ]  # fmt: skip
        losses.append(hand.loss(f"l{count}", *atoms, by=tuple(draw(SCHEDULES) for _ in atoms)))
    metrics = [hand.metric(f"m{count}", draw(st.sampled_from(made)), "batch/labels") for count in range(2)]
    for order in range(draw(st.integers(1, 2))):
        chosen = draw(st.lists(st.sampled_from(losses), min_size=1, unique=True))
        hand.stage(
            f"stage{order}", *chosen, weights=tuple(draw(SCHEDULES) for _ in chosen), order=order,
            metrics=tuple(draw(st.lists(st.sampled_from(metrics), unique=True))),
            trains=(TrainTarget("model", draw(st.sampled_from(["s", "t"]))), TrainTarget("project", "W")),
        )  # fmt: skip
    return hand.graph


def same(left: nx.MultiDiGraph, right: nx.MultiDiGraph) -> bool:
    """Whether two graphs have the same nodes, places included, and the same edges."""
    return (
        set(left) == set(right)
        and all(repr(left.nodes[key]["node"]) == repr(right.nodes[key]["node"]) for key in left)
        and sorted(left.edges(data="slot")) == sorted(right.edges(data="slot"))
    )


def keys(graph: nx.MultiDiGraph, kind: type) -> set[str]:
    return {node.key for node in nodes(graph, kind)}


def slots(graph: nx.MultiDiGraph, key: str) -> dict[str, str]:
    return inputs(graph, key)


def write_llamas(folder: Path) -> None:
    """Configs of two small language models, `t` and `s`, and texts."""
    for name, layers in (("t", 3), ("s", 2)):
        (folder / name).mkdir()
        config = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 16,
            "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32,
        }  # fmt: skip
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "rows.csv").write_text("text\n" + "some words\n" * 9)
