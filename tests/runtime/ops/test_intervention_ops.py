"""Samples exchanged, and spans drawn, by their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dsl.runtime.ops.interventions import random_spans, roll


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def masks(data, rows, length):
    """Valid tokens of each row, on the left, on the right, or with a hole."""
    return torch.tensor([[data.draw(st.integers(0, 1)) for _ in range(length)] for _ in range(rows)])


def runs(inside, mask):
    """The ranks among its row's tokens of what is in a span."""
    return [[int(rank) for rank in (row.cumsum(0) - 1)[chosen]] for chosen, row in zip(inside, mask, strict=True)]


def length_of(share, count):
    return 0 if share == 0.0 or count == 0 else max(1, int(share * count + 1e-9))


@pytest.mark.parametrize("by", [1, 2, 3, -1])
def test_a_row_is_that_of_the_sample_after_it(by):
    x = torch.arange(12).reshape(4, 3)
    got = roll(x, by=by)
    for row in range(4):
        assert torch.equal(got[row], x[(row + by) % 4])
    assert torch.equal(roll(x[:1]), x[:1])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_span_is_one_run_of_tokens(data):
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    share = data.draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]))
    mask = masks(data, rows, length)
    inside = random_spans(mask, share=share, generator=drawn(data.draw(st.integers(0, 99))))
    assert inside.dtype == torch.bool
    assert not inside[mask == 0].any()
    for ranks, row in zip(runs(inside, mask), mask, strict=True):
        assert len(ranks) == length_of(share, int(row.sum()))
        assert ranks == list(range(ranks[0], ranks[0] + len(ranks))) if ranks else True


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_two_runs_are_paired_in_their_order(data):
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    share = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    mask, other = masks(data, rows, length), masks(data, rows, length)
    at = random_spans(mask, other, share=share, generator=drawn(data.draw(st.integers(0, 99))))
    assert at.dtype == torch.int64
    assert at[mask == 0].eq(-1).all()
    for row in range(rows):
        sources = at[row][at[row] >= 0]
        ranks = runs((at >= 0)[row : row + 1], mask[row : row + 1])[0]
        assert len(ranks) == length_of(share, min(int(mask[row].sum()), int(other[row].sum())))
        assert ranks == list(range(ranks[0], ranks[0] + len(ranks))) if ranks else True
        assert other[row][sources].eq(1).all()
        there = [int(n) for n in (other[row].cumsum(0) - 1)[sources]]
        assert there == list(range(there[0], there[0] + len(there))) if there else True


@pytest.mark.parametrize(("share", "count", "long"), [(0.29, 100, 29), (0.57, 100, 57), (0.299, 10, 2)])
def test_a_share_that_is_just_short_of_a_whole_number_is_that_number(share, count, long):
    inside = random_spans(torch.ones(1, count, dtype=torch.long), share=share, generator=drawn(0))
    assert inside.sum() == long


def test_starts_are_uniform_and_independent():
    """Ten tokens, spans of three: eight starts in each text, all pairs of them as likely."""
    mask = torch.ones(20000, 10, dtype=torch.long)
    at = random_spans(mask, mask, share=0.3, generator=drawn(0))
    first = (at >= 0).int().argmax(1)
    source = at[torch.arange(len(at)), first]
    counts = torch.zeros(8, 8)
    counts.index_put_((first, source), torch.ones(len(at)), accumulate=True)
    expected = len(at) / 64
    assert ((counts - expected).abs() < 6 * expected**0.5).all()


def test_the_same_generator_draws_the_same():
    mask = torch.ones(5, 8, dtype=torch.long)
    assert torch.equal(random_spans(mask, generator=drawn(1)), random_spans(mask, generator=drawn(1)))
    assert not torch.equal(random_spans(mask, generator=drawn(1)), random_spans(mask, generator=drawn(2)))
