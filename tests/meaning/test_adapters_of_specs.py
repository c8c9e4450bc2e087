"""`adapter = lora(...)`: what it may say, of which models, and what a stage then trains."""

from __future__ import annotations

import io

import pytest
from meaning_help import CAUSAL, REVIEWS, SOFT, TEACHER, check, codes, good, spec, stage
from rich.console import Console

from gkd_dsl.graph.explain import explain, render
from gkd_dsl.graph.nodes import TrainTarget
from gkd_dsl.graph.schema import from_json, to_json
from gkd_dsl.meaning import libraries
from gkd_dsl.models.info import Lora

S = TrainTarget("model", "s")

TRIMMED = 'loss soft = kl(s.logits <- t.logits, align = "trim")\n'


def student(call: str, made: str = 'hf("models/student")') -> str:
    return f"student s = {made} {{ adapter = {call} }}\n"


def text(call: str, lines: str = "minimize soft", losses: str = SOFT, made: str = 'hf("models/student")') -> str:
    return spec(losses + stage(lines), TEACHER + student(call, made))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("lora()", Lora(16, 32.0, 0.0, ("query", "value"))),
        ("lora(8)", Lora(8, 16.0, 0.0, ("query", "value"))),
        ("lora(r = 4, alpha = 1.5, dropout = 0.25)", Lora(4, 1.5, 0.25, ("query", "value"))),
        ('lora(targets = ["dense", "attention.self.key"])', Lora(16, 32.0, 0.0, ("dense", "attention.self.key"))),
        ("lora(export = adapter)", Lora(16, 32.0, 0.0, ("query", "value"), "adapter")),
        ('lora(export = "merged")', Lora(16, 32.0, 0.0, ("query", "value"))),
        ("lora(rslora = true, dora = true)", Lora(16, 32.0, 0.0, ("query", "value"), rslora=True, dora=True)),
        ("lora(r = s.N)", None),
    ],
)
def test_what_is_said_is_what_is_known(call: str, expected: Lora | None) -> None:
    if expected is None:
        assert not check(text(call)).ok
        return
    assert good(text(call)).models["s"].info.build.lora == expected


def test_its_numbers_may_be_parameters() -> None:
    found = good("gkd 1\nparam R: int = 8\n" + text("lora(r = R, alpha = R)").removeprefix("gkd 1\n"))
    assert found.models["s"].info.build.lora == Lora(8, 8.0, 0.0, ("query", "value"))


def test_targets_are_those_of_the_family() -> None:
    models = CAUSAL.replace('hf("models/qwen_small")', 'hf("models/qwen_small") { adapter = lora(2) }')
    found = good(spec(TRIMMED + stage("minimize soft"), models, ""))
    lora = found.models["s"].info.build.lora
    assert lora is not None
    assert lora.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("call", "code", "near"),
    [
        ("lora(rank = 8)", "E0234", ""),
        ("lora(alhpa = 8)", "E0234", "alpha"),
        ("lora(4, r = 8)", "E0241", ""),
        ("lora(r = 2.5)", "E0404", ""),
        ('lora(r = "8")', "E0404", ""),
        ("lora(r = 0)", "E0403", "1"),
        ("lora(r = 100000)", "E0403", "312"),
        ("lora(alpha = 0)", "E0403", "32"),
        ("lora(dropout = 1.0)", "E0403", ""),
        ("lora(dropout = -0.1)", "E0403", ""),
        ("lora(targets = [])", "E0404", ""),
        ('lora(targets = "query")', "E0404", ""),
        ('lora(targets = ["q_proj"])', "E0434", ""),
        ('lora(targets = ["vlaue"])', "E0434", '"value"'),
        ("lora(export = marged)", "E0402", "merged"),
        ("lora(dora = 1)", "E0404", ""),
        ("lorra(8)", "E0508", "lora"),
        ("lora", "E0508", "lora()"),
        ("3", "E0508", ""),
    ],
)
def test_what_is_wrong_is_told_once_with_what_is_meant(call: str, code: str, near: str) -> None:
    found = check(text(call)).diagnostics.errors
    assert [d.code for d in found] == [code]
    assert [edit.text for edit in found[0].fix.edits] == [near] if near else found[0].fix is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("lora(alpha = 0)", "`alpha` is 0, outside the numbers above 0"),
        ("lora(targets = [])", "`targets` of `lora` does not take an empty list"),
        ("lora(targets = [3])", "`targets` of `lora` does not take a list"),
    ],
)
def test_the_cause_is_what_is_wrong(call: str, said: str) -> None:
    (found,) = check(text(call)).diagnostics.errors
    assert found.message == said


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ("truncated(t, layers = [0, 1])", "its weights are made here"),
        ('random_init("models/student")', "its weights are made here"),
        ("with_head(t, task = classification, num_labels = 2)", "its weights are made here"),
    ],
)
def test_an_adapter_alone_needs_its_base(made: str, why: str) -> None:
    (found,) = check(text("lora(4, export = adapter)", made=made)).diagnostics.errors
    assert found.code == "E0434"
    assert why in found.message
    assert good(text("lora(4)", made=made)).models["s"].info.build.lora is not None


