"""A loss on a tap before what the stage trains is refused; one after it, or beside it, is not."""

from __future__ import annotations

import pytest
from meaning_help import SOFT, check, codes, spec, stage

PROJECT = "project W = linear(s.H -> t.H)\n"


def codes_of(tap: str, train: str, other: str | None = None) -> list[str]:
    side = tap if tap in ("s.logits", "s.layer[2].attn.v") else f"{tap} |> W"
    if tap == "s.logits":
        loss = "loss one = kl(s.logits <- t.logits)\n"
    elif tap == "s.layer[2].attn.v":
        loss = "loss one = attention_kl(self_relation(s.layer[2].attn.v) <- self_relation(t.layer[8].attn.v))\n"
    else:
        loss = PROJECT + f"loss one = mse({side} <- {other or 't.final'})\n"
    return codes(check(spec(SOFT + loss + stage(f"train {train}\nminimize soft + one"))))


@pytest.mark.parametrize(
    ("tap", "train"),
    [
        ("s.embed", "s.layer[0]"),
        ("s.hidden[0]", "s.layer[3], s.head"),
        ("s.layer[0].in", "s.layer[0]"),
        ("s.layer[1].out", "s.layer[2 ..< 4]"),
        ("s.layer[1].mlp", "s.layer[2]"),
        ("s.final", "s.head"),
        ("s.layer[2].attn.v", "s.layer[3]"),
    ],
)
def test_too_early(tap: str, train: str) -> None:
    assert codes_of(tap, train) == ["E0340"]


@pytest.mark.parametrize(
    ("tap", "train"),
    [
        ("s.embed", "s.embed"),
        ("s.embed", "s.layer[3], W"),
        ("s.embed", "s"),
        ("s.layer[1].out", "s.layer[1]"),
        ("s.layer[1].mlp", "s.embed, s.layer[3]"),
        ("s.layer[2].attn.v", "s.layer[2]"),
        ("s.final", "s.layer[3]"),
        ("s.final", "s.body"),
        ("s.logits", "s.head"),
    ],
)
def test_reached(tap: str, train: str) -> None:
    assert codes_of(tap, train) == []


def test_a_frozen_part_counts_as_not_trained() -> None:
    loss = PROJECT + "loss one = mse(s.embed |> W <- t.final)\n"
    frozen = stage("freeze s.embed, W\nminimize soft + one")
    assert codes(check(spec(SOFT + loss + frozen))) == ["E0340"]


def test_the_note_names_where_the_gradient_ends() -> None:
    loss = PROJECT + "loss one = mse(s.layer[0].out |> W <- t.final)\n"
    found = check(spec(SOFT + loss + stage("train s.layer[2]\nminimize soft + one"))).diagnostics
    assert any("`s.hidden[1]`" in note.text for diagnostic in found for note in diagnostic.notes)


@pytest.mark.parametrize(
    ("anchor", "warned"),
    [
        ("", True),
        ("0.5 * mean(mean_square(detach(t.cls) |> W))", False),
        ("0.5 * mse(detach(t.cls) |> W |> R <- t.cls)", False),
        ("0.0 * mse(detach(t.cls) |> W |> R <- t.cls)", True),
        ("0.5 * mse(s.cls <- t.cls |> W)", True),
    ],
)
def test_a_projection_of_the_teacher_is_anchored_by_a_loss_without_a_student(anchor: str, warned: bool) -> None:
    body = "project W = linear(t.H -> s.H)\nproject R = linear(s.H -> t.H)\nloss near = mse(s.final <- t.final |> W)\n"
    extra = f"loss anchor = {anchor}\n" if anchor else ""
    checked = check(spec(body + extra + stage("minimize near" + (" + anchor" if anchor else ""))))
    assert ("W0704" in codes(checked)) == warned
    assert checked.ok
