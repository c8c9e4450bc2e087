"""Tiny models of four families, specs that use a method over them, and one compiled step in double precision."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gkd_dsl import library
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.distiller import Distiller
from gkd_dsl.runtime.models.load import load
from gkd_dsl.syntax import ast, parse
from gkd_dsl.text import Source

VOCABULARY, CLASSES, HEADS = 41, 3, 4
FAMILIES = ("bert", "roberta", "llama", "gpt2")
CAUSAL = ("llama", "gpt2")
_KEPT = tempfile.TemporaryDirectory(prefix="gkd-all-methods-")
ROOT = Path(_KEPT.name)
_HEADS = {
    ("bert", "classification"): "BertForSequenceClassification", ("bert", "masked_lm"): "BertForMaskedLM",
    ("roberta", "classification"): "RobertaForSequenceClassification", ("roberta", "masked_lm"): "RobertaForMaskedLM",
    ("llama", "classification"): "LlamaForSequenceClassification", ("llama", "causal_lm"): "LlamaForCausalLM",
    ("gpt2", "classification"): "GPT2ForSequenceClassification", ("gpt2", "causal_lm"): "GPT2LMHeadModel",
}  # fmt: skip


@cache
def folder(family: str, task: str, layers: int, width: int, heads: int, dropout: float) -> str:
    """A config and a vocabulary, written once, relative to ROOT."""
    (ROOT / "rows.csv").write_text("text,label\n" + "".join(f"text {n},{n % CLASSES}\n" for n in range(9)))
    (ROOT / "lines.txt").write_text("one line\nanother line\n")
    name = f"{family}_{task}_{layers}x{width}h{heads}d{dropout}"
    (ROOT / name).mkdir()
    config = {
        "architectures": [_HEADS[family, task]], "model_type": family, "vocab_size": VOCABULARY, "pad_token_id": 0,
        "initializer_range": 0.3, "id2label": {str(n): f"LABEL_{n}" for n in range(CLASSES)},
        "label2id": {f"LABEL_{n}": n for n in range(CLASSES)},
    }  # fmt: skip
    if family == "gpt2":
        config |= {
            "n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": 2 * width, "n_positions": 40,
            "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout,
        }  # fmt: skip
    else:
        config |= {
            "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 2 * width, "max_position_embeddings": 40,
        }  # fmt: skip
        if family == "llama":
            config |= {"num_key_value_heads": heads, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": dropout}
        else:
            config |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    (ROOT / name / "config.json").write_text(json.dumps(config))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(VOCABULARY - 5))]
    (ROOT / name / "vocab.txt").write_text("\n".join(words) + "\n")
    return name


Sizes = tuple[int, int, int]  # layers, width, heads


@dataclass(frozen=True)
class Models:
    """The models of a spec: teacher `t`, student `s` (None: there is none), and `more` by role and name."""

    t: Sizes | None = (4, 24, HEADS)
    s: Sizes | None = (2, 16, HEADS)
    task: str = "classification"
    family: str = "bert"
    more: tuple[tuple[str, str, Sizes], ...] = ()
    dropout: float = 0.0

    def lines(self) -> list[str]:
        models = (("teacher", "t", self.t), *self.more, ("student", "s", self.s))
        found = [
            f'{role} {name} = random_init("{folder(self.family, self.task, *sizes, self.dropout)}")'
            for role, name, sizes in models
            if sizes is not None
        ]
        if self.task == "classification":
            return [*found, 'data rows = csv("rows.csv", text = "text", label = "label")']
        return [*found, 'data rows = text("lines.txt")']

    def of(self, family: str) -> Models:
        """The same sizes in another family."""
        task = self.task if self.task == "classification" else "causal_lm" if family in CAUSAL else "masked_lm"
        return replace(self, family=family, task=task)

    def twins(self) -> Models:
        """Every model of the sizes of `t`."""
        if self.t is None or self.s is None:
            return self
        return replace(self, s=self.t, more=tuple((role, name, self.t) for role, name, _ in self.more))


def spec(models: Models, *body: str) -> str:
    return "\n".join(["gkd 1", *models.lines(), *body]) + "\n"


@cache
def methods() -> dict[str, tuple[str, ast.MethodDecl]]:
    """Every method of the library, with the file that it is in: a file may hold variants beside its own."""
    found = {}
    for file in library.names():
        tree, _ = parse(Source(f"gkd:{file}", library.method_text(file)))
        found |= {item.name.text: (file, item) for item in tree.items if isinstance(item, ast.MethodDecl)}
    return found


def losses_of(method: str) -> list[str]:
    """The losses of a method by name; a function of a pass is none."""
    body = methods()[method][1].body
    return [item.name.text for item in body if isinstance(item, ast.LossDecl) and item.formals is None]


def use(method: str, call: str, args: str = "", alias: str = "m") -> list[str]:
    file = methods()[method][0]
    return [f'import "gkd:{file}" use {method}', f"use {method}({call}{args and ', ' + args}) as {alias}"]


@cache
def check(text: str):
    return check_text(text, "spec.gkd", root=ROOT)


def errors(text: str) -> list[tuple[str, str]]:
    """What refuses a spec, also what is not run by this version: (code, sentence)."""
    found = check(text)
    return [(d.code, d.message) for d in (*found.diagnostics.errors, *found.later)]


def plans(text: str, warns: tuple[str, ...] = ()) -> dict:
    """The stages of a spec in which nothing but `warns` is found, by name."""
    return {stage.name: stage for stage in spec_plan(text, warns).stages}


@cache
def spec_plan(text: str, warns: tuple[str, ...] = ()):
    found = check(text)
    said = [f"{d.code} {d.span}: {d.message}" for d in (*found.diagnostics, *found.later) if d.code not in warns]
    assert not said, "\n".join([*said, text])
    return compile_plan(found.graph, runtime=found.runtime)


def made(plan, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
    """The models of a stage with random weights, norms and biases included, by name alone."""
    models: dict = {}
    for node in sorted(plan.models, key=lambda node: node.info.build.base is not None):
        own = seed + 31 * sum(node.name.encode())
        models[node.name] = model = load(node.info, dtype=dtype, seed=own, models=models)
        generator = torch.Generator().manual_seed(own + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return models


def batch_of(task: str, lengths=(7, 4, 5, 3), seed: int = 0, pad: int = 0, left: int = 0) -> dict[str, Tensor]:
    """Rows of these lengths, padded to the longest, by `pad` more on the right and `left` on the left."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), left + max(lengths) + pad)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels, places = torch.full(shape, -100), torch.zeros(shape, dtype=torch.long)
    classes = torch.randint(0, CLASSES, (len(lengths),), generator=generator)
    for row, n in enumerate(lengths):
        # With padding on the left every text ends in the last column.
        at = slice(left + max(lengths) - n, left + max(lengths)) if left else slice(0, n)
        words = torch.randint(5, VOCABULARY, (n,), generator=generator)
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[torch.randperm(n, generator=generator)[: max(1, n // 2)]] = True
        ids[row, at], mask[row, at], places[row, at] = words, 1, torch.arange(n)
        labels[row, at] = words if task == "causal_lm" else torch.where(chosen, (words + 1) % VOCABULARY, -100)
    found = {"input_ids": ids, "attention_mask": mask, "labels": classes if task == "classification" else labels}
    return found | ({"position_ids": places} if left else {})


class Step:
    """A compiled stage over models, in the middle of its schedule."""

    def __init__(self, plan, models, projections=None, counts=None, at: tuple[int, int] = (4, 10)) -> None:
        self.plan, self.models = plan, models
        self.distiller = Distiller(plan, models, projections)
        dtype = next(iter(models.values())).dtype
        for block in self.distiller.projections.values():
            block.to(dtype)
        self.projections = self.distiller.projections
        self.distiller.step_to(*at)
        for name, value in (counts or {}).items():
            (key,) = (key for key in self.distiller.counters.values if key.rpartition("/")[2] == name)
            self.distiller.counters.values[key] = value
        self.names, self.parameters = zip(*self.distiller.named_parameters(), strict=True)

    def __call__(self, *batches, row: int = 0):
        """The objective and each loss of one micro-batch, over the denominators of all of them."""
        counts = self.distiller.denominators(batches)
        clock = replace(self.distiller.counters.on(self.distiller._clock), micro=row)
        # Each loss with a gradient of its own, which fused ones have not.
        out = self.distiller.module(batches[row], clock, counts, fused=False)
        return out.loss, out.values

    def gradient(self, value: Tensor) -> Tensor:
        """The gradient by all that trains, as one vector."""
        if not value.requires_grad:
            return torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float64)
        found = torch.autograd.grad(value, self.parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def close(value: Tensor, expected: Tensor, what: str, rtol: float = 1e-8, atol: float = 1e-10) -> None:
    torch.testing.assert_close(
        value.detach().double(), expected.detach().double(), rtol=rtol, atol=atol, msg=lambda said: f"{what}: {said}"
    )
