"""Methods: hygiene, names, stages, several teachers, where their errors are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from meaning_help import (
    HARD,
    LINES,
    REVIEWS,
    SOFT,
    STUDENT,
    TEACHER,
    check,
    codes,
    good,
    inputs,
    node,
    parts,
    spec,
    stage,
)

from gkd_dsl.graph.nodes import OpNode, StageNode, TrainTarget
from gkd_dsl.meaning.check import check_path
from gkd_dsl.meaning.imports import library, library_folder

SOFT_LABELS = """
method soft_labels(teacher t, student s, T: float = 2.0 in 1.0 ..= 9.0) {
  let scale = T
  loss soft = kl(s.logits <- t.logits, temperature = scale)
  total = 0.5 * soft
}
"""


def test_a_use_gives_named_losses_and_a_total() -> None:
    checked = good(spec(SOFT_LABELS + "use soft_labels(t -> s, T = 3.0) as m\n" + stage("minimize m.total + m.soft")))
    assert parts(checked, "m/soft") == ["kl(student=s/logits, teacher=detach(x=t/logits))"]
    found = checked.stages[0]
    assert [
        (weight.amount, key) for weight, key in zip(found.weights, inputs(checked, found.key).values(), strict=True)
    ] == [(1.5, "loss/m/soft")]


def test_the_alias_alone_is_its_total() -> None:
    checked = good(spec(SOFT_LABELS + "use soft_labels(t -> s) as m\n" + stage("minimize 2 * m")))
    assert checked.stages[0].weights[0].amount == 1.0


def test_two_uses_of_one_method_do_not_clash() -> None:
    models = TEACHER + 'teacher u = hf("models/teacher")\n' + STUDENT
    text = SOFT_LABELS + "use soft_labels(t -> s) as a\nuse soft_labels(u -> s, T = 5.0) as b\n"
    checked = good(spec(text + stage("minimize a + b.total"), models=models))
    temperatures = {}
    for name in ("a", "b"):
        (key,) = inputs(checked, f"loss/{name}/soft").values()
        op = node(checked, key)
        assert isinstance(op, OpNode)
        assert key.startswith(f"op/{name}/")
        temperatures[name] = (op.attr("temperature"), inputs(checked, inputs(checked, key)["teacher"])["x"])
    assert temperatures == {"a": (2.0, "t/logits"), "b": (5.0, "u/logits")}


def test_a_body_does_not_see_the_callers_names() -> None:
    leaky = "method leaky(teacher a, student b) {\n  loss soft = kl(b.logits <- t.logits, temperature = tau)\n}\n"
    checked = check(spec("let tau = 4.0\n" + leaky + "use leaky(t -> s) as m\n" + stage("minimize m.soft")))
    assert codes(checked) == ["E0203", "E0203"]
    assert "nothing is called `t` here" in [d.message for d in checked.diagnostics]


def test_a_body_sees_the_parameters_of_its_file_and_shadows_nothing() -> None:
    text = "param tau: float = 4.0\nmethod m(teacher a, student b) {\n  loss hard = kl(b.logits <- a.logits, temperature = tau)\n}\n"
    checked = good(spec(text + HARD + "use m(t -> s) as m1\n" + stage("minimize m1.hard + hard")))
    assert parts(checked, "hard") != parts(checked, "m1/hard")


def test_formals_are_not_members() -> None:
    checked = check(spec(SOFT_LABELS + "use soft_labels(t -> s) as m\n" + stage("minimize m.total + m.T * m.soft")))
    assert codes(checked) == ["E0208"]


def test_an_error_inside_is_shown_at_the_use() -> None:
    models = TEACHER + 'student s = hf("models/eight_heads")\n'
    text = 'import "gkd:tinybert" use tinybert\nuse tinybert(t -> s) as tb\n'
    checked = check(spec(text + stage("minimize tb.total"), models=models))
    (found,) = checked.diagnostics
    assert found.code == "E0312"
    assert found.span is not None
    assert (found.span.source.name, found.span.text) == ("spec.gkd", "use tinybert(t -> s) as tb")
    inside = [label.span for label in found.labels[1:]]
    assert {span.source.name for span in inside} == {"gkd:tinybert"}
    assert inside[0].text == "s.layer[i].attn.scores"
    assert found.fix is None


def test_methods_may_use_methods() -> None:
    outer = """
