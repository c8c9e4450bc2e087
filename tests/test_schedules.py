import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd_dsl import aligners
from gkd_dsl.schedules import (
    Arithmetic,
    Clock,
    Constant,
    Cosine,
    InDrawnMap,
    Ramp,
    Span,
    StepAt,
    bounds,
    combine,
    is_zero,
)

numbers = st.floats(-1e6, 1e6, allow_nan=False)
totals = st.integers(2, 5000)
spans = st.one_of(
    st.builds(Span, st.floats(0.1, 100.0), st.just("percent")),
    st.builds(Span, st.integers(1, 2000).map(float), st.just("steps")),
    st.builds(Span, st.floats(0.1, 20.0), st.just("epochs")),
    st.builds(Span, st.integers(1, 10**6).map(float), st.just("tokens")),
)
shapes = st.one_of(st.builds(Ramp, numbers, numbers, spans), st.builds(Cosine, numbers, numbers, spans))


def clock(step, total, per_epoch=10.0):
    return Clock(step, total, per_epoch, tokens=step * 64)


@given(shapes, totals, st.floats(0.5, 500.0))
def test_a_ramp_starts_at_its_start_stays_within_its_ends_and_never_turns(schedule, total, per_epoch):
    steps = sorted({0, 1, total // 3, total // 2, total - 2, total - 1})
    values = [schedule.value(clock(step, total, per_epoch)) for step in steps]
    assert values[0] == schedule.start
    low, high = bounds(schedule)
    assert all(low <= value <= high for value in values)
    rising = schedule.end >= schedule.start
    assert all((b >= a) if rising else (b <= a) for a, b in itertools.pairwise(values))


@given(numbers, numbers, totals, st.sampled_from([Ramp, Cosine]))
def test_until_the_whole_stage_the_last_step_has_exactly_the_end(start, end, total, kind):
    schedule = kind(start, end, Span(100.0, "percent"))
    assert schedule.value(clock(total - 1, total)) == end
    assert schedule.value(clock(0, total)) == start


@given(numbers, numbers, st.integers(1, 500), st.sampled_from([Ramp, Cosine]))
def test_the_end_is_kept_after_its_duration(start, end, length, kind):
    for unit, amount in (("steps", length), ("epochs", length / 10), ("tokens", length * 64)):
        schedule = kind(start, end, Span(float(amount), unit))
        assert schedule.value(clock(length + 1, 10**6)) == end
        assert schedule.value(clock(10 * length + 7, 10**6)) == end


def test_units_mean_what_they_say():
    half = {
        "percent": (Span(10.0, "percent"), 5, 101),
        "steps": (Span(500.0, "steps"), 250, 9999),
        "epochs": (Span(3.0, "epochs"), 15, 9999),
        "tokens": (Span(6400.0, "tokens"), 50, 9999),
    }
    for span, step, total in half.values():
        assert span.fraction(clock(step, total)) == pytest.approx(0.5)
        assert Ramp(2.0, 4.0, span).value(clock(step, total)) == pytest.approx(3.0)
        assert Cosine(2.0, 4.0, span).value(clock(step, total)) == pytest.approx(3.0)


def test_a_quarter_of_a_half_cosine():
    schedule = Cosine(1.0, 0.0, Span(100.0, "steps"))
    assert schedule.value(clock(25, 1000)) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 20))
def test_step_at_changes_at_the_first_step_after_the_duration(steps, batches, accumulate):
    schedule = StepAt(1.0, 0.0, Span(float(steps), "steps"))
    assert [schedule.value(clock(s, 10**6)) for s in (steps - 1, steps)] == [1.0, 0.0]
    per_epoch = batches / accumulate
    after = math.ceil(2 * per_epoch - 1e-9)
    schedule = StepAt(1.0, 0.0, Span(2.0, "epochs"))
    assert schedule.value(clock(after, 10**6, per_epoch)) == 0.0
    assert schedule.value(clock(after - 1, 10**6, per_epoch)) == 1.0


def test_an_epoch_whose_quotient_falls_short_of_one_is_over():
    at = clock(9, 10**6, 9 / 7)
    assert at.epoch / 7 < 1.0
    assert StepAt(1.0, 0.0, Span(7.0, "epochs")).value(at) == 0.0


def test_a_duration_of_nothing_is_over_at_once():
    assert Ramp(0.0, 1.0, Span(0.0, "steps")).value(clock(0, 10)) == 1.0


