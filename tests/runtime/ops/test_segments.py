"""Spans of tokens by loops, with padding on either side, drawn and not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dsl.runtime.ops.segments import random_segment_starts, segment_mean, segment_starts

ROWS = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spans_of(count, share):
    return min(count, max(1, int(count * share + 0.5)))


@given(rows=ROWS, share=st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.75, 1.0]))
@settings(max_examples=40, deadline=None)
def test_near_equal_spans(rows, share) -> None:
    mask = torch.tensor(rows).int()
    starts = segment_starts(mask, share=share)
    for row, found in zip(mask.tolist(), starts.tolist(), strict=True):
        tokens = [place for place, there in enumerate(row) if there]
        if not tokens:
            assert not any(found)
            continue
        m = spans_of(len(tokens), share)
        span = [r * m // len(tokens) for r in range(len(tokens))]
        wanted = {place for r, place in enumerate(tokens) if r == 0 or span[r] != span[r - 1]}
        assert {place for place, start in enumerate(found) if start} == wanted
        assert len(wanted) == m
        sizes = np.bincount(span)
        assert sizes.max() - sizes.min() <= 1


@given(rows=ROWS, share=st.sampled_from([0.0, 0.4, 0.75, 1.0]), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_drawn_spans_are_as_many_and_start_at_the_first_token(rows, share, seed) -> None:
    mask = torch.tensor(rows).int()
    starts = random_segment_starts(mask, share=share, generator=torch.Generator().manual_seed(seed))
    again = random_segment_starts(mask, share=share, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(starts, again)
    assert torch.equal(starts.sum(1), segment_starts(mask, share=share).sum(1))
    assert not (starts & (mask == 0)).any()
    for row, found in zip(mask.tolist(), starts.tolist(), strict=True):
        if any(row):
            assert found[row.index(1)]


def test_every_cut_is_as_likely() -> None:
    mask = torch.ones(4000, 6).int()
    starts = random_segment_starts(mask, share=0.5, generator=torch.Generator().manual_seed(0))
    shares = starts.double().mean(0)
    assert shares[0] == 1
    # 2 of 5 places: 0.4 each, four standard errors of 4000 draws.
    assert (shares[1:] - 0.4).abs().max() < 4 * (0.4 * 0.6 / 4000) ** 0.5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("drawn", [False, True])
def test_padding_moves_no_cut(side, drawn) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    own = mask if side == "right" else mask.flip(1)
    longer = torch.nn.functional.pad(own, (20, 0) if side == "left" else (0, 20))

    def cut(x):
        generator = torch.Generator().manual_seed(3)
        return random_segment_starts(x, generator=generator) if drawn else segment_starts(x)

    for one, other in ((own, longer), (mask, own)):
        first, second = cut(one), cut(other)
        for row in range(2):
            assert torch.equal(first[row][one[row] != 0], second[row][other[row] != 0])


def test_means_equal_the_loop() -> None:
    x = draw(3, 6, 2)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    starts = torch.tensor([[1, 0, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    found = segment_mean(torch.where(valid.unsqueeze(-1), x, x.new_tensor(float("nan"))), starts, valid=valid)
    wanted = torch.zeros_like(x)
    for b, places in ((0, [(0, 2), (2, 5), (5, 6)]), (1, [(2, 4)])):
        for first, end in places:
            wanted[b, first] = x[b, first:end].mean(0)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(segment_mean(x, starts)[0], wanted[0])


def test_spans_of_one_token_are_the_tokens_and_of_all_the_pool() -> None:
    x, valid = draw(2, 5, 3), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    each = segment_mean(x, segment_starts(valid, share=1.0), valid=valid)
    torch.testing.assert_close(each, torch.where(valid.unsqueeze(-1), x, x.new_zeros(())))
    whole = segment_mean(x, segment_starts(valid, share=0.0), valid=valid)
    torch.testing.assert_close(whole.sum(1), torch.stack((x[0].mean(0), x[1, 2:].mean(0))))


def test_gradients_and_no_edit_in_place() -> None:
    x = draw(2, 5, 3).requires_grad_()
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    starts = segment_starts(valid)
    kept, version = x.detach().clone(), x._version
    torch.autograd.gradcheck(lambda v: segment_mean(v, starts, valid=valid), (x,))
    assert x._version == version
    assert torch.equal(x, kept)
