"""A fix, pasted, checks: for what golden cases do not show."""

from __future__ import annotations

import pytest
from meaning_help import CAUSAL, GOLDEN, HARD, REVIEWS, SHORT, SOFT, STUDENT, TEACHER, check, spec, stage

from gkd_dsl.diagnostics.render import apply_fix

MIN = stage("minimize soft")
DRAWN = (
    "loss soft = sum(mse(s.layer[i].out <- t.layer[j].out) for (i, j) in random_sorted(s.layer, t.layer, every = {}))\n"
)


def param(declared: str, value: str, within: str) -> str:
    return spec(f"param _p: {declared} = {value} in {within}\n" + SOFT + MIN)


def optim(args: str) -> str:
    return spec(SOFT + stage(f"minimize soft\noptim = adamw({args})"))


FIXED = [
    # Parameters and settings: a number inside the range, in the unit that it had.
    (param("float", "6", "0 ..= 5"), "E0403", "5"),
    (param("ratio", "50%", "0 ..= 0.3"), "E0403", "30%"),
    (param("duration", "500 steps", "1 ..= 100"), "E0403", "100 steps"),
    (param("int", "0", "0.5 ..= 5"), "E0403", "1"),
    (param("int", "9", "0 ..< 5"), "E0403", "4"),
    (param("int", "12345678", "0 ..= 1234567"), "E0403", "1234567"),
    (param("float", "12.3456789%", "0 ..= 1"), "E0401", "0.123456789"),
    (param("ratio", "0.07", "0 ..= 1"), "E0401", "7%"),
    (spec(SOFT + stage("minimize soft\ncheckpoint_every = 1234567")), "E0401", "1234567 steps"),
    (spec(SOFT + stage("minimize soft\nbatch_size = 32 steps")), "E0401", "32"),
    (optim("warmup = 1234567"), "E0401", "1234567 steps"),
    (optim("warmup = 1"), "E0401", "1 step"),
    (optim("warmup = 0.07"), "E0401", "7%"),
    (optim("clip = 0"), "E0403", "false"),
    (spec(DRAWN.format("1") + MIN, models=TEACHER + SHORT), "E0401", "1 epoch"),
    (spec(DRAWN.format("2") + MIN, models=TEACHER + SHORT), "E0401", "2 epochs"),
    (spec(DRAWN.format("100 steps") + MIN, models=TEACHER + SHORT), "E0401", "1 epoch"),
    # Calls, with a comma at the end and with parentheses inside.
    (
        spec(SOFT + MIN, models='teacher t = hf("models/teacher", num_labels = 3)\nstudent s = hf("models/student",)\n'),
        "E0322",
        " num_labels = t.num_labels",
    ),
    (
        spec(
            SOFT + MIN,
            models='teacher t = hf("models/teacher", num_labels = 3)\nstudent s = hf(\n  "models/student",  # small, fast\n)\n',
        ),
        "E0322",
        " num_labels = t.num_labels",
    ),
    (spec("loss soft = kl((s.logits), t.logits)\n" + MIN), "E0336", "(s.logits) <- t.logits"),
    (spec("loss soft = kl(s.logits, (t.logits))\n" + MIN), "E0336", "s.logits <- (t.logits)"),
    (spec("project W = linear((s.H), t.H)\nloss soft = mse(s.final |> W <- t.final)\n" + MIN), "E0313", "(s.H) -> t.H"),
    (spec(SOFT + stage("minimize ramp((0), 1, until = 10%) * soft")), "E0224", "(0) -> 1"),
    (spec('loss soft = kl(s.logits <- t.logits, align = "exact")\n' + MIN, models=CAUSAL, data=""), "E0320", '"trim"'),
    # A stage on one line.
    (spec("stage main for 1 epoch { minimize mse(s.final <- t.final) }\n"), "E0301", "project W = linear(s.H -> t.H)\n"),
    (spec("loss soft = mse(-s.final <- t.final)\n" + MIN), "E0301", "project W = linear(s.H -> t.H)\n"),
    (spec("loss fit = cross_entropy(t.logits, batch.labels)\nstage main for 1 epoch { minimize fit }\n"), "E0340", "train t\n"),
    # What is trained already goes on being trained.
    (
        spec("loss fit = cross_entropy(t.logits, batch.labels)\n" + SOFT + stage("minimize fit + soft")),
        "E0340",
        "  train s, t\n",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "written"), FIXED)
def test_a_fix_checks(text: str, code: str, written: str) -> None:
    (found,) = check(text).diagnostics.errors
    assert found.code == code
    assert found.fix is not None
    assert found.fix.edits[0].text == written
    left = check(apply_fix(text, found.fix)).diagnostics
    assert [f"{d.code} {d.message}" for d in left if d.severity == "error"] == []


NOTHING_TO_PASTE = [
    (param("float", "6", "0 ..< 5"), "E0403"),
    (param("int", "0.4", "1 ..= 5"), "E0404"),
    (spec(SOFT + stage("minimize soft\ncheckpoint_every = -5")), "E0401"),
    (spec(SOFT + stage("minimize soft\nbatch_size = 2.5 epochs")), "E0401"),
    (optim("warmup = -1"), "E0401"),
    (spec(DRAWN.format("0 epochs") + MIN, models=TEACHER + SHORT), "E0403"),
    (spec("loss soft = mse(s.logits <- t.logits)\n" + MIN, models=CAUSAL, data=""), "E0320"),
    (spec(SOFT + stage("minimize soft\nfreeze s")), "E0340"),
]


@pytest.mark.parametrize(("text", "code"), NOTHING_TO_PASTE)
def test_no_fix_where_none_would_check(text: str, code: str) -> None:
    (found,) = check(text).diagnostics.errors
    assert found.code == code
    assert found.fix is None


def test_a_label_that_is_close_does_not_replace_the_list_of_labels(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nfine,good\npoor,bda\n")
    data = f'data reviews = csv("{tmp_path}/a.csv", text = "text", label = "label", labels = ["bad", "good"])\n'
    (found,) = check(spec(HARD + stage("minimize hard"), models=STUDENT, data=data)).diagnostics.errors
    assert found.code == "E0505"
    assert found.labels[0].text == "did you mean `bad`?"
    assert found.fix is None


def test_a_model_of_which_outputs_are_stored_gets_no_argument() -> None:
    models = 'teacher t = cached("stored/outputs")\n'
    text = spec("loss hard = cross_entropy(t.logits, batch.labels)\n" + stage("minimize hard"), models, REVIEWS)
    three = text.replace("reviews.csv", "three.csv")
    found = next(d for d in check(three, root=GOLDEN).diagnostics if d.code == "E0323")
    assert found.fix is None
