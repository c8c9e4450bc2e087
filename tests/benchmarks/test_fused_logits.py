"""The benchmark of fused logits: the floor, and that the contestants compute the same."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import fused_logits as bench


def test_the_floor_is_two_gradients_and_a_tile():
    assert bench.floor_bytes((1024, 151936, 1024), 4) / bench.MIB == pytest.approx(672, abs=0.5)
    assert bench.floor_bytes((100, 10, 4), 2) == 2 * (40 + 400 + 1000)


def test_the_naive_form_is_the_divergence_of_softmaxes():
    made = bench.world((5, 7, 3), "cpu", torch.float64, 0)
    q, p = torch.softmax(made.x @ made.w.T, -1), torch.softmax(made.tx @ made.tw.T, -1)
    m = (p + q) / 2
    expected = {
        "kl": (p * (p / q).log()).sum(-1).mean(),
        "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean() / 2,
    }
    for loss in bench.LOSSES:
        torch.testing.assert_close(bench.naive(made, loss), expected[loss], rtol=1e-5, atol=1e-6, check_dtype=False)


def test_contestants_that_are_here_agree(monkeypatch):
    here = {name: bench.WAYS[name] for name in ("naive", "checkpoint", "ours")}
    monkeypatch.setattr(bench, "WAYS", here)
    assert max(bench.agree("cpu", 0).values()) < 1e-5
    monkeypatch.setitem(here, "ours", lambda world, loss: 1.1 * bench.naive(world, loss))
    with pytest.raises(SystemExit, match="do not agree"):
        bench.agree("cpu", 0)


def test_a_shape_that_ran_out_of_memory_is_a_row():
    runs = [{"peak": 4 * bench.MIB, "times": [2.0, 2.0], "products": [1.0, 1.0], "load": 0.5}]
    text = bench.section((256, 4096, 64), ["ours", "naive"], {("ours", "kl"): runs}, 4)
    assert "| kl | ours | 4 | 1.31 | 2.000 (2.000 .. 2.000) | 2.00 (2.00 .. 2.00) |" in text
    assert "| kl | naive | out of memory, or failed |" in text
