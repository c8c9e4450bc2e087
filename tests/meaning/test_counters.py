"""Coins, conditions, gates and counters in a spec: what they become in the graph and the plan."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meaning_help import HARD, REVIEWS, SHORT, SOFT, STUDENT, TEACHER, check, codes, good, inputs, node, spec, stage

from gkd_dsl.graph.draw_dot import to_dot
from gkd_dsl.graph.draw_mermaid import to_mermaid
from gkd_dsl.graph.draw_svg import to_svg
from gkd_dsl.graph.drawing import drawing
from gkd_dsl.graph.explain import explain
from gkd_dsl.graph.nodes import CounterNode
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.schema import fingerprint, from_json, to_json
from gkd_dsl.graph.verify import verify
from gkd_dsl.meaning.resolved import resolved_text
from gkd_dsl.schedules import (
    AtCount,
    Clock,
    Coin,
    Comparison,
    Constant,
    CounterValue,
    Logic,
    Recent,
    StageProgress,
    Stairs,
    parts,
)

INSIDE = "loss inside[i] = mse(cls(s.layer[i].out) |> W <- cls(t.layer[i].out))\nproject W = linear(s.H -> t.H)\n"
COUNTER = "counter k from 0 to 3 advance when mean(inside[k], last = 5 steps) < 0.5\n"
GATED = stage("minimize sum(gate(i < k) * inside[i] for i in 0 ..< 3) + hard")


def weights(checked, name="main"):
    plan = next(s for s in compile_plan(checked.graph).stages if s.name == name)
    return {loss.name: weight for loss, weight in zip(plan.losses, plan.weights, strict=True)}


def weight(text: str, declared: str = ""):
    """The weight of `soft` in `minimize hard + TEXT * soft`."""
    checked = check(spec(SOFT + HARD + declared + stage(f"minimize hard + {text} * soft")))
    assert checked.diagnostics.ok
    return weights(checked).get("soft", Constant(0.0))


# --- conditions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("gate(stage.progress >= 0.5)", {0: 0, 49: 0, 50: 1, 99: 1}),
        ("gate(stage.step < 3 or stage.step == 7)", {0: 1, 2: 1, 3: 0, 7: 1, 8: 0}),
        ("gate(stage.epoch > 1 and not (stage.step >= 60))", {0: 0, 10: 0, 11: 1, 59: 1, 60: 0}),
        ("gate(ramp(0 -> 1, until = 100%) >= 0.5)", {0: 0, 49: 0, 50: 1}),
        ("gate(true)", {0: 1, 99: 1}),
        ("gate(not true)", {0: 0}),
        ("gate(2 < 1 or stage.step != 4)", {3: 1, 4: 0}),
        ("stage.progress", {0: 0, 25: 0.25}),
        ("(1 - gate(stage.step < 3)) / 2", {0: 0, 3: 0.5}),
        ("stairs(0 -> 1, count = 5, until = 100%)", {0: 0, 19: 0, 20: 0.25, 80: 1}),
    ],
)
def test_a_gate_is_one_while_its_condition_holds(text: str, values: dict[int, float]) -> None:
    found = weight(text)
    assert {step: found.value(Clock(step, 100, 10.0)) for step in values} == values


def test_what_always_holds_is_a_number() -> None:
    assert weight("gate(s.N >= 2)") == Constant(1.0)
    assert weight("gate(0 < k)", "counter k from 1 to 3 advance when stage.progress > 0.5\n") == Constant(1.0)
    assert weight("coin(1)") == Constant(1.0)


def test_a_condition_may_have_a_name() -> None:
    found = weight("gate(late and not early)", "let late = stage.progress >= 0.5\nlet early = stage.step < 3\n")
    assert isinstance(found, Logic)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("gate(0.5)", "E0260"),
        ("gate(soft)", "E0260"),
        ("gate(stage.progress)", "E0260"),
        ("gate(s.layer[0].out > 0)", "E0260"),
        ("gate(stage.step < 3, 2)", "E0224"),
        ("gate(stage.step < 3 and 1)", "E0260"),
        ("(stage.step < 3)", "E0263"),
        ("(2 - (stage.step < 3))", "E0263"),
        ("gate(stage.stap < 3)", "E0206"),
        ("mean(hard, last = 3 steps)", "E0262"),
        ("coin(1.5)", "E0403"),
        ("coin(ramp(0 -> 2, until = 10%))", "E0403"),
        ("coin(soft)", "E0404"),
        ("coin()", "E0224"),
        ("stairs(0 -> 1, until = 10%)", "E0235"),
        ("stairs(0 -> 1, count = 1, until = 10%)", "E0403"),
        ("stairs(0 -> 1, count = 3)", "E0235"),
    ],
)
def test_misuse_is_told(text: str, code: str) -> None:
    checked = check(spec(SOFT + HARD + stage(f"minimize hard + {text} * soft")))
    assert codes(checked) == [code]


def test_a_comparison_of_tensors_is_a_tensor() -> None:
    body = HARD + "loss chosen = mean(select(entropy(s.logits) > 0.5, per_sample(hard), 0.0))\n"
    found = check(spec(body + stage("minimize chosen"), models=STUDENT))
    assert codes(found) == []


numbers = st.one_of(
    st.integers(-3, 12).map(str), st.sampled_from(["stage.step", "stage.epoch", "k", "10 * stage.progress", "k + 1"])
)
comparisons = st.tuples(numbers, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers).map(" ".join)
conditions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        inner.map("not ({})".format), st.builds("({}) {} ({})".format, inner, st.sampled_from(["and", "or"]), inner)
    ),
    max_leaves=6,
)


@given(conditions, st.integers(0, 11), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_condition_holds_where_python_says_so(text: str, step: int, k: int) -> None:
    found = weight(f"gate({text})", "counter k from 0 to 5 advance when stage.step > 3\n")
    place = SimpleNamespace(step=float(step), epoch=step / 5.0, progress=step / 12)
    holds = eval(text, {"stage": place, "k": float(k)})
    assert found.value(Clock(step, 12, 5.0, counters=(("k", k),))) == float(holds)


# --- coins --------------------------------------------------------------------------------------


def coins(schedule):
    return [part.name for part in parts(schedule) if isinstance(part, Coin)]


def test_each_place_and_each_element_draws_for_itself() -> None:
    body = INSIDE + HARD + stage("minimize hard + sum(coin(0.5) * inside[i] for i in 0 ..< 3) + coin(0.5) * hard")
    found = [name for held in weights(good(spec(body))).values() for name in coins(held)]
    assert len(found) == len(set(found)) == 4


def test_a_coin_with_a_name_is_one_draw_and_a_family_of_coins_has_one_for_each_index() -> None:
    body = (
        "let c = coin(0.5)\nlet d[i] = coin(0.5)\n" + INSIDE + HARD
        + stage("minimize c * hard + sum(c * d[i] * inside[i] for i in 0 ..< 2) + (1 - d[0]) * inside[2]")
    )  # fmt: skip
    found = weights(good(spec(body)))
    (c,), (_, first), (_, second), (again,) = (
        coins(found[name]) for name in ("hard", "inside.0", "inside.1", "inside.2")
    )
    assert coins(found["inside.0"])[0] == coins(found["inside.1"])[0] == c
    assert len({c, first, second}) == 3
    assert again == first


def test_a_method_used_twice_draws_twice() -> None:
    method = "method m(teacher t, student s) {\n  loss soft = kl(s.logits <- t.logits)\n  total = coin(0.5) * soft\n}\n"
    body = method + "use m(t -> s) as a\nuse m(t -> s) as b\n" + stage("minimize a.total + b.total")
    names = [name for held in weights(good(spec(body))).values() for name in coins(held)]
    assert sorted(name.split("/")[0] for name in names) == ["a", "b"]


# --- counters -----------------------------------------------------------------------------------


def test_a_counter_watches_the_family_at_its_value_and_belongs_to_the_stage_that_reads_it() -> None:
    other = stage("minimize hard", "other")
    checked = good(spec(INSIDE + HARD + COUNTER + GATED + other))
    found = node(checked, "counter/k")
    assert isinstance(found, CounterNode)
    assert (found.start, found.stop) == (0, 3)
    assert found.when == AtCount(
        "k", 0, tuple(Comparison("<", Recent(f"inside.{i}", 5), Constant(0.5)) for i in range(3))
    )
    assert inputs(checked, "counter/k") == {str(i): f"loss/inside.{i}" for i in range(3)}
    assert inputs(checked, "stage/main")["counter.k"] == "counter/k"
    assert "counter.k" not in inputs(checked, "stage/other")
    main, second = compile_plan(checked.graph).stages
    assert [counter.name for counter in main.counters] == ["k"]
    assert [loss.name for loss in main.monitored] == ["inside.0", "inside.1", "inside.2"]
    assert second.counters == second.monitored == ()
    assert [str(w) for w in main.weights] == ["(0 < k)", "(1 < k)", "(2 < k)", "1"]


def test_a_condition_without_the_counter_is_kept_once() -> None:
    body = HARD + SOFT + "counter k from 0 to 900 advance when stage.progress > 0.5\n"
    checked = good(spec(body + stage("minimize hard + gate(k > 2) * soft")))
    assert node(checked, "counter/k").when == Comparison(">", StageProgress("progress"), Constant(0.5))


def test_a_sum_of_losses_can_be_watched() -> None:
    body = INSIDE + HARD + "counter k from 1 to 3 advance when mean(hard + 2 * inside[k], last = 5 steps) < 0.5\n"
    checked = good(spec(body + stage("minimize gate(k == 3) * hard + inside[0]")))
    plan = compile_plan(checked.graph).stages[0]
    assert len(plan.counters[0].losses) == 2
    assert [len(loss.parts) for loss in plan.monitored] == [2, 2]


@pytest.mark.parametrize(
    ("body", "read"),
    [
        ("loss in_loss = gate(k > 1) * kl(s.logits <- t.logits)\n" + stage("minimize in_loss"), True),
        ("loss hot = kl(s.logits <- t.logits, temperature = 1 + k)\n" + stage("minimize hot"), True),
        ("loss far = mean(per_sample(hard) - 0.1 * k)\n" + stage("minimize far"), True),
        (stage("minimize hard + gate(j > 1) * soft"), True),
        (stage("minimize hard"), False),
    ],
)
def test_a_counter_read_in_a_coefficient_an_argument_or_another_counter_belongs_to_the_stage(
    body: str, read: bool
) -> None:
    counters = "counter k from 0 to 3 advance when stage.progress > 0.5\ncounter j from 0 to 3 advance when k > 1\n"
    checked = check(spec(HARD + SOFT + counters + body))
    assert not [d for d in checked.diagnostics if d.severity == "error"]
    assert ("counter.k" in inputs(checked, "stage/main")) is read
    assert ("k" in [c.name for c in compile_plan(checked.graph).stages[0].counters]) is read


def test_a_counter_that_decides_which_blocks_are_exchanged_belongs_to_the_stage() -> None:
    body = (
        "counter k from 0 to 4 advance when stage.progress >= (k + 1) / 5\n"
        "pass mixed = s {\n"
        "  replace layer[i] with t.layer[js] for (i, js) in groups(s.layer, t.layer) when i >= k and not coin(0.5)\n"
        "}\n"
        "loss hard = cross_entropy(mixed.logits, batch.labels)\n"
    )
    plan = compile_plan(good(spec(body + stage("minimize hard"), models=TEACHER + SHORT)).graph).stages[0]
    assert [counter.name for counter in plan.counters] == ["k"]
    (changes,) = (forward.changes for forward in plan.forwards if forward.changes)
    clock = Clock(3, 100, 10.0, counters=(("k", 2),))
    holds = [change.when.value(clock) for change in changes]
    fell = [coin.value(clock) for change in changes for coin in parts(change.when) if isinstance(coin, Coin)]
    assert len(holds) == len(fell) == 4
    assert holds == [float(i >= 2 and not c) for i, c in enumerate(fell)]


def test_a_counter_in_a_method_and_in_a_stage_has_a_name_of_its_own() -> None:
    method = (
        "method m(teacher t, student s) {\n  loss soft = kl(s.logits <- t.logits)\n"
        "  counter k from 0 to 1 advance when mean(soft, last = 2 steps) < 1\n  total = gate(k == 1) * soft\n}\n"
    )
    inner = stage("counter k from 0 to 2 advance when stage.step > 3\nminimize a.total + gate(k == 2) * hard")
    checked = good(spec(HARD + method + "use m(t -> s) as a\n" + inner))
    assert {n.name for n in compile_plan(checked.graph).stages[0].counters} == {"a/k", "main/k"}
    assert weights(checked)["hard"] == Comparison("==", CounterValue("main/k", 0, 2), Constant(2.0))


@pytest.mark.parametrize(
    ("counter", "code"),
    [
        ("counter k from 2 to 2 advance when stage.step > 3", "E0261"),
        ("counter k from 2 to 1 advance when stage.step > 3", "E0261"),
        ("counter k from 0 to 5000 advance when stage.step > 3", "E0261"),
        ("counter k from 0 to 1.5 advance when stage.step > 3", "E0210"),
        ("counter k from 0 to 2 advance when hard", "E0260"),
        ("counter k from 0 to 2 advance when stage.step", "E0260"),
        ("counter k from 0 to 2 advance when s.logits > 0", "E0260"),
        ("counter k from 0 to 2 advance when mean(hard, last = 10%) < 1", "E0401"),
        ("counter k from 0 to 2 advance when mean(hard, last = 0.5 steps) < 1", "E0403"),
        ("counter k from 0 to 2 advance when mean(hard, last = 3) < 1", "E0401"),
        ("counter k from 0 to 2 advance when mean(hurd, last = 3 steps) < 1", "E0203"),
        ("counter k from 0 to 9 advance when mean(inside[k], last = 3 steps) < 1", "E0204"),
    ],
)
def test_a_counter_that_cannot_be_is_told_once(counter: str, code: str) -> None:
    checked = check(
        spec(INSIDE + HARD + SOFT + f"{counter}\n" + stage("minimize hard + inside[0] + gate(k == 1) * soft"))
    )
    assert [d.code for d in checked.diagnostics if d.severity == "error"] == [code]


@pytest.mark.parametrize("text", ["inside[k]", "s.layer[k].out"])
def test_a_counter_is_no_index_where_losses_are_made(text: str) -> None:
    made = f"loss at_k = {text}\n" if text.startswith("inside") else f"loss at_k = mean({text})\n"
    counter = "counter k from 0 to 2 advance when stage.step > 3\n"
    checked = check(spec(INSIDE + HARD + counter + made + stage("minimize hard + inside[0] + at_k")))
    assert [d.code for d in checked.diagnostics if d.severity == "error"] == ["E0210"]


def test_an_unused_counter_is_told() -> None:
    checked = check(
        spec(HARD + "counter k from 0 to 2 advance when stage.step > 3\n" + stage("minimize hard"), models=STUDENT)
    )
    assert codes(checked) == ["W0701"]


# --- what is made of it -------------------------------------------------------------------------


def test_the_graph_is_verified_written_and_read_with_all_its_events() -> None:
    coin = stage("minimize hard + coin(stairs(0 -> 1, count = 3, until = 50%)) * soft", "coin")
    checked = good(spec(INSIDE + HARD + SOFT + COUNTER + GATED + coin))
    verify(checked.graph)
    again = from_json(to_json(checked.graph))
    verify(again)
    assert to_json(again) == to_json(checked.graph)
    assert fingerprint(again) == fingerprint(checked.graph)
    assert compile_plan(again) == compile_plan(checked.graph)
    assert any(isinstance(part, Stairs) for w in compile_plan(again).stages[1].weights for part in parts(w))
    other = good(spec(INSIDE + HARD + SOFT + COUNTER.replace("0.5", "0.6") + GATED + coin))
    assert fingerprint(other.graph) != fingerprint(checked.graph)


def test_it_is_drawn_with_what_it_watches() -> None:
    checked = good(spec(INSIDE + HARD + COUNTER + GATED))
    found = drawing(checked.graph)
    box = next(box for box in found.boxes if box.shape == "counter")
    assert box.lines == ("counter k", "0 to 3")
    assert {(arrow.source.split("/")[0], arrow.label) for arrow in found.arrows if arrow.target == box.key} == {
        ("loss", "watched")
    }
    assert any(arrow.source == box.key and arrow.target == "stage/main" for arrow in found.arrows)
    for text in (to_mermaid(found), to_dot(found), to_svg(found)):
        assert "counter k" in text


def test_it_is_explained_and_no_value_is_claimed_for_what_it_decides() -> None:
    checked = good(spec(INSIDE + HARD + COUNTER + GATED))
    (row,) = explain(checked.graph).stages[0].counters
    assert (row.name, row.start, row.stop) == ("k", 0, 3)
    assert row.watches == ("inside.0", "inside.1", "inside.2")
    assert row.when.startswith("(mean(inside.0, last = 5 steps) < 0.5) at 0, ..., ")
    shown = {row.name: (row.schedule, row.values) for row in explain(checked.graph).stages[0].weights}
    assert shown["inside.1"] == ("(1 < k)", ())
    assert shown["hard"] == ("1", ())


def test_the_resolved_text_checks_again() -> None:
    text = spec(INSIDE + HARD + COUNTER + GATED)
    again = good(resolved_text(good(text)))
    assert fingerprint(again.graph) == fingerprint(good(text).graph)


def test_a_counter_names_models_that_are_there() -> None:
    text = f"gkd 1\n{TEACHER}student s = truncated(t, layers = [0, 5])\n{REVIEWS}{HARD}"
    counter = "counter k from 0 to s.N - 1 advance when stage.progress >= (k + 1) / s.N\n"
    checked = good(text + counter + stage("minimize gate(k == s.N - 1) * hard"))
    assert node(checked, "counter/k").stop == 1
