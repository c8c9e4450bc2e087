"""Tiny models, a compiled method over them, and readings of the models that owe nothing to the compiled step."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.distiller import Distiller
from gkd_dsl.runtime.models.load import load
from gkd_dsl.schedules import Clock

VOCABULARY, CLASSES, HEADS = 41, 3, 4
CLOCK = Clock(0, 10, 10.0)
_KEPT = tempfile.TemporaryDirectory(prefix="gkd-methods-")
_HEAD = {"classification": "SequenceClassification", "masked_lm": "MaskedLM", "causal_lm": "LMHeadModel"}


@cache
def world() -> Path:
    """A folder with rows to read; model folders are added as they are asked for."""
    root = Path(_KEPT.name)
    (root / "rows.csv").write_text("text,label\n" + "".join(f"text {n},{n % CLASSES}\n" for n in range(9)))
    (root / "lines.txt").write_text("one line\nanother line\n")
    return root


@cache
def folder(task: str, layers: int, width: int, heads: int = HEADS, dropout: float = 0.0) -> str:
    """The folder of a tiny BERT, relative to the world."""
    name = f"{task}_{layers}x{width}h{heads}d{dropout}"
    place = world() / name
    place.mkdir(exist_ok=True)
    config = {
        "architectures": [f"BertFor{_HEAD[task]}"], "model_type": "bert", "vocab_size": VOCABULARY,
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 2 * width,
        "max_position_embeddings": 40, "pad_token_id": 0, "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout, "initializer_range": 0.4,
        "id2label": {str(n): f"LABEL_{n}" for n in range(CLASSES)}, "label2id": {f"LABEL_{n}": n for n in range(CLASSES)},
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(VOCABULARY - 5))]
    (place / "vocab.txt").write_text("\n".join(words) + "\n")
    return name


@dataclass(frozen=True)
class Pair:
    """A teacher and a student: (layers, width, heads) of each, and their head."""

    teacher: tuple[int, int, int] = (4, 24, HEADS)
    student: tuple[int, int, int] = (2, 16, HEADS)
    task: str = "classification"
    dropout: float = 0.0

    def spec(self, *body: str) -> str:
        rows = (
            'csv("rows.csv", text = "text", label = "label")' if self.task == "classification" else 'text("lines.txt")'
        )
        t, s = (folder(self.task, *sizes, self.dropout) for sizes in (self.teacher, self.student))
        lines = [f'teacher t = random_init("{t}")', f'student s = random_init("{s}")', f"data rows = {rows}"]
        return "\n".join(["gkd 1", *lines, *body]) + "\n"


def use(*methods: str, args: str = "", run: bool = True) -> tuple[str, ...]:
    """Lines that use methods of the library: `kd` as `m_kd`."""
    lines = []
    for name in methods:
        lines += [f'import "gkd:{name}" use {name}', f"use {name}(t -> s{args and ', ' + args}) as m_{name}"]
        lines += [f"run m_{name}"] if run else []
    return tuple(lines)


def checked(text: str):
    """The graph of a text in which nothing is found."""
    found = check_text(text, "spec.gkd", root=world())
    assert [f"{d.code} {d.span}: {d.message}" for d in found.diagnostics] == []
    return found


def plans(text: str, **options):
    return {stage.name: stage for stage in compile_plan(checked(text).graph, **options).stages}


def made(plan, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, nn.Module]:
    """The models of a stage with random weights, layer norms and biases included."""
    models = {}
    for number, node in enumerate(plan.models):
        model = load(node.info, dtype=dtype, seed=seed + 7 * (node.name == "t") + number)
        generator = torch.Generator().manual_seed(seed + 100 + 7 * (node.name == "t"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        models[node.name] = model
    return models


def batch_of(lengths=(7, 4, 2), seed: int = 0, task: str = "classification", pad: int = 0) -> dict[str, Tensor]:
    """Rows of these lengths, padded on the right to the longest and by `pad` more."""
    generator = torch.Generator().manual_seed(seed)
    length = max(lengths) + pad
    ids, mask = torch.zeros(len(lengths), length, dtype=torch.long), torch.zeros(len(lengths), length, dtype=torch.long)
    labels = torch.full((len(lengths), length), -100)
    classes = torch.randint(0, CLASSES, (len(lengths),), generator=generator)
    for row, n in enumerate(lengths):
        ids[row, :n] = torch.randint(5, VOCABULARY, (n,), generator=generator)
        mask[row, :n] = 1
        chosen = torch.randperm(n, generator=generator)[: max(1, n // 3)]
        labels[row, chosen] = torch.randint(5, VOCABULARY, (len(chosen),), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": classes if task == "classification" else labels}


class Step:
    """A compiled stage over models; projections in the models' dtype."""

    def __init__(self, plan, models, projections=None) -> None:
        self.distiller = Distiller(plan, models, projections)
        dtype = next(iter(models.values())).dtype
        for block in self.distiller.projections.values():
            block.to(dtype)
        self.projections = self.distiller.projections
        self.models = models
        self.names, self.parameters = zip(*self.distiller.named_parameters(), strict=True)

    def __call__(self, batch, fused: bool = False):
        """The total and each term, all with their gradient; where `fused` the terms have none."""
        module = self.distiller.module
        out = module(batch, CLOCK, self.distiller.denominators([batch]), fused=fused)
        return out.loss, out.values

    def gradients(self, value: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(value, self.parameters, retain_graph=True, allow_unused=True)


class Reading:
    """A model's tensors for one row without padding: eager attention, plain hooks, `output_hidden_states`."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        model.set_attn_implementation("eager")
        body = model.base_model
        self.heads = model.config.num_attention_heads
        self.q: list[Tensor] = []
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        placed = []
        for block in body.encoder.layer:
            attention = block.attention.self
            for found, linear in ((self.q, attention.query), (self.k, attention.key), (self.v, attention.value)):
                placed.append(linear.register_forward_hook(lambda _m, _i, out, found=found: found.append(out[0])))
        out = model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), output_hidden_states=True)
        for handle in placed:
            handle.remove()
        self.hidden = [state[0] for state in out.hidden_states]
        self.logits = out.logits[0]

    def scores(self, layer: int) -> Tensor:
        """[A, L, L], one head at a time."""
        width = self.q[layer].shape[-1] // self.heads
        cut = [slice(h * width, (h + 1) * width) for h in range(self.heads)]
        return torch.stack([self.q[layer][:, c] @ self.k[layer][:, c].T / width**0.5 for c in cut])


def readings(model: nn.Module, batch) -> list[Reading]:
    """A reading of each row, cropped to its own length."""
    return [
        Reading(model, ids[mask.bool()]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def both(step: Step, batch, oracle):
    """(compiled, oracle): of each its total, its terms and the gradients of all of them.

    `oracle(students, teachers, projections, batch)` gives the terms; the readings are of copies of the models.
    """
    student = copy.deepcopy(step.models["s"]).train()
    teacher = copy.deepcopy(step.models["t"]).eval().requires_grad_(False)
    blocks = {name: copy.deepcopy(block) for name, block in step.projections.items()}
    named = {f"s/{name}": value for name, value in student.named_parameters()}
    for name, block in blocks.items():
        named |= {f"project/{name}/{key}": value for key, value in block.named_parameters()}
    terms = oracle(readings(student, batch), readings(teacher, batch), blocks, batch)
    return terms, [named[name] for name in step.names]


def agree(step: Step, batch, oracle, weights: dict[str, float]) -> None:
    """Every term, their weighted sum, and the gradients of each equal the oracle's."""
    total, values = step(batch)
    terms, parameters = both(step, batch, oracle)
    assert set(values) == set(weights)
    expected = {name: terms[name.rpartition("/")[2]] for name in weights}
    for name, value in values.items():
        close(value, expected[name], name)
        same_gradients(step, value, expected[name], parameters, name)
    summed = sum(weight * expected[name] for name, weight in weights.items())
    close(total, summed, "total")
    same_gradients(step, total, summed, parameters, "total")
    total, values = step(batch, fused=True)
    close(total, summed, "total, fused")
    for name, value in values.items():
        close(value, expected[name], f"{name}, fused")
    gradients = torch.autograd.grad(total, step.parameters, allow_unused=True)
    for one, two in zip(gradients, step.gradients(step(batch)[0]), strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-10)


def close(value: Tensor, expected: Tensor, what: str, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(
        value.detach(), expected.detach().to(value.dtype), rtol=rtol, atol=1e-10, msg=lambda said: f"{what}: {said}"
    )


def same_gradients(step: Step, value: Tensor, expected: Tensor, parameters, what: str) -> None:
    found = step.gradients(value)
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
    largest = max(g.abs().max().item() for g in wanted if g is not None)
    assert largest > 0, f"{what} has no gradient to compare"
    for name, one, two in zip(step.names, found, wanted, strict=True):
        one, two = (torch.zeros(1, dtype=torch.float64) if g is None else g for g in (one, two))
        gap = (one - two).abs().max().item()
        assert gap <= 1e-9 * max(1.0, largest), f"the gradient of {what} by {name} is off by {gap}"


def row_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of one vector of logits, written out."""
    p, q = torch.exp(teacher) / torch.exp(teacher).sum(), torch.exp(student) / torch.exp(student).sum()
    return sum(p[c] * (torch.log(p[c]) - torch.log(q[c])) for c in range(len(p)))


def attention_of(model: nn.Module, layer: int = -1) -> nn.Module:
    """The attention of a block."""
    return model.base_model.encoder.layer[layer].attention


def rotated(features: int, seed: int) -> Tensor:
    """A random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64)).Q


def turn(linear: nn.Linear, matrix: Tensor) -> None:
    """Put a square matrix behind a linear layer."""
    with torch.no_grad():
        linear.weight.copy_(matrix @ linear.weight)
        linear.bias.copy_(matrix @ linear.bias)


def permute_heads(model: nn.Module, order: list[int]) -> None:
    """Put the heads of the last block in another order; the function of the model stays."""
    attention = attention_of(model)
    width = attention.self.query.out_features // len(order)
    places = torch.cat([torch.arange(h * width, h * width + width) for h in order])
    with torch.no_grad():
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            linear.weight.copy_(linear.weight[places])
            linear.bias.copy_(linear.bias[places])
        attention.output.dense.weight.copy_(attention.output.dense.weight[:, places])
