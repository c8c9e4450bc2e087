import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd_dsl.schedules import (
    Arithmetic,
    AtCount,
    Clock,
    Coin,
    Comparison,
    Constant,
    CounterValue,
    Draw,
    Logic,
    Not,
    Ramp,
    Recent,
    Span,
    StageProgress,
    Stairs,
    bounds,
    counters,
    is_zero,
    settled,
    watched,
)

WHOLE = Span(100.0, "percent")


def clock(step=0, total=100, **rest):
    return Clock(step, total, 10.0, **rest)


def annealing(step, total, plateaus):
    """The formula of the paper's released code, in exact numbers."""
    left = (1 - Fraction(step, total)) * plateaus
    return 1 - Fraction(max(1, math.ceil(left)) - 1, plateaus)


@given(st.integers(1, 3000), st.sampled_from([2, 3, 7, 10, 13]), st.data())
def test_stairs_are_the_plateaus_of_annealing(total, plateaus, data):
    step = data.draw(st.integers(0, total - 1))
    schedule = Stairs(1 / plateaus, 1.0, plateaus, WHOLE)
    assert schedule.value(clock(step, total)) == pytest.approx(float(annealing(step, total, plateaus)), abs=1e-12)


@pytest.mark.parametrize("total", [1, 2, 11, 20, 71])
def test_stairs_are_those_of_annealing_at_each_step(total):
    for plateaus in (2, 7, 10):
        found = [Stairs(1 / plateaus, 1.0, plateaus, WHOLE).value(clock(step, total)) for step in range(total)]
        assert found == pytest.approx([float(annealing(step, total, plateaus)) for step in range(total)], abs=1e-12)


def test_seven_plateaus_go_from_a_seventh_to_one_and_are_equally_long():
    values = [Stairs(1 / 7, 1.0, 7, WHOLE).value(clock(step, 70)) for step in range(70)]
    assert [round(value, 4) for value in values[::10]] == [0.1429, 0.2857, 0.4286, 0.5714, 0.7143, 0.8571, 1.0]
    assert all(values[10 * k : 10 * k + 10] == [values[10 * k]] * 10 for k in range(7))
    assert values[-1] == 1.0


def test_stairs_in_epochs_change_at_whole_epochs_and_keep_their_end():
    schedule = Stairs(0.0, 2.0, 3, Span(6.0, "epochs"))
    assert [schedule.value(clock(step, 1000)) for step in (0, 19, 20, 39, 40, 60, 999)] == [0, 0, 1, 1, 2, 2, 2]


@given(st.floats(0.0, 1.0), st.integers(0, 2**31), st.integers(0, 10**6))
def test_a_coin_is_a_function_of_seed_name_and_step(p, seed, step):
    at = clock(step, 10**7, seed=seed)
    draw = Coin(Constant(p), "a").value(at)
    assert draw in (0.0, 1.0)
    assert draw == Coin(Constant(p), "a").value(clock(step, 5, seed=seed, micro=3, tokens=9))


def test_coins_of_other_names_seeds_and_steps_are_independent():
    def draws(name, seed):
        return [Coin(Constant(0.5), name).value(clock(step, seed=seed)) for step in range(4000)]

    found = [draws(name, seed) for name in ("a", "b") for seed in (0, 1)]
    for number, one in enumerate(found):
        assert sum(one) == pytest.approx(2000, abs=160)  # Five standard deviations.
        for two in found[:number]:
            assert sum(a == b for a, b in zip(one, two, strict=True)) == pytest.approx(2000, abs=160)


def test_a_coin_of_one_always_falls_and_of_zero_never():
    for step in range(200):
        assert Coin(Constant(1.0), "a").value(clock(step)) == 1.0
        assert Coin(Constant(0.0), "a").value(clock(step)) == 0.0
    assert bounds(Coin(Constant(1.0), "a")) == (1.0, 1.0)
    assert is_zero(Coin(Constant(0.0), "a"))
    for low, high in ((0.2, 0.8), (0.0, 1.0), (0.0, 0.5), (0.5, 1.0)):
        assert bounds(Coin(Ramp(low, high, WHOLE), "a")) == (0.0, 1.0)


def test_the_probability_of_a_coin_may_be_a_schedule():
    rising = Coin(Ramp(0.0, 1.0, WHOLE), "a")
    early = sum(rising.value(clock(step, 10_000)) for step in range(1000))
    late = sum(rising.value(clock(step, 10_000)) for step in range(9000, 10_000))
    assert early == pytest.approx(50, abs=40)
    assert late == pytest.approx(950, abs=40)


@given(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), st.integers(-3, 3), st.integers(-3, 3))
def test_comparisons_are_those_of_numbers_and_their_bounds_know_constants(op, a, b):
    holds = float(eval(f"{a} {op} {b}"))
    comparison = Comparison(op, Constant(float(a)), Constant(float(b)))
    assert comparison.value(clock()) == holds
    assert bounds(comparison) == (holds, holds)
    assert settled(comparison) == Constant(holds)


@given(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]))
def test_a_comparison_with_what_is_not_a_number_is_false(op):
    unknown = Arithmetic("/", Constant(1.0), Constant(0.0))
    for sides in ((unknown, Constant(1.0)), (Constant(1.0), unknown), (unknown, unknown)):
        assert Comparison(op, *sides).value(clock()) == 0.0
        assert bounds(Comparison(op, *sides)) == (0.0, 1.0)


