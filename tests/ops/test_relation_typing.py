"""Calls of relations, angles, choices, spans, attention over layers and the contrastive loss: types and refusals."""

import pytest

from gkd_dsl.ops import registry
from gkd_dsl.ops.typing import Mismatch, Typed, check_call
from gkd_dsl.types import BATCH as B
from gkd_dsl.types import LENGTH as L
from gkd_dsl.types import Dim, LossType, TensorType

S_H, T_H, A, D, N = Dim("s.H", 312), Dim("t.H", 768), Dim("s.A", 12), Dim("s.D", 26), Dim("n", 4)


def floats(*dims):
    return TensorType("float", dims)


def ints(*dims):
    return TensorType("int", dims)


def pair(student, teacher):
    return {"student": floats(*student), "teacher": floats(*teacher)}


def call(name, tensors, **values):
    return check_call(registry.lookup(name), tensors, values)


TOKENS, TEXTS, LAYERS = ((B, L, S_H), (B, L, T_H)), ((B, S_H), (B, T_H)), ((B, L, S_H, N), (B, L, T_H, N))
CHOSEN = {"anchors": ints(B, Dim("k", 20)), "neighbours": ints(B, Dim("k", 20), Dim("m", 5))}


@pytest.mark.parametrize(
    ("name", "tensors", "values", "expected"),
    [
        ("cosine_relation", {"x": floats(B, L, S_H)}, {}, floats(B, L, L)),
        ("cosine_relation", {"x": floats(B, A, L, D)}, {}, floats(B, A, L, L)),
        ("layer_relation", {"x": floats(B, L, S_H, N)}, {}, floats(B, L, N, N)),
        ("layer_relation", {"x": floats(B, S_H, N)}, {}, floats(B, N, N)),
        ("relation_kl", pair((B, L, L), (B, L, L)), {}, LossType((B, L))),
        ("relation_kl", pair((B, A, L, L), (B, A, L, L)), {}, LossType((B, A, L))),
        ("relation_kl", pair((B, L, N, N), (B, L, N, N)), {}, LossType((B, L, N))),
        ("relation_kl", pair((B, N, N), (B, N, N)), {}, LossType((B, N))),
        ("relation_kl", pair((B, L, L), (B, L, L)), {"denominator": "pairs"}, LossType((B, L, L))),
        ("relation_kl", pair((B, L, N, N), (B, L, N, N)), {"denominator": "pairs"}, LossType((B, L, N, N))),
        ("sample_relation_kl", pair(*TEXTS), {}, LossType((B,))),
        ("token_angle", pair(*TOKENS), {}, LossType((B, L))),
        ("token_angle", pair(*TOKENS), {"window": 21, "denominator": "window"}, LossType((B, L))),
        ("layer_angle", pair(*LAYERS), {}, LossType((B, L))),
        ("layer_angle", pair((B, S_H, N), (B, T_H, N)), {}, LossType((B,))),
        ("sample_angle", pair(*TEXTS), {"heads": 12}, LossType((B,))),
        ("anchor_angle", pair(*TOKENS) | CHOSEN, {}, LossType((B,))),
        ("salient_tokens", {"scores": floats(B, A, L, L)}, {"count": 20}, ints(B, Dim("count", 20))),
        (
            "related_tokens",
            {"scores": floats(B, A, L, L), "anchors": CHOSEN["anchors"]},
            {"count": 5},
            ints(B, Dim("k", 20), Dim("count", 5)),
        ),
        ("segment_starts", {"x": ints(B, L)}, {}, TensorType("bool", (B, L))),
        ("random_segment_starts", {"x": ints(B, L)}, {"share": 0.5}, TensorType("bool", (B, L))),
        ("segment_mean", {"x": floats(B, L, S_H), "starts": TensorType("bool", (B, L))}, {}, floats(B, L, S_H)),
        ("layer_attention", {"query": floats(B, S_H), "layers": floats(B, S_H, N)}, {}, floats(B, S_H)),
        ("layer_attention", {"query": floats(B, L, S_H), "layers": floats(B, L, S_H, N)}, {}, floats(B, L, S_H)),
        ("mean_square", {"x": floats(B, L, S_H)}, {}, floats(B, L)),
        ("contrastive", pair((B, S_H), (B, S_H)), {}, LossType((B,))),
        ("contrastive", pair((B, L, S_H), (B, L, S_H)), {"negatives": "student"}, LossType((B, L))),
    ],
)
def test_types(name, tensors, values, expected) -> None:
    found = call(name, tensors, **values)
    assert isinstance(found, Typed), found
    assert found.type == expected


@pytest.mark.parametrize(
    ("name", "tensors", "values", "kind", "said"),
    [
        ("token_angle", pair(*TOKENS), {"window": 20}, "condition", "window % 2 = 0"),
        ("token_angle", pair(*TOKENS), {"window": 1}, "out_of_range", "3 ..= 1e+06"),
        ("token_angle", pair(*TOKENS), {"error": "cubed"}, "out_of_range", '"squared" or "smooth_l1"'),
        ("layer_angle", pair((B, S_H, Dim("n", 2)), (B, T_H, Dim("n", 2))), {}, "condition", "less than 3"),
        ("layer_angle", pair((B, S_H, N), (B, T_H, Dim("n", 5))), {}, "axis", "equal axes"),
        ("sample_angle", pair(*TEXTS), {"heads": 64}, "condition", "not divisible by heads = 64"),
        ("relation_kl", pair((B, L, L), (B, L, L)), {"denominator": "cells"}, "out_of_range", '"rows" or "pairs"'),
        ("anchor_angle", pair(*TOKENS), {}, "missing_argument", "anchors"),
        ("contrastive", pair(*TEXTS), {}, "axis", "equal axes"),
        ("contrastive", pair((B, S_H), (B, S_H)), {"negatives": "both"}, "out_of_range", '"teacher" or "student"'),
        ("layer_attention", {"query": floats(B, S_H), "layers": floats(B, T_H, N)}, {}, "axis", "equal axes"),
        ("segment_starts", {"x": ints(B, L)}, {"share": 1.5}, "out_of_range", "0 ..= 1"),
    ],
)
def test_refusals(name, tensors, values, kind, said) -> None:
    found = call(name, tensors, **values)
    assert isinstance(found, Mismatch), found
    assert found.kind == kind
    assert said in found.message
