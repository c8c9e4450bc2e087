"""Several teachers in one formal: what can be said of them, and what is said where it is wrong."""

import pytest
from meaning_help import GOLDEN, check, codes, good, parts

from gkd_dsl.graph.nodes import ProjectNode, TrainTarget
from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text

HEAD = """gkd 1
teacher a = hf("models/teacher")
teacher b = hf("models/eight_heads")
student s = hf("models/student")
data reviews = csv("data/reviews.csv", text = "text", label = "label")
"""
OWN = "loss x = sum(cross_entropy(ts[k].logits, batch.labels) for k in teachers(ts))"
SOFT = "loss x = sum(kl(s.logits <- ts[k].logits) for k in teachers(ts))"


def method(*body, stage="minimize x", use="[a, b] -> s"):
    lines = "\n  ".join(body)
    return (
        f"{HEAD}method m(teacher ts, student s) {{\n  {lines}\n  stage main for 3 epochs {{\n    {stage}\n  }}\n}}\n"
        f"use m({use}) as p\nrun p\n"
    )


def plan(text):
    return compile_plan(good(text).graph).stages[-1]


@pytest.mark.parametrize(
    "loss",
    [
        SOFT,
        "loss x = sum(kl(s.logits <- t.logits) for t in ts)",
        "loss soft[k] = kl(s.logits <- ts[k].logits)\n  loss x = sum(soft[k] for k in teachers(ts))",
        "loss soft(t: model) = kl(s.logits <- t.logits)\n  loss x = sum(soft(ts[k]) for k in teachers(ts))",
        "loss x = kl(s.logits <- ts[0].logits) + kl(s.logits <- ts[-1].logits)",
    ],
)
def test_a_sum_over_teachers(loss):
    found = good(method(loss))
    assert parts(found, "p/x") == [
        f"kl(student=s/logits, teacher=detach(x={name}/logits))" for name in "ab"
    ]  # fmt: skip
    assert [target.name for target in plan(method(loss)).stage.trains] == ["s"]


@pytest.mark.parametrize("use", ["ts = [a, b], s = s", "[a, b] -> s"])
def test_how_they_are_handed_over(use):
    assert [forward.key for forward in plan(method(SOFT, use=use)).forwards] == ["a/forward", "b/forward", "s/forward"]


@pytest.mark.parametrize("loop", ["ts[k].logits) for k in teachers(ts)", "t.logits) for t in ts"])
def test_one_teacher_is_a_list_of_one(loop):
    checked = check(method(f"loss x = sum(kl(s.logits <- {loop})", use="a -> s"))
    assert codes(checked) == ["W0701"]  # `b` is not used.
    assert parts(checked, "p/x") == ["kl(student=s/logits, teacher=detach(x=a/logits))"]


def test_the_mean_of_tensors_is_one_teacher():
    found = good(method("loss x = kl(s.logits <- mean(ts[k].logits for k in teachers(ts)))"))
    (made,) = parts(found, "p/x")
    assert made == (
        "kl(student=s/logits, teacher=mul(a=add(a=detach(x=a/logits), b=detach(x=b/logits))))"
    )  # fmt: skip


def test_weights_of_all_by_a_softmax():
    text = method(
        "let worth[k] = -per_sample(cross_entropy(ts[k].logits, batch.labels))",
        "let w = softmax(stack(worth[k] for k in teachers(ts)))",
        "loss x = sum(kl(s.logits <- ts[k].logits, sample_weight = w[k]) for k in teachers(ts))",
    )
    assert plan(text).counted[-1].sample_weight is not None


def test_a_projection_for_each_of_their_widths():
    text = method(
        "project W[k] = linear(s.H -> ts[k].H)",
        "loss x = sum(mse(s.final |> W[k] <- ts[k].final) for k in teachers(ts))",
    )
    found = {node.name: node.out_features for node in plan(text).projections}
    assert found == {"p/W.0": 768, "p/W.1": 512}
    assert all(isinstance(node, ProjectNode) for node in plan(text).projections)


