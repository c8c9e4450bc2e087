"""Each method's losses from its definition: explicit loops over rows without padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from method_world import row_kl
from torch import Tensor


def kd(T: float):
    def terms(students, teachers, blocks, batch):
        hard = soft = 0.0
        for s, t, label in zip(students, teachers, batch["labels"], strict=True):
            hard = hard - torch.log(torch.exp(s.logits)[label] / torch.exp(s.logits).sum())
            soft = soft + T * T * row_kl(t.logits / T, s.logits / T)
        rows = len(students)
        return {"hard": hard / rows, "soft": soft / rows}

    return terms


def pkd(T: float, skip, last):
    """`skip` and `last`: pairs of hidden states by hand, 1 being the output of the first block."""

    def patient(students, teachers, pairs):
        values = []
        for s, t in zip(students, teachers, strict=True):
            for i, j in pairs:
                a, b = s.hidden[i][0], t.hidden[j][0]
                a, b = a / (a * a).sum().sqrt(), b / (b * b).sum().sqrt()
                values.append(((a - b) ** 2).mean())
        return sum(values) / len(values)

    def terms(students, teachers, blocks, batch):
        made = kd(T)(students, teachers, blocks, batch)
        made["patient"] = patient(students, teachers, skip)
        made["patient_last"] = patient(students, teachers, last)
        return made

    return terms


def distilbert(T: float):
    def terms(students, teachers, blocks, batch):
        soft, everywhere, mlm, cos = [], [], [], []
        for row, (s, t) in enumerate(zip(students, teachers, strict=True)):
            for place in range(len(s.logits)):
                divergence = T * T * row_kl(t.logits[place] / T, s.logits[place] / T)
                everywhere.append(divergence)
                label = int(batch["labels"][row, place])
                if label != -100:
                    soft.append(divergence)
                    mlm.append(-torch.log(torch.exp(s.logits[place])[label] / torch.exp(s.logits[place]).sum()))
                a, b = s.hidden[-1][place], t.hidden[-1][place]
                cos.append(1 - (a @ b) / ((a @ a).sqrt() * (b @ b).sqrt()))
        found = {"soft": soft, "soft_all": everywhere, "mlm": mlm, "cos": cos}
        return {name: sum(values) / len(values) for name, values in found.items()}

    return terms


def tinybert(T: float, pairs):
    """`pairs` of block indices from 0, by hand."""

    def states(students, teachers, block, layers):
        total = 0.0
        for i, j in layers:
            squares = [(block(s.hidden[i]) - t.hidden[j]) ** 2 for s, t in zip(students, teachers, strict=True)]
            total = total + sum(x.sum() for x in squares) / sum(x.numel() for x in squares)
        return total

    def terms(students, teachers, blocks, batch):
        named = {name.rpartition("/")[2]: block for name, block in blocks.items()}
        found = {}
        for block, ending in (("W", ""), ("W_e", "_separate")):
            if block in named:
                found["emb" + ending] = states(students, teachers, named[block], [(0, 0)])
        for block, ending in (("W", ""), ("W_h", "_separate")):
            if block in named:
                found["hid" + ending] = states(students, teachers, named[block], [(i + 1, j + 1) for i, j in pairs])
        found["attn"] = 0.0
        for i, j in pairs:
            squares = [(s.scores(i) - t.scores(j)) ** 2 for s, t in zip(students, teachers, strict=True)]
            found["attn"] = found["attn"] + sum(x.sum() for x in squares) / sum(x.numel() for x in squares)
        soft = [
            -(F.softmax(t.logits / T, -1) * F.log_softmax(s.logits / T, -1)).sum()
            for s, t in zip(students, teachers, strict=True)
        ]
        return found | {"soft": sum(soft) / len(soft)}

    return terms


def maps_kl(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """1 / (A L) sum KL over heads and queries of maps [A, L, L] before their softmax, all queries of the batch alike."""
    total, rows = 0.0, 0
    for a, b in zip(students, teachers, strict=True):
        total = total + F.kl_div(F.log_softmax(a, -1), F.softmax(b, -1), reduction="sum")
        rows += a.shape[0] * a.shape[1]
    return total / rows


def relation(x: Tensor, heads: int) -> Tensor:
    """x x^T / sqrt(d) of [L, H], head by head."""
    d = x.shape[1] // heads
    return torch.stack([x[:, h * d : h * d + d] @ x[:, h * d : h * d + d].T / d**0.5 for h in range(heads)])


def minilm(student_layer: int = -1, teacher_layer: int = -1):
    def terms(students, teachers, blocks, batch):
        value = (
            [relation(r.v[layer], r.heads) for r in rs]
            for rs, layer in ((students, student_layer), (teachers, teacher_layer))
        )
        scores = ([r.scores(layer) for r in rs] for rs, layer in ((students, student_layer), (teachers, teacher_layer)))
        return {"attn": maps_kl(*scores), "value": maps_kl(*value)}

    return terms


def minilmv2(heads: int, student_layer: int = -1, teacher_layer: int = -1):
    def terms(students, teachers, blocks, batch):
        return {
            name: maps_kl(
                [relation(getattr(r, name)[student_layer], heads) for r in students],
                [relation(getattr(r, name)[teacher_layer], heads) for r in teachers],
            )
            for name in "qkv"
        }

    return terms