method both(teacher t, student s) {
  use soft_labels(t -> s, T = 4.0) as inner
  loss hard = cross_entropy(s.logits, batch.labels)
  total = hard + inner.total
}
"""
    checked = good(spec(SOFT_LABELS + outer + "use both(t -> s) as m\n" + stage("minimize m")))
    assert "loss/m/inner/soft" in checked.graph
    (op,) = inputs(checked, "loss/m/inner/soft").values()
    assert [use.text for use in node(checked, op).locations[0].uses] == [
        "use both(t -> s) as m",
        "use soft_labels(t -> s, T = 4.0) as inner",
    ]


def test_run_makes_the_stages_of_a_method() -> None:
    text = 'import "gkd:tinybert" use tinybert\nuse tinybert(t -> s, T = 2.0) as tb\nrun tb\n'
    checked = good(spec(text))
    assert [(found.name, found.order) for found in checked.stages] == [("tb.intermediate", 0), ("tb.prediction", 1)]
    first, second = checked.stages
    assert (first.duration.amount, first.optim.lr, second.optim.lr) == (10.0, 5e-5, 3e-5)
    assert list(inputs(checked, second.key).values()) == ["loss/tb/soft"]
    assert set(first.trains) == {TrainTarget("model", "s"), TrainTarget("project", "tb/W")}
    assert second.trains == (TrainTarget("model", "s"),)


def test_run_and_own_stages_keep_their_order() -> None:
    text = 'import "gkd:kd" use kd\nuse kd(t -> s) as k\n' + HARD
    checked = good(spec(text + stage("minimize hard", "before") + "run k\n" + stage("minimize hard", "after")))
    assert [found.name for found in checked.stages] == ["before", "k.task", "after"]


def test_a_family_of_stages_trains_layer_by_layer() -> None:
    text = "loss feature[i] = mse(s.layer[i].out <- t.layer[3 * i + 2].out)\n"
    text += "stage transfer[i] for 1 epoch each i in 0 ..< s.N {\n  train s.layer[i]\n  minimize feature[i]\n}\n"
    checked = good(spec(text, models=TEACHER + "student s = truncated(t, layers = [2, 5, 8])\n"))
    assert [(found.name, found.trains) for found in checked.stages] == [
        (f"transfer.{i}", (TrainTarget("model", "s", f"layer.{i}"),)) for i in range(3)
    ]
    assert isinstance(node(checked, "stage/transfer.1"), StageNode)


def test_several_teachers_behind_one_formal() -> None:
    text = """
method averaged(teacher ts, student s) {
  loss soft[k] = kl(s.logits <- ts[k].logits)
  total = mean(soft[k] for k in teachers(ts))
}
"""
    models = 'teacher a = hf("models/teacher")\nteacher b = hf("models/eight_heads")\n' + STUDENT
    checked = good(spec(text + "use averaged([a, b] -> s) as m\n" + stage("minimize m"), models=models))
    assert parts(checked, "m/soft.1") == ["kl(student=s/logits, teacher=detach(x=b/logits))"]
    assert [weight.amount for weight in checked.stages[0].weights] == [0.5, 0.5]
    one = good(spec(text + "use averaged(t -> s) as m\n" + stage("minimize m")))
    assert [weight.amount for weight in one.stages[0].weights] == [1.0]
    checked = check(
        spec(
            text + "use averaged([a, s] -> s) as m\n" + stage("minimize m"),
            models=models.replace("teacher b", "teacher _b"),
        )
    )
    assert codes(checked) == ["E0244"]


WARNS = {"mt_bert": ["W0704"]}
"""Methods that do by design what the checker warns of: a map that trains on the teacher's side alone."""


@pytest.mark.parametrize("name", library())
def test_the_library_checks_alone(name: str) -> None:
    checked = check_path(library_folder() / f"{name}.gkd")
    assert codes(checked) == WARNS.get(name, [])


