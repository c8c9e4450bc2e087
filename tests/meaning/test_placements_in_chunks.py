"""`placement = gemini`: what the check lets pass, and what it refuses with which words."""

from pathlib import Path

import pytest

from gkd_dsl.meaning.check import check_text

ROOT = Path(__file__).parents[1] / "golden" / "E0101"
SPEC = """gkd 1
teacher t = hf("../models/teacher")
MORE
data d = csv("../data/reviews.csv", text = "text", label = "label")
loss soft = kl(s.logits <- t.logits)
STAGES
runtime {
  backend = gemini
  precision = bf16
  PLACED
}
"""
MAIN = """stage main for 10 steps {
  minimize soft
}
"""
TEACH = """stage teach for 10 steps {
  train t
  minimize cross_entropy(t.logits, batch.labels)
}
"""
ASSIST = """stage teach for 10 steps {
  train t
  minimize cross_entropy(t.logits, batch.labels)
}
stage assist for 10 steps {
  train s
  minimize kl(s.logits <- u.logits)
}
"""
LENT = """pass mixed = s(batch) {
  replace layer[0] with t.layer[0]
}
stage main for 10 steps {
  minimize soft + mse(mixed.logits <- t.logits)
}
"""
STUDENT = "student s = truncated(t, layers = [0, 1])"


def refused(placed, stages=MAIN, more=STUDENT):
    text = SPEC.replace("MORE", more).replace("STAGES", stages).replace("PLACED", placed)
    found = check_text(text, "spec.gkd", root=ROOT)
    assert not found.later
    return [(d.code, d.message) for d in found.diagnostics.errors]


def chunks(name="t", role="teacher", *settings):
    lines = "\n".join(("placement = gemini", *settings))
    return f"{role} {name} {{\n{lines}\n}}"


def test_it_checks():
    assert refused(chunks()) == []
    assert refused(chunks("t", "teacher", "shard_param_frac = 0.5")) == []
    assert refused(chunks("t", "teacher", "offload_param_frac = 0.25")) == []


@pytest.mark.parametrize("setting", ["shard_param_frac = 1.5", "offload_param_frac = -0.1"])
def test_shares_are_in_their_range(setting):
    assert [code for code, _ in refused(chunks("t", "teacher", setting))] == ["E0403"]


def test_what_a_stage_trains_is_elsewhere():
    found = refused(chunks("s", "student"))
    assert found == [("E0432", "`s` cannot be held in Gemini's chunks: stage `main` trains it")]


def test_its_blocks_stay_its_own():
    ((code, message),) = refused(chunks(), LENT)
    assert code == "E0432"
    assert "stage `main` exchanges blocks with another model" in message


def test_what_is_made_from_a_trained_model_would_be_made_anew_from_another():
    more = f"{STUDENT}\nteacher u = truncated(t, layers = [0])"
    ((code, message),) = refused(chunks("u"), ASSIST, more)
    assert code == "E0432"
    assert message == "`u` cannot be held in Gemini's chunks: it is made from `t`, which stage `teach` trains"
    assert refused(chunks("u"), ASSIST.replace(TEACH, ""), more) == []
