"""Suggestions and the catalogue of codes."""

from __future__ import annotations

import pytest

from gkd_dsl.diagnostics.catalogue import UnknownCodeError, codes, explain
from gkd_dsl.diagnostics.suggest import did_you_mean

TAPS = ("hidden", "layer", "embed", "logits", "module", "final", "cls", "pooled")


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("hiden", "hidden"),
        ("hdiden", "hidden"),
        ("Hidden", "hidden"),
        ("logit", "logits"),
        ("lgoits", "logits"),
        ("embeddings", "embed"),
        ("csl", "cls"),
        ("layers", "layer"),
    ],
)
def test_near_names(name: str, first: str) -> None:
    assert did_you_mean(name, TAPS)[:1] == [first]


def test_far_names_are_not_offered() -> None:
    assert did_you_mean("zebra", TAPS) == []
    assert did_you_mean("", TAPS) == []
    assert did_you_mean("x", ("y", "z")) == []
    assert did_you_mean("hidden", ["hidden"]) == []
    assert did_you_mean("x" * 1000, TAPS) == []


def test_at_most_n_and_case_first() -> None:
    names = ["loss_a", "loss_b", "loss_c", "loss_d", "Loss_x"]
    assert len(did_you_mean("loss_x", names)) <= 3
    assert did_you_mean("loss_x", names)[0] == "Loss_x"
    assert did_you_mean("num_labels", ["numLabels", "num_layers"])[0] == "numLabels"


def test_explain() -> None:
    assert explain("E0110").startswith("# ")
    assert explain("e0110") == explain(" E0110 ") == explain("110") == explain("0110")
    assert codes()["E0110"] == explain("E0110").splitlines()[0][2:]
    assert list(codes()) == sorted(codes())


@pytest.mark.parametrize("code", ["E0109", "E9999", "hello", "", "E", "11O"])
def test_unknown_codes(code: str) -> None:
    with pytest.raises(UnknownCodeError, match="no diagnostic has the code") as caught:
        explain(code)
    assert set(caught.value.near) <= set(codes())
    if code == "E0109":
        assert "E0110" in caught.value.near