# --- trained teachers -----------------------------------------------------------------------------


def test_teachers_do_not_train_unless_the_stage_lists_them():
    checked = check(method(OWN))
    assert codes(checked) == ["E0340"]
    assert (
        "`a` is a teacher, which is not trained unless the stage says so" in checked.diagnostics.errors[0].notes[0].text
    )


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        ("train ts", ["a", "b"]),
        ("train ts[0], ts[1]", ["a", "b"]),
        ("train [ts[0], ts[1]]", ["a", "b"]),
        ("train ts[1]", ["b"]),
        ("train ts[0].head, ts[1].body", ["a.head", "b.body"]),
    ],
)
def test_what_is_listed_trains(train, wanted):
    found = plan(method(OWN, stage=f"{train}\n    minimize x"))
    assert [target.name + (f".{target.part}" if target.part else "") for target in found.stage.trains] == wanted
    assert {f.model: f.grad for f in found.forwards} == {n: n in {w[0] for w in wanted} for n in "ab"}


def test_a_later_stage_has_them_frozen_and_a_projection_too():
    body = (
        "project shared = linear(ts[0].C -> s.C)",
        "let said[k] = ts[k].logits |> shared",
        "loss own = sum(cross_entropy(said[k], batch.labels) for k in teachers(ts))",
        "loss x = sum(kl(s.logits <- said[k]) for k in teachers(ts))",
        "stage first for 1 epoch {\n    train ts, shared\n    minimize own\n  }",
    )
    first, second = compile_plan(good(method(*body, stage="freeze shared\n    minimize x")).graph).stages
    assert TrainTarget("project", "p/shared") in first.stage.trains
    assert [target.name for target in second.stage.trains] == ["s"]
    assert [node.name for node in second.projections] == ["p/shared"]
    assert {forward.model: forward.grad for forward in second.forwards} == {"a": False, "b": False, "s": True}


def test_a_teacher_that_trains_beside_its_student_runs_once_and_hears_nothing_of_it():
    body = ("loss own = sum(cross_entropy(ts[k].logits, batch.labels) for k in teachers(ts))", SOFT)
    found = plan(method(*body, stage="train ts, s\n    minimize own + x"))
    assert [(f.model, f.grad) for f in found.forwards] == [("a", True), ("b", True), ("s", True)]
    checked = check(method(*body, stage="train ts\n    minimize own + x"))
    assert codes(checked) == ["E0340"]
    assert "`p/x` reaches nothing" in checked.diagnostics.errors[0].message


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "use", "code"),
    [
        ("loss x = kl(s.logits <- ts.logits)", "[a, b] -> s", "E0206"),
        ("loss x = kl(s.logits <- ts[2].logits)", "[a, b] -> s", "E0212"),
        ("loss x = sum(kl(s.logits <- ts[k].logits) for k in ts)", "[a, b] -> s", "E0210"),
        (SOFT, "[a, s] -> s", "E0244"),
        (SOFT, "[a, 3] -> s", "E0233"),
        ("loss x = sum(kl(s.logits <- ts[k].logits) for k in teachers(s.N))", "[a, b] -> s", "E0233"),
    ],
)
def test_what_is_wrong(loss, use, code):
    assert [d.code for d in check(method(loss, use=use)).diagnostics.errors] == [code]


def test_a_part_of_a_list_says_how_to_name_one():
    found = check(method("loss x = kl(s.logits <- ts.logits)")).diagnostics.errors[0]
    assert any("write `ts[k].logits`" in label.text for label in found.labels)


# --- policies ---------------------------------------------------------------------------------------


