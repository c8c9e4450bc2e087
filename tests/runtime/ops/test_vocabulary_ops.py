"""Entries of a vocabulary by id, and ids by the row that stands for each: against loops."""

import torch

from gkd_dsl.runtime.ops.registry import functions


def test_gather_vocabulary_picks_entries_and_passes_their_gradient():
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([5, 0, 6])
    out = functions()["gather_vocabulary"](x, ids)
    for row in range(2):
        for place in range(3):
            assert out[row, place].tolist() == [x[row, place, token].item() for token in (5, 0, 6)]
    out.sum().backward()
    assert x.grad.sum((0, 1)).tolist() == [6.0, 0.0, 0.0, 0.0, 0.0, 6.0, 6.0]
    assert torch.autograd.gradcheck(functions()["gather_vocabulary"], (x, ids))


def test_map_ids_leaves_what_is_negative():
    x = torch.tensor([[3, -100, 0], [-100, 1, 2]])
    rows = torch.tensor([1, 0, 1, 0])
    out = functions()["map_ids"](x, rows)
    assert out.tolist() == [[0, -100, 1], [-100, 0, 1]]
    assert x.tolist() == [[3, -100, 0], [-100, 1, 2]]
