"""Several errors at once, each once, and their consequences silent."""

from __future__ import annotations

import pytest
from meaning_help import HARD, SOFT, TEACHER, check, codes, spec, stage

from gkd_dsl.diagnostics.render import apply_fix


def test_independent_errors_are_all_found() -> None:
    text = (
        "param T: float = 40.0 in 1.0 ..= 20.0\n"
        "loss soft = kl(s.logits <- t.logits, temperature = T)\n"
        "loss hid = mse(s.hidden[-1] <- t.hidden[-1])\n"
        "loss deep = mse(s.layer[7].out <- t.layr[3].out)\n"
        "loss hard = cross_entropy(s.logits, batch.label)\n"
        "metric acc = acuracy(s.logits, batch.labels)\n"
        + stage(
            "minimize soft + hid + deep + hard\nbatchsize = 3\noptim = adamw(lr = 1e-4, warmup = 0.1)\nevaluate acc"
        )
    )
    checked = check(spec(text))
    assert sorted(codes(checked)) == [
        "E0201", "E0204", "E0231", "E0240", "E0301", "E0401", "E0403", "E0408",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        ('teacher t = hf("models/techer")', "E0501"),
        ('teacher t = h("models/teacher")', "E0508"),
        ('teacher t = hf("models/teacher", num_labels = "two")', "E0502"),
    ],
)
def test_a_broken_model_is_reported_once(broken: str, code: str) -> None:
    text = (
        SOFT + HARD + "project W = linear(s.H -> t.H)\n"
        "loss hid = sum(mse(s.layer[i].out |> W <- t.layer[j].out) for (i, j) in uniform(s.layer, t.layer))\n"
        "let u = entropy(t.logits)\n"
        "metric agree = similarity_spearman(s.final <- t.final)\n"
    )
    use = 'import "gkd:kd" use kd\nuse kd(t -> s) as k\n'
    end = stage("minimize soft + hid + hard + k.total + mean(u * per_sample(kl(s.logits <- t.logits)))\nevaluate agree")
    checked = check(spec(text + use + end).replace(TEACHER.strip(), broken))
    assert codes(checked) == [code]


@pytest.mark.parametrize(
    ("declared", "uses", "code"),
    [
        ("let w = 2 * unknown_name\n", "w * soft + w * w * soft", "E0203"),
        ("project W = linear(s.H, 7)\nloss a = mse(s.final |> W <- t.final)\n", "soft + a", "E0313"),
        ("loss a[i] = mse(s.layer[i].ou <- t.layer[i].out)\n", "soft + sum(a[i] for i in 0 ..< 4)", "E0201"),
        ("loss f(m: model) = kl(m.logitz <- t.logits)\n", "soft + f(s)", "E0201"),
        ("mask m = batch.labls != 0\nloss a = kl(s.logits <- t.logits, mask = m)\n", "soft + a", "E0240"),
        ('import "gkd:kdd" use kdd\nuse kdd(t -> s) as k\n', "soft + k.total + k.hard", "E0511"),
        ("use kd(t -> s) as k\n", "soft + k.total", "E0203"),
        ('import "none.gkd" as none\nuse none.m(t -> s) as k\n', "soft + k", "E0512"),
        ('import python "none.py" as ops\nloss a = ops.f(s.logits <- t.logits)\n', "soft + a", "E0513"),
        ("let a = [1, 2][5]\n", "a * soft", "E0212"),
        ("let a = b\nlet b = a\n", "a * soft + b * soft", "E0242"),
    ],
)
def test_a_broken_declaration_keeps_its_uses_silent(declared: str, uses: str, code: str) -> None:
    assert codes(check(spec(SOFT + declared + stage(f"minimize {uses}")))) == [code]


def test_an_error_in_a_comprehension_is_told_once() -> None:
    text = "loss hid = sum(mse(s.layer[i].outt <- t.layer[j].out) for (i, j) in all_pairs(s.layer, t.layer))\n"
    assert codes(check(spec(text + stage("minimize hid")))) == ["E0201"]


def test_a_broken_source_is_told_once_for_all_stages() -> None:
    data = 'data reviews = csv("data/none.csv", text = "text")\n'
    text = SOFT + stage("minimize soft", "a") + stage("source = reviews\nminimize soft", "b")
    assert codes(check(spec(text, data=data))) == ["E0503"]


def test_a_syntax_error_leaves_the_rest_to_the_checker() -> None:
    text = "loss soft = kl(s.logits <- t.logits,, temperature = 2.0)\nloss hid = mse(s.hiden[1] <- t.hidden[1])\n"
    found = codes(check(spec(text + stage("minimize soft + hid"))))
    assert "E0201" in found
    assert len([code for code in found if code.startswith("E01")]) == 1
    assert len(found) == 2


def test_each_fix_leaves_one_error_less() -> None:
    text = spec(
        "loss soft = kl(s.logits <- t.logits, temprature = 2.0)\n"
        "loss hid = mse(s.hidden[-1] <- t.hidden[-1])\n"
        "loss back = kl(t.logits <- s.logits)\n" + stage("minimize soft + hid + 10% * back\nbatchsize = 3")
    )
    left = len(check(text).diagnostics)
    assert left == 4
    while left:
        found = next(d for d in check(text).diagnostics if d.fix is not None)
        assert found.fix is not None
        text = apply_fix(text, found.fix)
        now = len(check(text).diagnostics)
        assert now <= left
        assert found.message not in [d.message for d in check(text).diagnostics]
        left = now