@given(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), st.integers(0, 5), st.integers(0, 5), st.integers(-1, 6))
def test_bounds_of_a_comparison_with_a_counter_hold_at_each_of_its_values(op, start, more, other):
    counter = CounterValue("k", start, start + more)
    for sides in ((counter, Constant(float(other))), (Constant(float(other)), counter)):
        comparison = Comparison(op, *sides)
        low, high = bounds(comparison)
        values = {comparison.value(clock(counters=(("k", v),))) for v in range(start, start + more + 1)}
        assert (low, high) == (min(values), max(values)) or (low, high) == (0.0, 1.0)


@given(st.booleans(), st.booleans())
def test_and_or_not(a, b):
    left, right = Constant(float(a)), Constant(float(b))
    assert Logic("and", left, right).value(clock()) == float(a and b)
    assert Logic("or", left, right).value(clock()) == float(a or b)
    assert Not(left).value(clock()) == float(not a)
    assert bounds(Logic("and", left, right)) == (float(a and b),) * 2
    assert bounds(Logic("or", left, right)) == (float(a or b),) * 2
    assert bounds(Not(left)) == (float(not a),) * 2


def test_a_counter_is_read_from_the_clock_and_begins_at_its_start():
    k = CounterValue("m/k", 1, 4)
    assert k.value(clock()) == 1.0
    assert k.value(clock(counters=(("j", 9), ("m/k", 3)))) == 3.0
    assert bounds(k) == (1.0, 4.0)
    assert counters(Arithmetic("*", Constant(2.0), Comparison("<", Constant(0.0), k))) == {"m/k"}


def test_at_each_count_its_own_case_is_in_force():
    cases = AtCount("k", 1, (Constant(5.0), Constant(7.0), Recent("c", 2)))
    assert [cases.value(clock(counters=(("k", v),))) for v in (1, 2)] == [5.0, 7.0]
    assert cases.now(clock(counters=(("k", 3),))) == Recent("c", 2)
    assert cases.now(clock(counters=(("k", 8),))) == Recent("c", 2)
    assert bounds(cases) is None
    assert bounds(AtCount("k", 1, (Constant(5.0), Constant(7.0)))) == (5.0, 7.0)


def test_what_is_watched_is_what_the_case_in_force_reads():
    cases = AtCount("k", 1, (Comparison("<", Recent("a", 2), Constant(1.0)), Constant(0.0), Not(Recent("b", 3))))
    either = Logic("or", cases, Comparison(">", Recent("c", 1), Recent("d", 4)))
    for value, losses in ((1, {"a", "c", "d"}), (2, {"c", "d"}), (3, {"b", "c", "d"})):
        assert watched(either, clock(counters=(("k", value),))) == losses
    assert watched(either, clock()) == {"a", "c", "d"}


def test_a_recent_loss_is_asked_of_the_clock():
    assert math.isnan(Recent("soft", 3).value(clock()))
    assert Recent("soft", 3).value(clock(recent=lambda name, n: {"soft": 10.0 + n}[name])) == 13.0


def test_progress_of_the_stage():
    at = clock(25, 100)
    assert [StageProgress(what).value(at) for what in ("progress", "step", "epoch")] == [0.25, 25.0, 2.5]
    assert StageProgress("progress").value(clock(99, 100)) < 1.0
    assert [bounds(StageProgress(what)) for what in ("progress", "step", "epoch")] == [
        (0.0, 1.0), (0.0, math.inf), (0.0, math.inf),
    ]  # fmt: skip
    later = Comparison(">=", StageProgress("epoch"), Constant(2.0))
    assert settled(later) == later
    # Arithmetic over an unbounded interval: 0 times infinity is not a number, and has no bounds.
    assert bounds(Arithmetic("*", Constant(0.0), StageProgress("step"))) is None


def test_text_is_as_written():
    assert str(Stairs(1 / 7, 1.0, 7, WHOLE)) == "stairs(0.142857 -> 1, count = 7, until = 100%)"
    k = CounterValue("m/k", 1, 4)
    assert str(Logic("or", Comparison("<", Constant(2.0), k), Not(Coin(Constant(0.5), "c")))) == (
        "((2 < k) or not coin(0.5, c))"
    )
    assert str(AtCount("m/k", 1, (Recent("a", 2), Constant(0.0)))) == ("at k = 1: mean(a, last = 2 steps); at k = 2: 0")
    assert str(Comparison(">=", StageProgress("progress"), Constant(0.5))) == "(stage.progress >= 0.5)"


def test_a_draw_is_uniform_follows_from_seed_name_and_step_and_stays_in_its_bounds():
    draw = Draw(4, "x")
    found = [draw.value(clock(step)) for step in range(4000)]
    counts = [found.count(float(number)) for number in range(4)]
    assert sum(counts) == 4000
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts)
    assert found == [draw.value(clock(step, micro=3)) for step in range(4000)]
    for other in (Draw(4, "y").value, lambda at: draw.value(clock(at.step, seed=1))):
        assert found[:50] != [other(clock(step)) for step in range(50)]
    assert bounds(draw) == (0.0, 3.0)
    assert settled(Comparison("==", draw, Constant(4.0))) == Constant(0.0)
    assert str(draw) == "draw(4, x)"
