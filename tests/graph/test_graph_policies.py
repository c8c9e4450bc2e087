"""Policies in the graph: written and read, verified, drawn, explained."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gkd_dsl.graph import access, schema
from gkd_dsl.graph.access import GraphError
from gkd_dsl.graph.draw_dot import to_dot
from gkd_dsl.graph.draw_mermaid import to_mermaid
from gkd_dsl.graph.draw_svg import to_svg
from gkd_dsl.graph.drawing import drawing
from gkd_dsl.graph.explain import explain, render
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.verify import verify
from gkd_dsl.meaning.check import check_text
from gkd_dsl.runtime.fingerprint import fingerprint

GOLDEN = Path(__file__).parent.parent / "golden"
SPEC = """gkd 1
teacher a = hf("models/teacher")
teacher b = hf("models/eight_heads")
student s = hf("models/student")
data reviews = csv("data/reviews.csv", text = "text", label = "label")
loss hard = cross_entropy(s.logits, batch.labels)
policy pi = selector([a.logits, b.logits], hidden = 6) {
  reward = -(hard + 0.5 * soft)
  optim = adamw(lr = 0.01)
}
loss soft = mean(pi.pick[0] * per_sample(kl(s.logits <- a.logits)) + pi.pick[1] * per_sample(kl(s.logits <- b.logits)))
stage main for 3 epochs {
  minimize hard + soft
}
"""


@pytest.fixture
def graph():
    checked = check_text(SPEC, "spec.gkd", root=GOLDEN)
    assert [str(d.message) for d in checked.diagnostics] == []
    return checked.graph.copy()


def test_it_is_written_and_read(graph):
    again = schema.from_json(schema.to_json(graph))
    assert schema.fingerprint(again) == schema.fingerprint(graph)
    assert access.node(again, "policy/pi") == access.node(graph, "policy/pi")
    assert compile_plan(again).stages[0].policies == compile_plan(graph).stages[0].policies


def test_a_policy_that_reads_something_is_no_graph(graph):
    graph.add_edge("a/logits", "policy/pi", slot="0")
    with pytest.raises(ValueError, match="policy/pi: its inputs"):
        schema.from_json(schema.to_json(graph))


def edge(graph, target, slot):
    return next((s, t, k) for s, t, k, found in graph.in_edges(target, keys=True, data="slot") if found == slot)


def test_what_verify_refuses(graph):
    verify(graph)
    draws = "op/policy.1"
    for target, slot, said in (
        (draws, "1", "a policy has the inputs"),
        (draws, "block", "a policy has the inputs"),
        ("stage/main", "reward.pi", "the policy pi has the reward None"),
    ):
        broken = graph.copy()
        broken.remove_edge(*edge(broken, target, slot))
        with pytest.raises(GraphError, match=said):
            verify(broken)
    other = graph.copy()
    other.remove_edge(*edge(other, "stage/main", "policy.pi"))
    other.add_edge("loss/hard", "stage/main", slot="policy.pi")
    with pytest.raises(GraphError, match=r"slot policy\.pi holds loss/hard"):
        verify(other)
    fed = graph.copy()
    fed.add_edge("batch/labels", "policy/pi", slot="reward")
    with pytest.raises(GraphError, match="a policy has the inputs"):
        verify(fed)


def test_unoptimised_it_has_the_same_policies(graph):
    one, two = (compile_plan(graph, optimise=optimise).stages[0] for optimise in (True, False))
    assert one.policies == two.policies
    assert one.monitored == two.monitored
    (policy,) = one.policies
    assert policy.reward in {loss.name for loss in one.monitored}


def test_its_draws_come_before_the_student_runs(graph):
    """It sees the teachers alone, so nothing of it is kept alive through the student's forward."""
    program = compile_plan(graph).stages[0].program
    keys = [getattr(step, "key", getattr(step, "forward", "")) for step in program]
    assert keys.index("op/policy.1") < keys.index("s/forward")


def test_it_is_drawn(graph):
    found = drawing(graph)
    (box,) = [box for box in found.boxes if box.shape == "policy"]
    assert box.lines == ("policy pi", "2 -> 1, for each of 2 actions")
    assert box.tone == "trained"
    arrows = {(arrow.source, arrow.target): arrow for arrow in found.arrows}
    assert arrows["policy/pi", "op/policy.1"].label == ""
    assert arrows["loss/pi.reward", "stage/main"].label == "reward of pi"
    for source in ("a/logits", "b/logits"):
        assert arrows[source, "op/policy.1"].detached
    assert [group.title for group in found.groups if group.kind == "blocks"] == ["policies"]
    for written in (to_mermaid(found), to_dot(found), to_svg(found)):
        assert "policy pi" in written


def test_it_is_explained(graph):
    found = explain(graph)
    (row,) = found.stages[0].policies
    assert (row.name, row.actions, row.features, row.hidden) == ("pi", 2, 2, 6)
    assert row.reward == "-(hard + 0.5 * soft)"
    assert row.optim.startswith("adamw, lr 0.01")
    text = StringIO()
    render(found, Console(file=text, width=200))
    assert (
        "2 actions, each on 2 features, 6 hidden units, reward -(hard + 0.5 * soft) of the next step" in text.getvalue()
    )
    assert found.as_dict()["stages"][0]["policies"][0]["reward"] == "-(hard + 0.5 * soft)"


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("lr = 0.01", "lr = 0.02", "optim.lr"),
        ("hidden = 6", "hidden = 7", "hidden"),
        ("0.5 * soft)", "0.25 * soft)", "reward of `pi`"),
        ("optim = adamw(lr = 0.01)", "optim = adamw(lr = 0.01)\n  baseline = 0.5", "baseline"),
    ],
)
def test_another_policy_is_another_spec(graph, old, new, field):
    """So that a checkpoint is not gone on with by a policy that it is not of."""
    assert old in SPEC
    other = check_text(SPEC.replace(old, new, 1), "spec.gkd", root=GOLDEN).graph
    one, two = (fingerprint(compile_plan(found)) for found in (graph, other))
    assert any(field in name for name in one if one[name] != two.get(name))


def test_a_spec_without_policies_has_no_field_of_them():
    text = SPEC[: SPEC.index("policy pi")] + "stage main for 3 epochs {\n  minimize hard\n}\n"
    found = compile_plan(check_text(text, "spec.gkd", root=GOLDEN).graph)
    assert not any("polic" in name or "reward" in name for name in fingerprint(found))