def policy(line, body="reward = -hard", use="pi.pick[0] * own_a + pi.pick[1] * own_b", stage="minimize hard + soft"):
    return (
        f"{HEAD}loss hard = cross_entropy(s.logits, batch.labels)\nlet own_a = per_sample(kl(s.logits <- a.logits))\n"
        f"let own_b = per_sample(kl(s.logits <- b.logits))\npolicy pi = selector({line}) {{\n  {body}\n}}\n"
        f"loss soft = mean({use})\nstage main for 3 epochs {{\n  {stage}\n}}\n"
    )


def test_a_policy_of_a_stage():
    found = plan(policy("[s.logits, b.logits], hidden = 7", "reward = -(hard + 0.5 * soft)\n  baseline = 0.5"))
    (made,) = found.policies
    node = made.node
    assert (node.name, node.actions, node.features, node.hidden, node.baseline) == ("pi", 2, 2, 7, 0.5)
    (reward,) = found.monitored
    assert (made.reward, [amount.amount for amount, _ in reward.parts]) == (reward.name, [-1.0, -0.5])
    # The student's scores are a state too, and get no gradient by it.
    applied = {step.key: step for step in found.program if hasattr(step, "op")}
    assert {applied[key].op for slot, key in applied[made.key].inputs if slot != "block"} == {"detach"}
    assert [target.name for target in found.stage.trains] == ["s"]


def test_a_stage_that_does_not_read_a_policy_has_none():
    text = policy("[a.logits, b.logits]") + "stage other for 1 epoch {\n  minimize hard\n}\n"
    main, other = compile_plan(good(text).graph).stages
    assert [item.node.name for item in main.policies] == ["pi"]
    assert other.policies == ()
    assert other.monitored == ()


@pytest.mark.parametrize(
    ("line", "body", "code"),
    [
        ("[a.logits, b.logits]", "optim = adamw(lr = 1e-3)", "E0252"),
        ("[a.logits, b.logits]", "reward = -hrd", "E0203"),
        ("[a.logits, b.logits]", "reward = 3", "E0215"),
        ("[a.logits, b.logits]", "reward = -hard\n  optim = 3", "E0404"),
        ("[a.logits, b.logits]", "reward = -hard\n  optim = adamw(warmup = 100 tokens)", "E0401"),
        ("[a.logits, b.logits]", "reward = -hard\n  baseline = 1.0", "E0403"),
        ("[a.logits, b.logits]", "reword = -hard", "E0408"),
        ("[a.logits, b.logits], hidden = 1.5", "reward = -hard", "E0210"),
        ("[a.logits, b.logits], hidden = -1", "reward = -hard", "E0403"),
        ("[a.logits, b.logits], hiden = 1", "reward = -hard", "E0234"),
        ("a.logits, b.logits", "reward = -hard", "E0250"),
        ("a.logits", "reward = -hard", "E0250"),
        ("", "reward = -hard", "E0250"),
        ("[own_a, own_b]", "reward = -hard", "E0251"),
        ("[a.final, b.final]", "reward = -hard", "E0251"),
        ("[cls(a.final), cls(b.final)]", "reward = -hard", "E0251"),
        ("[pi.pick, b.logits]", "reward = -hard", "E0242"),
    ],
)
def test_a_policy_that_is_wrong(line, body, code):
    checked = check(policy(line, body))
    assert [d.code for d in checked.diagnostics.errors] == [code]


@pytest.mark.parametrize(
    ("use", "code"), [("pi.pick[2] * own_a", "E0309"), ("pi.pck[0] * own_a", "E0206"), ("pi * own_a", "E0213")]
)
def test_choices_that_are_not_there(use, code):
    found = [d.code for d in check(policy("[a.logits, b.logits]", use=use)).diagnostics.errors]
    assert len(found) == 1
    assert found[0] == code


def test_a_selector_stands_in_a_policy_only():
    text = HEAD + "let pi = selector([a.logits, b.logits])\nloss x = kl(s.logits <- a.logits)\n"
    checked = check_text(text + "stage main for 3 epochs {\n  minimize x\n}\n", "spec.gkd", root=GOLDEN)
    assert [d.code for d in checked.diagnostics.errors] == ["E0230"]
