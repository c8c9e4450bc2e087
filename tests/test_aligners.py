import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gkd_dsl import aligners

layers = st.integers(1, 48)


def test_tinybert_four_of_twelve():
    assert aligners.uniform(4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]


def test_uniform_where_the_sizes_do_not_divide():
    assert aligners.uniform(4, 6) == [(0, 1), (1, 2), (2, 4), (3, 5)]


def test_pkd_skip_and_last_as_in_the_paper():
    # Hidden states count from 1 here: the student's 1 to 5 learn from 2, 4, ..., 10 or from 7 to 11.
    assert [(i + 1, j + 1) for i, j in aligners.skip(6, 12)] == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]
    assert [(i + 1, j + 1) for i, j in aligners.last(6, 12)] == [(1, 7), (2, 8), (3, 9), (4, 10), (5, 11)]


def test_distilbert_takes_every_other_layer():
    assert [j for _, j in aligners.stride(6, 12)] == [0, 2, 4, 6, 8, 10]


def test_options():
    assert aligners.skip(2, 4, include_last=True) == [(0, 1), (1, 3)]
    assert aligners.last(3, 6, include_last=True) == [(0, 3), (1, 4), (2, 5)]
    assert aligners.last(3, 6, n=1, include_last=True) == [(2, 5)]
    assert aligners.last(3, 6, n=1) == [(1, 4)]
    assert aligners.first(3, 6, n=2) == [(0, 0), (1, 1)]
    assert aligners.first(6, 3, n=3) == [(0, 0), (1, 1), (2, 2)]
    assert aligners.stride(3, 12, step=4, start=3) == [(0, 3), (1, 7), (2, 11)]
    assert aligners.all_pairs(2, 2) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@given(layers, layers)
def test_uniform_cuts_the_teacher_into_near_equal_runs(students, teachers):
    assume(students <= teachers)
    pairs = aligners.uniform(students, teachers)
    assert [i for i, _ in pairs] == list(range(students))
    ends = [j for _, j in pairs]
    assert ends[-1] == teachers - 1
    runs = [b - a for a, b in zip([-1, *ends], ends, strict=False)]
    assert max(runs) - min(runs) <= 1
    assert min(runs) >= 1


@given(layers, st.integers(1, 6))
def test_skip_is_uniform_without_the_last(students, ratio):
    whole = aligners.uniform(students, students * ratio)
    assert aligners.skip(students, students * ratio, include_last=True) == whole
    if students > 1:
        assert aligners.skip(students, students * ratio) == whole[:-1]


@given(layers, layers)
def test_last_ends_before_the_last_and_keeps_the_distance(students, teachers):
    assume(2 <= students <= teachers)
    pairs = aligners.last(students, teachers)
    assert pairs[-1] == (students - 2, teachers - 2)
    assert {j - i for i, j in pairs} == {teachers - students}


@given(layers, layers, st.integers(0, 2**31), st.integers(0, 50), st.data())
def test_a_drawn_map_is_sorted_distinct_within_bounds_and_repeatable(students, teachers, seed, epoch, data):
    assume(students <= teachers)
    n = data.draw(st.none() | st.integers(1, students))
    pairs = aligners.random_sorted(students, teachers, n=n, seed=seed, epoch=epoch)
    count = n if n is not None else max(1, students - 1)
    assert [i for i, _ in pairs] == list(range(count))
    drawn = [j for _, j in pairs]
    assert drawn == sorted(set(drawn))
    assert drawn[0] >= 0
    assert drawn[-1] <= (teachers - 1 if count == students else teachers - 2)
    assert pairs == aligners.random_sorted(students, teachers, n=n, seed=seed, epoch=epoch)
    assert set(pairs) <= set(aligners.possible_pairs(students, teachers, n))


def test_the_drawn_map_changes_with_the_epoch_and_the_seed_and_reaches_every_possible_pair():
    by_epoch = [tuple(aligners.random_sorted(3, 7, seed=7, epoch=e)) for e in range(200)]
    assert len(set(by_epoch)) == 15  # 2 of the 6 blocks before the last
    assert {pair for pairs in by_epoch for pair in pairs} == set(aligners.possible_pairs(3, 7))
    assert by_epoch != [tuple(aligners.random_sorted(3, 7, seed=8, epoch=e)) for e in range(200)]


def test_the_drawn_map_is_the_same_on_every_machine():
    drawn = [[j for _, j in aligners.random_sorted(4, 12, seed=7, epoch=e)] for e in range(3)]
    assert drawn == [[3, 5, 7], [1, 8, 9], [1, 2, 8]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: aligners.uniform(7, 6), "more layers (7) than the teacher (6)"),
        (lambda: aligners.skip(4, 6), "not a whole multiple"),
        (lambda: aligners.skip(1, 6), "include_last"),
        (lambda: aligners.last(1, 6), "include_last"),
        (lambda: aligners.last(3, 6, n=3), "1 to 2 pairs"),
        (lambda: aligners.first(7, 6), "more layers"),
        (lambda: aligners.first(2, 6, n=0), "1 to 2 pairs"),
        (lambda: aligners.first(2, 6, n=1.5), "whole number"),
        (lambda: aligners.stride(4, 6), "not a whole multiple"),
        (lambda: aligners.stride(4, 6, step=2), "teacher layer 6"),
        (lambda: aligners.stride(4, 6, step=0), "at least 1"),
        (lambda: aligners.stride(2, 6, start="1"), "whole number"),
        (lambda: aligners.all_pairs(0, 6), "at least one layer"),
        (lambda: aligners.random_sorted(4, 3), "more layers"),
        (lambda: aligners.random_sorted(4, 12, n=5), "1 to 4 pairs"),
    ],
)
def test_no_such_map_is_said_in_a_sentence(call, words):
    with pytest.raises(ValueError, match=r".") as error:
        call()
    assert words in str(error.value)
