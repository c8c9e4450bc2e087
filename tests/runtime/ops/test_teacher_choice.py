"""Operators that choose among teachers: equal bins of the batch, plain numbers by a condition, tanh."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dsl.runtime.ops.registry import apply


def bins(values, count):
    """By counting: how many samples come before each."""
    found = []
    for i, x in enumerate(values):
        before = sum(y < x or (y == x and j < i) for j, y in enumerate(values))
        found.append(before * count // len(values))
    return found


@given(st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 3.0]), min_size=1, max_size=9), st.integers(1, 5))
@settings(deadline=None)
def test_a_bin_holds_the_samples_that_counting_puts_there(values, count):
    found = apply("rank_bin", {"x": torch.tensor(values)}, {"bins": count})
    assert found.dtype == torch.int64
    assert found.tolist() == bins(values, count)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_bins_are_equal_where_they_divide_the_batch(count):
    values = torch.tensor([0.3, -1.0, 2.0, 0.1, 5.0, 0.2])
    assert apply("rank_bin", {"x": values}, {"bins": count}).bincount().tolist() == [6 // count] * count


def test_four_samples_by_hand():
    found = apply("rank_bin", {"x": -torch.tensor([0.9, 0.1, 0.5, 0.7])}, {"bins": 2})
    assert found.tolist() == [0, 1, 1, 0]


def test_an_order_has_no_gradient():
    x = torch.tensor([1.0, 0.0], requires_grad=True)
    assert not apply("rank_bin", {"x": x}, {"bins": 2}).requires_grad


def test_select_of_plain_numbers():
    cond = torch.tensor([[True, False], [False, False]])
    found = apply("select", {"cond": cond}, {"a": 1, "b": 0.25})
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.0, 0.25], [0.25, 0.25]]


def test_tanh_and_its_slope():
    x = torch.tensor([-1e4, -3.0, -0.2, 0.0, 0.7, 1e4], dtype=torch.float64, requires_grad=True)
    value = apply("tanh", {"x": x}, {})
    np.testing.assert_allclose(value.detach(), [math.tanh(number) for number in x.tolist()], rtol=1e-14)
    value.sum().backward()
    np.testing.assert_allclose(x.grad, [1 - math.tanh(number) ** 2 for number in x.tolist()], rtol=1e-10, atol=1e-15)