@pytest.mark.parametrize("order", ["{0}\n  {1}", "{1}\n  {0}"])
def test_a_part_of_a_vocabulary_has_no_adapter_alone(order: str) -> None:
    block = order.format("adapter = lora(4, export = adapter)", "vocabulary = kept(30, source = reviews)")
    models = TEACHER + f'student s = hf("models/student") {{\n  {block}\n}}\n'
    found = check(spec(SOFT + stage("minimize soft"), models)).diagnostics.errors
    assert [d.code for d in found] == ["E0434"]
    assert "a part of its vocabulary" in found[0].message


@pytest.mark.parametrize(
    ("lines", "targets"),
    [
        ("", {S}),
        ("train s.layer[0 ..< 2]", {TrainTarget("model", "s", f"layer.{i}") for i in (0, 1)}),
        ("train s.head", {TrainTarget("model", "s", "head")}),
        (
            "freeze s.embed",
            {TrainTarget("model", "s", p) for p in ("layer.0", "layer.1", "layer.2", "layer.3", "head")},
        ),
        ("freeze s.layer", {TrainTarget("model", "s", "head")}),
    ],
)
def test_what_a_stage_trains(lines: str, targets: set[TrainTarget]) -> None:
    assert set(good(text("lora(4)", f"{lines}\nminimize soft".strip())).stages[0].trains) == targets


def test_what_is_frozen_does_not_train() -> None:
    assert codes(check(text("lora(4)", "train s.embed\nminimize soft"))) == ["E0417"]
    assert good(text("lora(4)", "train s.layer[1]\nminimize soft")).ok
    # The head of a language model is there, and stays.
    models = CAUSAL.replace('hf("models/qwen_small")', 'hf("models/qwen_small") { adapter = lora(2) }')
    assert "E0417" in codes(check(spec(TRIMMED + stage("train s.head\nminimize soft"), models, "")))


def test_a_loss_on_the_embeddings_reaches_no_adapter() -> None:
    losses = "project W = linear(s.H -> t.H)\nloss low = mse(s.embed |> W <- t.embed)\n"
    found = check(text("lora(4)", "train s\nminimize low", losses))
    assert codes(found) == ["E0340"]
    losses = losses.replace("s.embed", "s.hidden[1]")
    assert check(text("lora(4)", "minimize low", losses)).ok


def test_a_model_that_nothing_trains_is_doubtful() -> None:
    models = TEACHER.strip() + " { adapter = lora(4) }\n" + 'student s = hf("models/student")\n'
    assert codes(check(spec(SOFT + stage("minimize soft"), models))) == ["W0705"]
    fit = "loss fit = cross_entropy(t.logits, batch.labels)\n"
    both = stage("train t\nminimize fit", "teach") + stage("minimize soft", "learn")
    assert check(spec(SOFT + fit + both, models)).diagnostics.ok


def test_one_adapter_is_trained() -> None:
    models = TEACHER + 'student s = hf("models/student") {\n  adapter = lora(4)\n  adapter = lora(2)\n}\n'
    assert codes(check(spec(SOFT + stage("minimize soft"), models))) == ["E0245"]


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "installed", lambda library: library != "peft")
    (found,) = check(text("lora(4)")).diagnostics.errors
    assert found.code == "E0435"
    assert [note.text for note in found.notes] == ['`pip install "gkd-dsl[peft]"`']


def test_it_is_explained_and_drawn() -> None:
    found = good(text("lora(r = 4, rslora = true)"))
    shown = io.StringIO()
    render(explain(found.graph), Console(file=shown, width=200))
    assert "loaded, with LoRA of rank 4 on query, value" in shown.getvalue()
    assert "s (its adapters, classifier)" in shown.getvalue()
    again = from_json(to_json(found.graph))
    assert again.nodes["model/s"]["node"].info.build.lora == found.models["s"].info.build.lora


def test_two_models_may_have_one_each() -> None:
    models = 'model t = hf("models/teacher") { adapter = lora(4) }\n' + student("lora(2)")
    fit = "loss fit = cross_entropy(t.logits, batch.labels)\n"
    both = stage("minimize fit", "teach") + stage("minimize soft", "learn")
    assert good(f"gkd 1\n{models}{REVIEWS}{SOFT}{fit}{both}").ok
