"""The passes: what is shared, dropped, run with gradient, stopped early, let go; what the plan says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
from graph_help import EXAMPLES, HIDDEN, MASK, Hand, Interpreter, checked, deep, graphs, keys, same, slots, twice
from hypothesis import given

from gkd_dsl.graph.access import nodes
from gkd_dsl.graph.nodes import (
    AddToTap,
    BatchNode,
    ForwardNode,
    LossNode,
    ModelNode,
    OpNode,
    ProjectNode,
    StageNode,
    TapNode,
    TrainTarget,
)
from gkd_dsl.graph.passes import compile_plan, run_passes
from gkd_dsl.graph.passes.drop import drop
from gkd_dsl.graph.passes.fuse import logit_groups
from gkd_dsl.graph.passes.liveness import estimate
from gkd_dsl.graph.passes.share import share
from gkd_dsl.graph.plan import Apply, Free, Run
from gkd_dsl.graph.verify import verify
from gkd_dsl.models.taps import TapPath
from gkd_dsl.ops import registry
from gkd_dsl.ops.spec import OpSpec
from gkd_dsl.schedules import Clock, Constant, Ramp, Span, combine
from gkd_dsl.types import BATCH, LENGTH, LossType

CLOCK = Clock(3, 20, 5.0, 400)


def test_equal_operators_become_one_and_keep_both_places() -> None:
    graph = share(twice().graph)
    assert keys(graph, OpNode) == {"op/detach.1", "op/mse.1", "op/valid_tokens.1"}
    assert slots(graph, "loss/a") == slots(graph, "loss/b") == {"0": "op/mse.1"}
    assert [str(place) for place in graph.nodes["op/mse.1"]["node"].locations] == ["spec.gkd:1:10", "spec.gkd:2:10"]


def test_operators_that_differ_in_an_argument_or_an_input_stay_apart() -> None:
    hand = Hand()
    one, two = hand.tap("s", 1), hand.tap("s", 2)
    made = [hand.op("scale", attrs=(("by", by),), x=x) for by, x in ((1.0, one), (2.0, one), (1.0, two))]
    hand.stage("main", hand.loss("a", *(hand.atom(x, hand.tap("t", 1)) for x in made)))
    assert keys(share(hand.graph), OpNode) == keys(hand.graph, OpNode)


def test_arguments_on_the_other_side_are_not_the_same() -> None:
    hand = Hand()
    one, two = hand.tap("s", 1), hand.tap("s", 2)
    atoms = [hand.atom(hand.op("minus", a=a, b=b), hand.tap("t", 1)) for a, b in ((one, two), (two, one))]
    hand.stage("main", hand.loss("a", *atoms))
    assert len(keys(share(hand.graph), OpNode)) == 4


def test_draws_are_never_shared() -> None:
    registry.register(
        OpSpec("noise_of_a_test", "tensor", ("noise_of_a_test(x: Float[...]) -> Float[...]",), "Noise.", random=True)
    )
    try:
        hand = Hand()
        tap = hand.tap("s", 1)
        atoms = [hand.atom(hand.op("noise_of_a_test", x=tap), hand.tap("t", 1)) for _ in range(2)]
        hand.stage("main", hand.loss("a", *atoms))
        assert keys(share(hand.graph), OpNode) == keys(hand.graph, OpNode)
    finally:
        registry.unregister("noise_of_a_test")


def test_taps_and_forwards_of_one_place_become_one() -> None:
    hand = Hand()
    first, second = hand.tap("s", 1), hand.tap("s", 1, key="s/again")
    hand.stage("main", hand.loss("a", hand.atom(first, second)))
    graph = share(hand.graph)
    assert keys(graph, TapNode) == {"s/hidden.1"} or keys(graph, TapNode) == {"s/again"}
    assert len(set(slots(graph, "op/mse.1").values())) == 1


def passes() -> Hand:
    """Beside the plain forward of `s` one that is for gradients alone, and two into which something enters."""
    hand = Hand()
    entering = {
        "probe": "",
        "learnt": hand.op("scale", attrs=(("by", 2.0),), x=hand.tap("s", 1)),
        "cut": hand.op("detach", x=hand.tap("s", 1)),
        "slope": hand.op("gradient", at=hand.tap("s", 1)),
    }
    for name, source in entering.items():
        changes = (AddToTap(TapPath("hidden", 1), "add.0"),) if source else ()
        forward = hand.add(ForwardNode(f"{name}/forward", "t", changes=changes, discard=not source))
        hand.connect("model/t", forward, "model")
        hand.connect("batch/input_ids", forward, "input_ids")
        if source:
            hand.connect(source, forward, "add.0")
        tap = hand.add(TapNode(f"{name}/hidden.3", "t", TapPath("hidden", 3), HIDDEN))
        hand.connect(forward, tap, "forward")
    atoms = [hand.atom(hand.tap("s", 2), f"{name}/hidden.3") for name in entering]
    hand.stage("main", hand.loss("a", *atoms, hand.atom("s/hidden.2", hand.tap("t", 3))))
    return hand


def test_passes_that_differ_in_what_enters_them_or_in_their_gradient_stay_apart() -> None:
    kept = keys(share(passes().graph), ForwardNode)
    assert kept == {f"{name}/forward" for name in ("s", "t", "probe", "learnt", "cut", "slope")}
    found = passes().graph
    found.nodes["probe/forward"]["node"] = replace(found.nodes["probe/forward"]["node"], discard=False)
    assert len(keys(share(found), ForwardNode)) == 5
    # Where only what is done with the same tensor differs they are two as well.
    found = passes().graph
    node = found.nodes["learnt/forward"]["node"]
    other = replace(node, key="other/forward", changes=(AddToTap(TapPath("hidden", 2), "add.0"),))
    found.add_node(other.key, node=other)
    for source, _, data in list(found.in_edges(node.key, data=True)):
        found.add_edge(source, other.key, slot=data["slot"])
    assert {"learnt/forward", "other/forward"} <= keys(share(found), ForwardNode)


def test_a_frozen_model_has_a_gradient_where_something_learnt_enters_it_or_it_is_asked_for() -> None:
    plan = compile_plan(passes().graph).stages[0]
    assert {forward.key.partition("/")[0]: forward.grad for forward in plan.forwards} == {
        "s": True, "t": False, "probe": True, "learnt": True, "cut": False, "slope": False,
    }  # fmt: skip


def test_a_loss_of_weight_zero_takes_its_taps_block_and_model_along() -> None:
    hand = Hand()
    shown = hand.op("project", x=hand.tap("s", 3), block=hand.project())
    gone = hand.loss("gone", hand.atom(shown, hand.tap("t", 4)))
    kept = hand.loss("kept", hand.atom(hand.tap("s", 1), hand.tap("s", 2)))
    hand.stage("main", gone, kept, weights=(Constant(0.0), Constant(2.0)))
    graph = drop(hand.graph)
    verify(graph)
    assert keys(graph, LossNode) == {"loss/kept"}
    assert keys(graph, TapNode) == {"s/hidden.1", "s/hidden.2"}
    assert keys(graph, ModelNode) == {"model/s"}
    assert not keys(graph, ProjectNode)
    assert keys(graph, BatchNode) == {"batch/input_ids"}
    assert graph.nodes["stage/main"]["node"].weights == (Constant(2.0),)
    assert slots(graph, "stage/main") == {"0": "loss/kept"}
    assert slots(hand.graph, "stage/main") == {"0": "loss/gone", "1": "loss/kept"}


def test_a_weight_that_starts_at_zero_is_kept() -> None:
    hand = Hand()
    hand.stage(
        "main",
        hand.loss("a", hand.atom(hand.tap("s", 1), hand.tap("t", 1))),
        weights=(Ramp(0.0, 1.0, Span(10.0, "percent")),),
    )
    assert keys(drop(hand.graph), LossNode) == {"loss/a"}


def test_a_weight_of_zero_times_a_schedule_is_dropped() -> None:
    hand = Hand()
    gone = hand.loss("gone", hand.atom(hand.tap("s", 3), hand.tap("t", 4)))
    kept = hand.loss("kept", hand.atom(hand.tap("s", 1), hand.tap("s", 2)))
    nothing = combine("*", Constant(0.0), Ramp(0.0, 1.0, Span(10.0, "percent")))
    hand.stage("main", gone, kept, weights=(nothing, Constant(1.0)))
    assert keys(drop(hand.graph), ModelNode) == {"model/s"}


def test_a_term_of_coefficient_zero_is_dropped() -> None:
    hand = Hand()
    atoms = [hand.atom(hand.tap("s", i), hand.tap("t", i)) for i in (1, 2, 3)]
    hand.stage("main", hand.loss("a", *atoms, by=(Constant(1.0), Constant(0.0), Constant(3.0))))
    graph = drop(hand.graph)
    assert slots(graph, "loss/a") == {"0": "op/mse.1", "1": "op/mse.3"}
    assert graph.nodes["loss/a"]["node"].coefficients == (Constant(1.0), Constant(3.0))


def test_a_loss_whose_terms_are_all_zero_is_dropped() -> None:
    hand = Hand()
    zero = hand.loss("zero", hand.atom(hand.tap("s", 3), hand.tap("t", 4)), by=(Constant(0.0),))
    hand.stage("main", zero, hand.loss("kept", hand.atom(hand.tap("s", 1), hand.tap("s", 2))))
    graph = drop(hand.graph)
    assert keys(graph, LossNode) == {"loss/kept"}
    assert keys(graph, ModelNode) == {"model/s"}


def test_metrics_keep_what_they_read() -> None:
    hand = Hand()
    gone = hand.loss("gone", hand.atom(hand.tap("s", 3), hand.tap("t", 4)))
    kept = hand.loss("kept", hand.atom(hand.tap("s", 1), hand.tap("s", 2)))
    used, unused = (
        hand.metric("used", "t/hidden.4", "batch/labels"),
        hand.metric("unused", "s/hidden.3", "batch/labels"),
    )
    hand.stage("main", gone, kept, weights=(Constant(0.0), Constant(1.0)), metrics=(used,))
    graph = drop(hand.graph)
    assert unused not in graph
    assert {used, "t/hidden.4", "t/forward", "model/t", "batch/labels"} <= set(graph)
    plan = compile_plan(hand.graph).stages[0]
    assert [model.name for model in plan.models] == ["s", "t"]
    assert [forward.key for forward in plan.forwards] == ["s/forward"]
    assert [forward.key for forward in plan.metrics[0].forwards] == ["t/forward"]


def taught() -> Hand:
    """`t` learns alone, then teaches `s` from its middle."""
    hand = Hand()
    first = hand.loss("first", hand.atom(hand.tap("t", 4), hand.tap("t", 3)))
    second = hand.loss("second", hand.atom(hand.tap("s", 1), hand.op("detach", x=hand.tap("t", 2))))
    hand.stage("teach", first, trains=(TrainTarget("model", "t"),), order=0)
    hand.stage("distil", second, order=1)
    return hand


def test_a_model_that_learns_and_then_teaches_has_a_gradient_in_one_stage() -> None:
    teach, distil = compile_plan(taught().graph).stages
    assert [(f.key, f.grad) for f in teach.forwards] == [("t/forward", True)]
    assert [(f.key, f.grad) for f in distil.forwards] == [("s/forward", True), ("t/forward", False)]


def test_a_stage_takes_only_its_own_taps_and_stops_after_the_last() -> None:
    hand = taught()
    teach, distil = compile_plan(hand.graph).stages
    assert [tap.key for tap in distil.forward("t/forward").taps] == ["t/hidden.2"]
    assert distil.forward("t/forward").stop_after == TapPath("hidden", 2)
    assert teach.forward("t/forward").stop_after == TapPath("hidden", 4)
    whole = compile_plan(hand.graph, optimise=False).stages
    assert all(forward.stop_after is None for stage in whole for forward in stage.forwards)


def test_teachers_run_first_and_what_only_they_need_before_the_student() -> None:
    program = [step for step in compile_plan(twice().graph).stages[0].program if not isinstance(step, Free)]
    assert [step.forward if isinstance(step, Run) else step.key for step in program] == [
        "t/forward", "op/detach.1", "s/forward", "op/mse.1",
    ]  # fmt: skip


def test_tensors_are_let_go_after_their_last_use() -> None:
    program = compile_plan(twice().graph).stages[0].program
    assert [step.keys for step in program if isinstance(step, Free)] == [("t/hidden.4",), ("op/detach.1", "s/hidden.2")]


def test_nothing_is_let_go_without_optimisation() -> None:
    assert not any(isinstance(step, Free) for step in compile_plan(twice().graph, optimise=False).stages[0].program)


def test_masks_come_before_the_first_forward_and_what_counts_is_said() -> None:
    plan = compile_plan(twice().graph).stages[0]
    assert [(step.key, step.op, step.inputs) for step in plan.valid_program] == [
        ("op/valid_tokens.1", "valid_tokens", (("x", "batch/attention_mask"),))
    ]
    assert [(c.key, c.dims, c.valid, c.causal) for c in plan.counted] == [
        ("op/mse.1", (BATCH, LENGTH), "op/valid_tokens.1", False)
    ]
    assert plan.columns == ("attention_mask", "input_ids")
    assert [(loss.name, loss.parts) for loss in plan.losses] == [
        ("a", ((Constant(1.0), "op/mse.1"),)),
        ("b", ((Constant(1.0), "op/mse.1"),)),
    ]


def test_weights_of_positions_and_the_causal_flag_are_in_counted() -> None:
    hand = Hand()
    weight = hand.op("weight", MASK, x="batch/labels")
    atom = hand.atom(hand.tap("s", 1), hand.tap("t", 1), valid=hand.valid())
    hand.connect(weight, atom, "token_weight")
    hand.connect("batch/labels", atom, "sample_weight")
    later = hand.op(
        "mse", LossType((BATCH, LENGTH)), attrs=(("causal", True),), student="s/hidden.1", teacher="t/hidden.1"
    )
    hand.stage("main", hand.loss("a", atom, later))
    found, causal = compile_plan(hand.graph).stages[0].counted
    assert (found.causal, causal.causal, causal.valid) == (False, True, None)
    assert (found.token_weight, found.sample_weight) == (weight, "batch/labels")


def test_a_projection_of_a_metric_alone_is_in_the_plan() -> None:
    hand = Hand()
    shown = hand.op("project", x=hand.tap("s", 3), block=hand.project())
    metric = hand.metric("m", shown, "batch/labels")
    hand.stage("main", hand.loss("a", hand.atom(hand.tap("s", 1), hand.tap("t", 1))), metrics=(metric,))
    plan = compile_plan(hand.graph).stages[0]
    assert [block.name for block in plan.projections] == ["W"]
    assert [(forward.key, forward.grad) for forward in plan.metrics[0].forwards] == [("s/forward", False)]
    assert plan.metrics[0].inputs == (("labels", "batch/labels"), ("student", shown))
    assert plan.columns == ("input_ids", "labels")


def test_losses_over_the_same_logits_are_found() -> None:
    steps = tuple(
        Apply(f"op/{number}", op, (("student", student),), (), HIDDEN)
        for number, (op, student) in enumerate(
            [("kl", "s/logits"), ("cross_entropy", "s/logits"), ("kl", "u/logits"), ("mse", "s/logits")]
        )
    )
    assert logit_groups(steps) == (("op/0", "op/1"),)


def test_memory_of_live_tensors() -> None:
    plan = compile_plan(twice().graph).stages[0]
    # The detached tap of the teacher, that of the student, and the values of the loss: [2, 3, 8] twice and [2, 3].
    assert estimate(plan.program, plan.forwards, 2, 3) == 4 * (2 * 48 + 6)


def test_passes_stop_where_asked_and_show_each_graph() -> None:
    seen = []
    graph = run_passes(twice().graph, until="share", on_dump=lambda name, found: seen.append((name, len(found))))
    assert seen == [("share", len(graph))]
    with pytest.raises(KeyError):
        run_passes(graph, until="nothing")


@given(graphs())
def test_share_twice_is_share_once(graph: nx.MultiDiGraph) -> None:
    once = share(graph)
    assert same(share(once), once)


@given(graphs())
def test_drop_twice_is_drop_once(graph: nx.MultiDiGraph) -> None:
    once = drop(graph)
    assert same(drop(once), once)


@given(graphs())
def test_the_rules_hold_after_every_pass_and_the_graph_given_is_left_alone(graph: nx.MultiDiGraph) -> None:
    before = graph.copy()
    run_passes(graph, on_dump=lambda _, found: verify(found))
    assert same(graph, before)


@given(graphs())
def test_passes_change_no_number(graph: nx.MultiDiGraph) -> None:
    for fast, slow in zip(compile_plan(graph).stages, compile_plan(graph, optimise=False).stages, strict=True):
        quick, plain = Interpreter(fast), Interpreter(slow)
        assert quick.objective(CLOCK) == pytest.approx(plain.objective(CLOCK), rel=1e-12)
        assert quick.metrics() == plain.metrics()
        kept = {c.key for c in fast.counted} | {step.key for step in fast.valid_program}
        kept |= {f"batch/{column}" for column in fast.columns} | {f"project/{block.name}" for block in fast.projections}
        assert quick.left == kept


@pytest.mark.parametrize("name", ["sentence_encoder", "reviews"])
def test_passes_change_no_number_of_the_examples(name: str) -> None:
    graph = checked(EXAMPLES / f"{name}.gkd")
    for fast, slow in zip(compile_plan(graph).stages, compile_plan(graph, optimise=False).stages, strict=True):
        assert Interpreter(fast).objective(CLOCK) == pytest.approx(Interpreter(slow).objective(CLOCK), rel=1e-12)
        assert Interpreter(fast).metrics() == Interpreter(slow).metrics()


def test_the_first_stage_of_a_deep_spec_reads_no_logits(tmp_path: Path) -> None:
    inner, outer = compile_plan(checked(deep(tmp_path))).stages
    assert {forward.stop_after for forward in inner.forwards} == {TapPath("hidden", 12)}
    assert [loss.name for loss in outer.losses] == ["soft"]
    assert [len(forward.taps) for forward in inner.forwards] == [25, 25]
    assert [node.name for node in nodes(run_passes(checked(tmp_path / "deep.gkd")), StageNode)] == ["inner", "outer"]
    assert {step.forward for step in outer.program if isinstance(step, Run)} == {"s/forward", "t/forward"}
    assert all(isinstance(node, ForwardNode) for node in nodes(checked(tmp_path / "deep.gkd"), ForwardNode))
