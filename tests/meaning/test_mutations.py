"""Whatever is done to a spec, the check ends, soon, with diagnostics."""

from __future__ import annotations

import re
import time
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meaning_help import GOLDEN, SPECS, check, codes, spec, stage

from gkd_dsl.diagnostics.render import render_json, render_text
from gkd_dsl.meaning.check import check_text

_TOKEN = re.compile(r'"[^"\n]*"|\w+|\.\.[<=]|<-|->|\|>|[^\w\s]|\n')
_EXTRA = ("batch", "stage", "0", "-1", "99999", "1e9", "10%", "3 epochs", "s", "t", "s.N", "t.layer", "none", "true",
          "kl", "mean", "sum", "detach", "for", "in", "[", "]", "(", ")", "<-", "->", "|>", "..<", "=", "{", "}")  # fmt: skip


@cache
def seeds() -> list[tuple[str, str]]:
    """Folder and text of valid specs."""
    paths = [*sorted(SPECS.glob("*.gkd")), *sorted(GOLDEN.glob("[EW]0[2-7]*/fixed.gkd"))]
    return [(str(path.parent), path.read_text(encoding="utf-8")) for path in paths]


@cache
def words() -> list[str]:
    found = {token for _, text in seeds() for token in _TOKEN.findall(text)}
    return [*sorted(found), *_EXTRA]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, str]:
    folder, text = draw(st.sampled_from(seeds()))
    for _ in range(draw(st.integers(1, 4))):
        places = [(match.start(), match.end()) for match in _TOKEN.finditer(text)]
        if not places:
            break
        start, end = draw(st.sampled_from(places))
        match draw(st.sampled_from(("delete", "twice", "replace", "replace", "swap"))):
            case "delete":
                text = text[:start] + text[end:]
            case "twice":
                text = f"{text[:end]} {text[start:end]}{text[end:]}"
            case "replace":
                text = text[:start] + draw(st.sampled_from(words())) + text[end:]
            case "swap":
                (a, b), (c, d) = sorted([(start, end), draw(st.sampled_from(places))])
                if b <= c:
                    text = text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]
    return folder, text


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(mutated())
def test_a_mutated_spec_gets_diagnostics_and_nothing_else(case: tuple[str, str]) -> None:
    from pathlib import Path

    folder, text = case
    began = time.process_time()
    checked = check_text(text, "spec.gkd", path=Path(folder) / "spec.gkd", root=Path(folder))
    render_text(checked.diagnostics)
    render_json(checked.diagnostics)
    assert time.process_time() - began < 5.0
    for diagnostic in checked.diagnostics:
        assert diagnostic.message
        assert diagnostic.span is None or 0 <= diagnostic.span.start <= diagnostic.span.end <= len(
            diagnostic.span.source.text
        )


SOFT = "loss soft = kl(s.logits <- t.logits)\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("loss soft = sum(kl(s.logits <- t.logits) for i in 0 ..< 1000000000000)\n", "E0218"),
        ("loss soft = sum(sum(kl(s.logits <- t.logits) for j in 0 ..< 4000) for i in 0 ..< 4000)\n", "E0218"),
        (
            "let x = sum(sum(sum(i for i in 0 ..< 4096) for j in 0 ..< 4096) for k in 0 ..< 4096)\n"
            "loss soft = x * kl(s.logits <- t.logits)\n",
            "E0218",
        ),
        ("let w[k] = w[k + 1]\nloss soft = w[0] * kl(s.logits <- t.logits)\n", "E0242"),
        ("let w[k] = w[k]\nloss soft = w[0] * kl(s.logits <- t.logits)\n", "E0242"),
        ("loss f(m: model) = f(m)\nloss soft = f(s)\n", "E0242"),
        ("loss f(m: model) = g(m) + g(m)\nloss g(m: model) = f(m) + f(m)\nloss soft = f(s)\n", "E0242"),
        ("let big = 1e200 * 1e200\nloss soft = big * kl(s.logits <- t.logits)\n", "E0216"),
        (f"let big = {'9' * 400}\nloss soft = big * kl(s.logits <- t.logits)\n", "E0119"),
        ("let w = log(0)\nloss soft = w * kl(s.logits <- t.logits)\n", "E0216"),
        ("let w = exp(1e5)\nloss soft = w * kl(s.logits <- t.logits)\n", "E0216"),
    ],
)
def test_specs_that_would_not_end(text: str, code: str) -> None:
    began = time.process_time()
    checked = check(spec(text + stage("minimize soft")))
    assert time.process_time() - began < 30.0
    assert code in codes(checked)
    assert len(codes(checked)) <= 2


def test_a_family_of_stages_has_a_bound() -> None:
    text = SOFT + "stage many[i] for 1 epoch each i in 0 ..< 100000000 {\n  minimize soft\n}\n"
    assert codes(check(spec(text))) == ["E0218"]


def test_methods_that_double_have_a_bound() -> None:
    text = "method m0(teacher t, student s) {\n  loss soft = kl(s.logits <- t.logits)\n  total = soft\n}\n"
    for k in range(1, 15):
        text += (
            f"method m{k}(teacher t, student s) {{\n  use m{k - 1}(t -> s) as a\n  use m{k - 1}(t -> s) as b\n"
            "  total = a.total + b.total\n}\n"
        )
    checked = check(spec(text + "use m14(t -> s) as m\n" + stage("minimize m")))
    assert set(codes(checked)) == {"E0249"}
    assert len(codes(checked)) == 1


def test_a_long_sum_and_a_deep_nest() -> None:
    long = " + ".join(["soft"] * 80)
    assert codes(check(spec(SOFT + stage(f"minimize {long}")))) == []
    checked = check(spec(SOFT + stage(f"minimize {'(' * 400}soft{')' * 400}")))
    assert all(code.startswith("E01") for code in codes(checked))
    longer = " + ".join(["soft"] * 5000)
    assert all(code.startswith("E01") for code in codes(check(spec(SOFT + stage(f"minimize {longer}")))))