@pytest.mark.parametrize("name", library())
def test_the_library_checks_in_use(name: str) -> None:
    if name in ("distilbert",):
        models = 'teacher t = hf("models/teacher_mlm")\nstudent s = truncated(t, layers = [0, 3, 6, 9])\n'
        data = 'data lines = text("data/text.txt")\n'
    else:
        models = TEACHER + "student s = truncated(t, layers = [0, 3, 6, 9])\n"
        data = 'data reviews = csv("data/reviews.csv", text = "text", label = "label")\n'
    teachers = "t"
    if name in ("mt_bert", "rl_kd", "tmkd", "uncertainty"):
        models, teachers = models.replace("student", 'teacher t2 = hf("models/teacher")\nstudent'), "[t, t2]"
    text = f'import "gkd:{name}" as lib\nuse lib.{name}({teachers} -> s) as m\n'
    for body in (stage("minimize m.total"), "run m\n"):
        assert codes(check(spec(text + body, models=models, data=data))) == WARNS.get(name, [])


def test_a_method_file_is_checked_without_models(tmp_path: Path) -> None:
    path = tmp_path / "wrong.gkd"
    path.write_text(
        "gkd 1\n\nmethod wrong(teacher t, student s) {\n  loss soft = kl(s.logit <- t.logits)\n  total = soft\n}\n"
    )
    checked = check_path(path)
    assert codes(checked) == ["E0201"]
    assert checked.diagnostics.found[0].fix is not None


def test_unused_losses_of_a_method_are_no_reason_to_warn() -> None:
    good(
        spec(
            SOFT_LABELS.replace("total =", "loss extra = cross_entropy(s.logits, batch.labels)\n  total =")
            + "use soft_labels(t -> s) as m\n"
            + stage("minimize m")
        )
    )
    assert codes(check(spec(SOFT + HARD + stage("minimize soft")))) == ["W0701"]


def test_a_formal_of_a_type_that_is_none() -> None:
    text = SOFT_LABELS.replace("T: float", "T: flaot") + "use soft_labels(t -> s) as m\n" + stage("minimize m")
    assert codes(check(spec(text))) == ["E0405"]
    assert codes(check("gkd 1\n" + SOFT_LABELS.replace("T: float", "T: flaot"))) == ["E0405"]
    function = "loss f(m: modle) = kl(m.logits <- t.logits)\n" + stage("minimize f(s)")
    assert codes(check(spec(function))) == ["E0405"]


def test_a_methods_variant_of_weight_zero_is_no_doubt_but_ones_own_is() -> None:
    text = 'import "gkd:distilbert" use distilbert\nuse distilbert(t -> s) as d\nrun d\n'
    models = 'teacher t = hf("models/teacher_mlm")\nstudent s = truncated(t, layers = [0, 3, 6, 9])\n'
    good(f'gkd 1\n{models}data lines = text("data/text.txt")\n{text}')
    assert codes(check(spec(HARD + SOFT + stage("minimize hard + 0 * soft")))) == ["W0702"]


def test_the_data_of_a_methods_stages_is_given_where_it_is_used() -> None:
    two = REVIEWS + LINES
    text = 'import "gkd:kd" use kd\n' + TEACHER + STUDENT + two
    checked = good(f"gkd 1\n{text}use kd(t -> s, source = reviews) as k\nrun k\nuse kd(t -> s, source = reviews) as m\n"
                   + stage("source = lines\nminimize m.soft", "soft"))  # fmt: skip
    assert [held.source.name for held in checked.stages if held.source] == ["reviews", "lines"]
    for source, code in (("t", "E0404"), ("nothing", "E0203")):
        found = check(f"gkd 1\n{text}use kd(t -> s, source = {source}) as k\nrun k\n")
        assert codes(found)[0] == code
    assert codes(check(f"gkd 1\n{text}use kd(t -> s) as k\nrun k\n"))[0] == "E0412"


def test_models_given_by_name_are_not_given_twice() -> None:
    method = "method chain(teacher a, model b, student c) {\n  loss soft = kl(c.logits <- a.logits)\n}\n"
    body = method + "use chain(t -> s, b = m) as k\n" + stage("minimize k.soft")
    checked = check(spec(body, TEACHER + STUDENT + 'model m = hf("models/student")\n'))
    assert "E0244" not in codes(checked)
    assert "E0235" not in codes(checked)
    assert "loss/k/soft" in checked.graph
