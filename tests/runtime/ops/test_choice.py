"""The choice of tokens by scores against NumPy, with padding on either side."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dsl.runtime.ops.choice import related_tokens, salient_tokens


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(scores, valid, count, causal=False):
    """Salient tokens, and how the others relate to each of them."""
    chosen, near = [], []
    for maps, row in zip(scores.numpy(), valid.numpy(), strict=True):
        tokens = np.flatnonzero(row)
        weight = dict.fromkeys(tokens.tolist(), 0.0)
        for one in maps:
            for q in tokens:
                keys = [k for k in tokens if not causal or k <= q]
                p = np.exp(one[q, keys] - one[q, keys].max())
                for k, value in zip(keys, p / p.sum(), strict=True):
                    weight[int(k)] += value
        best = sorted(weight, key=lambda k: -weight[k])[:count]
        chosen.append(best + [-1] * (count - len(best)))
        total = maps.sum(0)
        rows = []
        for anchor in chosen[-1]:
            others = [k for k in tokens.tolist() if anchor >= 0 and k != anchor and (not causal or k <= anchor)]
            others = sorted(others, key=lambda k: -total[anchor, k])[:count]
            rows.append(others + [-1] * (count - len(others)))
        near.append(rows)
    return torch.tensor(chosen), torch.tensor(near)


@pytest.mark.parametrize("causal", [False, True])
@given(length=st.integers(1, 7), count=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_choices_equal_the_loops(causal, length, count, seed) -> None:
    scores = draw(3, 2, length, length, seed=seed)
    valid = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) > 0.3
    chosen, near = by_hand(scores, valid, count, causal)
    found = salient_tokens(scores, count=count, valid=valid, causal=causal)
    assert torch.equal(found, chosen)
    assert torch.equal(related_tokens(scores, found, count=count, valid=valid, causal=causal), near)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_chosen_and_moves_indices_only(side) -> None:
    scores = draw(2, 2, 4, 4)
    valid = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    around = (2, 0, 2, 0) if side == "left" else (0, 2, 0, 2)
    padded = torch.nn.functional.pad(scores, around, value=float("inf"))
    mask = torch.nn.functional.pad(valid.int(), around[:2]).bool()
    shift = 2 if side == "left" else 0
    chosen = salient_tokens(scores, count=3, valid=valid)
    found = salient_tokens(padded, count=3, valid=mask)
    assert torch.equal(torch.where(found >= 0, found - shift, found), chosen)
    near = related_tokens(scores, chosen, count=3, valid=valid)
    found = related_tokens(padded, found, count=3, valid=mask)
    assert torch.equal(torch.where(found >= 0, found - shift, found), near)


def test_equal_scores_keep_the_order_and_no_gradient_flows() -> None:
    scores = torch.zeros(1, 1, 5, 5, requires_grad=True)
    chosen = salient_tokens(scores, count=3)
    assert chosen.tolist() == [[0, 1, 2]]
    assert related_tokens(scores, chosen, count=2).tolist() == [[[1, 2], [0, 2], [0, 1]]]
    assert not chosen.requires_grad