@given(st.sampled_from("+-*"), shapes, shapes, totals)
def test_arithmetic_is_that_of_numbers_and_stays_in_its_bounds(op, left, right, total):
    schedule = combine(op, left, right)
    low, high = bounds(schedule)
    for step in (0, total // 2, total - 1):
        a, b = left.value(clock(step, total)), right.value(clock(step, total))
        value = schedule.value(clock(step, total))
        assert value == {"+": a + b, "-": a - b, "*": a * b}[op]
        assert low - 1e-6 * abs(low) <= value <= high + 1e-6 * abs(high)


@pytest.mark.parametrize("number", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("op", "+-*/")
def test_a_number_on_either_side_of_a_schedule_is_that_number(op, number):
    def plain(a, b):
        return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else math.nan}[op]

    ramp = Ramp(0.0, 3.0, Span(100.0, "percent"))
    for step in (0, 5, 10):
        at = clock(step, 11)
        for left, right in ((Constant(number), ramp), (ramp, Constant(number))):
            found, wanted = combine(op, left, right).value(at), plain(left.value(at), right.value(at))
            assert found == wanted or (math.isnan(found) and math.isnan(wanted))


def test_combine_folds_constants_and_neutral_numbers():
    ramp = Ramp(0.0, 1.0, Span(10.0, "percent"))
    assert combine("*", Constant(2.0), Constant(3.0)) == Constant(6.0)
    assert combine("*", Constant(1.0), ramp) is ramp
    assert combine("/", ramp, Constant(1.0)) is ramp
    assert combine("-", ramp, Constant(0.0)) is ramp
    assert combine("/", ramp, Constant(2.0)) == Arithmetic("/", ramp, Constant(2.0))
    assert is_zero(combine("*", Constant(0.0), Constant(3.0)))
    assert not is_zero(ramp)


def test_a_schedule_that_never_leaves_zero_is_zero():
    ramp = Ramp(0.0, 1.0, Span(10.0, "percent"))
    assert is_zero(combine("*", Constant(0.0), ramp))
    assert is_zero(combine("*", ramp, Constant(0.0)))
    assert is_zero(Ramp(0.0, 0.0, Span(10.0, "steps")))
    assert not is_zero(Ramp(0.0, 1e-9, Span(10.0, "steps")))
    # 0 / 0 at the start of the ramp is not a number, and must be seen.
    assert not is_zero(Arithmetic("/", Constant(0.0), ramp))


def test_division_by_what_may_be_zero_has_no_bounds_and_gives_nan():
    ramp = Ramp(0.0, 1.0, Span(10.0, "steps"))
    schedule = Arithmetic("/", Constant(1.0), ramp)
    assert bounds(schedule) is None
    assert math.isnan(schedule.value(clock(0, 100)))
    assert bounds(Arithmetic("/", Constant(1.0), Ramp(2.0, 4.0, Span(1.0, "epochs")))) == (0.25, 0.5)


@given(st.integers(0, 400), st.integers(0, 1000), st.sampled_from([1.0, 2.0, 0.5]))
def test_of_the_pairs_that_may_come_those_of_the_drawn_map_count(step, seed, every):
    at = clock(step, 1000, 20.0)
    counted = [
        pair for pair in aligners.possible_pairs(4, 9) if InDrawnMap(*pair, 4, 9, None, seed, every).value(at) == 1.0
    ]
    assert counted == aligners.random_sorted(4, 9, seed=seed, epoch=math.floor(step / 20.0 / every))


def test_a_map_is_drawn_anew_also_where_the_quotient_of_the_epochs_falls_short():
    at = clock(9, 1000, 9 / 7)
    assert at.epoch / 7 < 1.0
    pairs = aligners.random_sorted(4, 9, seed=3, epoch=1)
    assert pairs != aligners.random_sorted(4, 9, seed=3, epoch=0)
    assert all(InDrawnMap(*pair, 4, 9, None, 3, 7.0).value(at) == 1.0 for pair in pairs)


def test_text_is_as_written():
    assert str(Ramp(0.0, 1.0, Span(10.0, "percent"))) == "ramp(0 -> 1, until = 10%)"
    assert str(StepAt(1.0, 0.5, Span(3.0, "epochs"))) == "step_at(1 -> 0.5, at = 3 epochs)"
    assert str(Cosine(1.0, 0.0, Span(500.0, "steps"))) == "cosine(1 -> 0, until = 500 steps)"


@pytest.mark.parametrize(
    ("span", "words"),
    [
        (Span(1.0, "epochs"), "1 epoch"),
        (Span(1.0, "steps"), "1 step"),
        (Span(2.0, "epochs"), "2 epochs"),
        (Span(0.5, "epochs"), "0.5 epochs"),
        (Span(1.0, "percent"), "1%"),
    ],
)
def test_one_is_singular(span: Span, words: str) -> None:
    assert str(span) == words
