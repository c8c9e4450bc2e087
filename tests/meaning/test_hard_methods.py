"""Methods that strain the language: they check, and what does not run yet is told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from meaning_help import SPECS, inputs, node

from gkd_dsl.graph.nodes import OpNode
from gkd_dsl.meaning.check import check_path, check_text

LATER = {
    "diito": set(),
    "glmd": set(),
    "lrc_bert": set(),
    "mobilebert": set(),
    "mt_bert": set(),
    "rail_kd": set(),
    "rl_kd": set(),
    "rollouts": {
        "the source `rollout`",
    },
    "sid": set(),
    "takd": set(),
    "theseus": set(),
    "uncertainty": set(),
}  # fmt: skip


def test_every_spec_is_listed() -> None:
    assert sorted(path.stem for path in SPECS.glob("*.gkd")) == sorted(LATER)


@pytest.mark.parametrize("name", sorted(LATER))
def test_it_checks(name: str) -> None:
    checked = check_path(SPECS / f"{name}.gkd")
    warned = ["W0704"] if name == "rail_kd" else []
    assert [f"{d.code} {d.message}" for d in checked.diagnostics if d.code not in warned] == []
    assert [d.code for d in checked.diagnostics] == warned
    assert {d.code for d in checked.later} <= {"E0601"}
    assert {d.message.removesuffix(" does not run in this version") for d in checked.later} == LATER[name]
    assert all(d.span is not None for d in checked.later)
    assert checked.stages


@pytest.mark.parametrize(
    ("name", "old", "new", "code"),
    [
        ("theseus", "groups(s.layer, t.layer)", "groups(s.layer, t.layer[0 ..< 11])", "E0237"),
        ("theseus", "not coin(p)", "not coin(q)", "E0203"),
        ("theseus", "replace layer[i]", "replace layr[i]", "E0203"),
        ("theseus", "with t.layer[js]", "with t.layer[12]", "E0204"),
        ("theseus", "with t.layer[js]", "with t.hidden[0]", "E0247"),
        ("theseus", "mixed.layer[3].out", "mixed.layer[4].out", "E0204"),
        ("theseus", "mixed.logits", "mixed.logit", "E0201"),
        ("diito", "swap hidden[j]", "swap hidden[j + 40]", "E0204"),
        ("diito", "from t_src.hidden[j]", "from s_src.hidden[0]", "E0247"),
        ("diito", "for (_, j) in pairs", "for (_, j, k) in pairs", "E0220"),
        ("lrc_bert", "grad = discard", "grad = discrd", "E0402"),
        ("lrc_bert", "add embed", "add embd", "E0203"),
        ("lrc_bert", "add embed", "add logits", "E0247"),
        ("lrc_bert", "soft(adv)", "soft(probe)", "E0273"),
        ("lrc_bert", "at = probe.embed", "at = prob.embed", "E0203"),
        ("sid", "from 1 to s.N", "from 1.5 to s.N", "E0210"),
        ("sid", "mean(cos[k], last = 100 steps)", "mean(cos[k], last = 100)", "E0401"),
        ("sid", "mean(cos[k]", "mean(css[k]", "E0203"),
        ("sid", "stage.progress", "stage.progres", "E0206"),
        ("rl_kd", "reward = ", "reword = ", "E0408"),
        ("rl_kd", "in teachers(ts)) {", "in teachers(ts), hiden = 8) {", "E0234"),
        ("rl_kd", "-(hard + soft)", "-(hrd + soft)", "E0203"),
        ("rl_kd", "pi.pick[k]", "pi.pck[k]", "E0206"),
        ("mt_bert", "ts[k].logits, batch", "ts[k + 1].logits, batch", "E0212"),
        ("mt_bert", "teachers(ts)", "teachers(s.N)", "E0233"),
        ("glmd", "vocabulary = ", "vocabluary = ", "E0408"),
        ("glmd", "kept(50%, source", "keep(50%, source", "E0404"),
        ("glmd", "kept(50%", "kept(101%", "E0403"),
        ("glmd", "kept(50%", "kept(0.5", "E0404"),
        ("glmd", "source = lines", "sauce = lines", "E0234"),
        ("glmd", "source = lines", "source = t", "E0404"),
        ("glmd", ", source = lines", "", "E0235"),
        ("glmd", "like = t", "similarity = cosin", "E0404"),
        ("glmd", ', align = "kept"', "", "E0320"),
        ("glmd", 'align = "kept"', 'align = "trim"', "E0320"),
        ("glmd", " { vocabulary = kept(50%, source = lines, like = t) }", "", "E0320"),
        ("rollouts", "rollout(s, prompts", "rollout(s, prompt", "E0203"),
        ("rollouts", "backend = gemini", "backend = gemeni", "E0402"),
        ("rollouts", "teacher t {", "student t {", "E0244"),
        ("mobilebert", "each i in 0 ..< s.N", "each i in s.N", "E0217"),
        ("uncertainty", "log(s.C)", "log(s.C - 2)", "E0216"),
    ],
)
def test_a_mistake_in_what_comes_later_is_found_now(name: str, old: str, new: str, code: str) -> None:
    text = (SPECS / f"{name}.gkd").read_text()
    assert old in text
    path: Path = SPECS / f"{name}.gkd"
    checked = check_text(text.replace(old, new, 1), path.name, path=path, root=SPECS)
    assert [d.code for d in checked.diagnostics if d.severity == "error"] == [code]


def test_a_teacher_is_weighted_by_what_it_does_on_a_sample() -> None:
    checked = check_path(SPECS / "mt_bert.gkd")
    taught = [
        inputs(checked, inputs(checked, key)["teacher"])["x"]
        for key in checked.graph
        if isinstance(node(checked, key), OpNode) and node(checked, key).op == "kl"  # type: ignore[attr-defined]
    ]
    assert sorted(taught) == ["a/logits", "b/logits"]


def test_a_pass_has_taps_of_its_own() -> None:
    checked = check_path(SPECS / "theseus.gkd")
    assert {"mixed/logits", "mixed/hidden.4", "mixed/forward"} <= set(checked.graph)
    assert inputs(checked, "mixed/forward")["model"] == "model/s"
