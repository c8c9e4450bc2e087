"""Stages: what they train, on which data, with which losses, and what they are refused for."""

from __future__ import annotations

import json

import pytest
from meaning_help import CAUSAL, HARD, REVIEWS, SHORT, SOFT, STUDENT, TEACHER, check, codes, good, inputs, spec, stage

from gkd_dsl.graph.explain import explain
from gkd_dsl.graph.nodes import TrainTarget
from gkd_dsl.schedules import Span

S = TrainTarget("model", "s")


def part(name: str) -> TrainTarget:
    return TrainTarget("model", "s", name)


ACC = "metric acc = accuracy(s.logits, batch.labels)\n"
BLOCKS = [part(f"layer.{i}") for i in range(4)]


@pytest.mark.parametrize(
    ("lines", "targets"),
    [
        ("", {S, TrainTarget("project", "W")}),
        ("train s", {S}),
        ("train W, s.head", {TrainTarget("project", "W"), part("head")}),
        ("freeze W", {S}),
        ("freeze s.embed", {TrainTarget("project", "W"), *BLOCKS, part("rest"), part("head")}),
        ("freeze s.body", {TrainTarget("project", "W"), part("head")}),
        # In whatever order and however deep: what is frozen is not trained, and everything else is.
        ("freeze s.layer[0], s.body", {TrainTarget("project", "W"), part("head")}),
        ("freeze s.body, s.layer[0]", {TrainTarget("project", "W"), part("head")}),
        ("train s.body\nfreeze s.layer[0]", {part("embed"), *BLOCKS[1:], part("rest")}),
        ("train s.body, W\nfreeze s.layer", {TrainTarget("project", "W"), part("embed"), part("rest")}),
        ("train s.layer, s.head, W\nfreeze s.body", {TrainTarget("project", "W"), part("head")}),
        ("train s.layer\nfreeze s.embed", {*BLOCKS}),
        ("train s, s.embed\nfreeze s.embed", {*BLOCKS, part("rest"), part("head")}),
        ("train s.layer[1 ..< 3]", {part("layer.1"), part("layer.2")}),
        ("train s.layer[-1]", {part("layer.3")}),
    ],
)
def test_what_a_stage_trains(lines: str, targets: set[TrainTarget]) -> None:
    text = "project W = linear(s.H -> t.H)\nloss hid = mse(s.final |> W <- t.final)\n" + SOFT
    checked = good(spec(text + stage(f"{lines}\nminimize hid + soft".strip())))
    assert set(checked.stages[0].trains) == targets


def test_parts_that_a_model_lacks_are_not_trained() -> None:
    models = "".join(f'{role} {name} = hf("models/{role}", task = encoder)\n' for role, name in (("teacher", "t"), ("student", "s")))  # fmt: skip
    text = "project W = linear(s.H -> t.H)\nloss hid = mse(s.final |> W <- t.final)\n"
    whole = good(spec(text + stage("freeze s.embed, W\nminimize hid"), models))
    assert set(whole.stages[0].trains) == {*BLOCKS, part("rest")}
    (found,) = check(spec(text + stage("train W, s.head\nminimize hid"), models)).diagnostics.errors
    assert (found.code, found.message) == ("E0417", "`s.head` does not train: BertModel has no head")


def test_parts_of_a_family_without_a_table_are_not_trained(tmp_path) -> None:
    config = {"model_type": "albert", "architectures": ["AlbertForSequenceClassification"], "hidden_size": 8}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "vocab_size": 30522}))
    models = f'teacher t = hf("{tmp_path}/a")\nstudent s = hf("{tmp_path}/b")\n'
    good(spec(SOFT + stage("train s\nminimize soft"), models))
    for lines in ("train s.layer[0]", "freeze s.embed", "freeze s.layer[0]"):
        assert codes(check(spec(SOFT + stage(f"{lines}\nminimize soft"), models))) == ["E0417"]


def test_a_teacher_trains_where_it_is_said() -> None:
    text = "loss fit = cross_entropy(t.logits, batch.labels)\n" + SOFT
    checked = good(spec(text + stage("train t\nminimize fit", "teach") + stage("minimize soft", "distil")))
    assert [found.trains for found in checked.stages] == [(TrainTarget("model", "t"),), (S,)]
    assert codes(check(spec(text + stage("minimize fit", "teach") + stage("minimize soft")))) == ["E0340"]


def test_several_stages_weigh_the_same_losses_otherwise() -> None:
    text = HARD + SOFT + stage("minimize soft + 0.1 * hard", "first", "200 steps") + stage("minimize hard", "second")
    first, second = good(spec(text)).stages
    assert (first.duration, first.order, second.order) == (Span(200.0, "steps"), 0, 1)
    assert [weight.amount for weight in first.weights] == [1.0, 0.1]
    assert list(inputs(good(spec(text)), "stage/second").values()) == ["loss/hard"]


def test_settings_of_a_stage() -> None:
    lines = "source = reviews\nbatch_size = 8\naccumulate = 4\nmax_length = 64\nseed = 7\ncheckpoint_every = 50 steps\n"
    lines += "optim = sgd(lr = 0.1, momentum = 0.9, warmup = 10%, decay = cosine, clip = false)\nminimize soft"
    found = good(spec(SOFT + stage(lines))).stages[0]
    assert (found.batch_size, found.accumulate, found.max_length, found.seed) == (8, 4, 64, 7)
    assert found.checkpoint_every == Span(50.0, "steps")
    optim = found.optim
    assert (optim.name, optim.lr, optim.momentum, optim.decay, optim.clip) == ("sgd", 0.1, 0.9, "cosine", None)
    assert (optim.warmup, optim.weight_decay) == (Span(10.0, "percent"), 0.0)


def test_a_text_has_no_more_tokens_than_the_models_have_positions_for() -> None:
    text = spec(SOFT + stage("max_length = LENGTH\nminimize soft"))
    good(text.replace("LENGTH", "512"))
    (found,) = check(text.replace("LENGTH", "513")).diagnostics.errors
    assert found.code == "E0403"
    assert "has positions for 512 tokens" in found.message
    assert found.fix is not None
    assert [edit.text for edit in found.fix.edits] == ["512"]
    of_source = REVIEWS.replace(")", ", max_length = 600)")
    (found,) = check(spec(SOFT + stage("minimize soft"), data=of_source)).diagnostics.errors
    assert found.message.startswith("`max_length` is 600, and")
    good(spec(SOFT + stage("max_length = 100\nminimize soft"), data=of_source))
    # Computed positions have no end.
    soft = SOFT.replace("2.0", '2.0, align = "trim"')
    causal = "gkd 1\n" + CAUSAL + soft + stage("max_length = 100_000\nminimize soft")
    assert codes(check(causal)) == []


def test_losses_declared_in_a_stage_are_its_own() -> None:
    body = "loss soft = kl(s.logits <- t.logits, temperature = {})\nminimize soft"
    text = stage(body.format(1.0), "first") + stage(body.format(4.0), "second")
    checked = good(spec(text))
    assert [list(inputs(checked, found.key).values()) for found in checked.stages] == [
        ["loss/first/soft"],
        ["loss/second/soft"],
    ]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (stage("minimize soft", duration="50%"), "E0401"),
        (stage("minimize soft", duration="0 steps"), "E0403"),
        (stage("minimize soft\noptim = adamw(lr = 10%)"), "E0401"),
        (stage("minimize soft\noptim = adamw(lr = -1.0)"), "E0403"),
        (stage("minimize soft\noptim = adamw(lr = 1e-4, momentum = 0.9)"), "E0234"),
        (stage("minimize soft\noptim = 5"), "E0404"),
        (stage("minimize soft\nbatch_size = 2.5"), "E0404"),
        (stage("minimize soft\nbatch_size = 32 steps"), "E0401"),
        (stage("minimize soft\ncheckpoint_every = 100"), "E0401"),
        (stage("minimize soft\nsource = s"), "E0404"),
        (stage("minimize soft * soft"), "E0331"),
        (stage("minimize 1 / soft"), "E0331"),
        (stage("minimize soft / soft"), "E0331"),
        (stage("minimize soft / 0"), "E0216"),
        (stage("minimize soft - 1"), "E0332"),
        (stage("minimize -soft * s.logits"), "E0333"),
        (stage("minimize soft < 1"), "E0331"),
        (stage("minimize not soft"), "E0213"),
        (stage("freeze s\nminimize soft"), "E0340"),
        (stage("minimize soft\nrun m"), "E0104"),
        (stage("minimize soft", "a") + stage("minimize soft", "a"), "E0245"),
        (stage("minimize ramp(0 -> 1, until = 0.1) * soft"), "E0401"),
        # A weight of 1 / 0 at some step is NaN, and so is all that is trained by it.
        (stage("minimize soft / ramp(0 -> 1, until = 10%)"), "E0216"),
        (stage("minimize soft / stage.progress"), "E0216"),
        (stage("minimize 1 / ramp(-1 -> 1, until = 10%) * soft"), "E0216"),
        (stage("minimize soft\noptim = adamw(clip = 0)"), "E0403"),
        (stage("minimize soft\noptim = adamw(lr = 1e-3, lr = 1e-5)"), "E0241"),
        (stage("minimize soft\nevaluate acc\nkeep best by acc\nkeep best by acc") + ACC, "E0245"),
        (stage("minimize ramp(0 -> 1, until = 500) * soft"), "E0401"),
    ],
)
def test_stages_that_are_refused(text: str, code: str) -> None:
    checked = check(spec(SOFT + text))
    assert codes(checked) == [code]
    assert not checked.ok


def test_a_schedule_that_never_is_zero_divides() -> None:
    good(spec(SOFT + stage("minimize soft / ramp(1 -> 2, until = 10%) + 1 / (1 + stage.progress) * soft")))


def test_labels_that_are_numbers_are_no_classes() -> None:
    data = REVIEWS.replace(")", ', task = "regression")')
    assert codes(check(spec(HARD + stage("minimize hard"), STUDENT, data))) == ["E0303"]
    good(spec(SOFT + stage("minimize soft"), data=data))
    one = 'student s = hf("models/student", num_labels = 1)\n'
    number = "loss number = squared_error(s.logits, batch.labels)\nmetric r = pearson(s.logits, batch.labels)\n"
    good(spec(number + stage("minimize number\nevaluate r every 1 epoch"), one, data))
    # Where there are sources of both kinds, labels are classes.
    both = data + REVIEWS.replace("data reviews", "data others")
    asked = stage("source = reviews\nminimize number\nevaluate r every 1 epoch")
    assert codes(check(spec(number + asked, one, both))) == ["E0506"]
    classes = stage("source = others\nminimize hard")
    assert not check(spec(HARD + classes, STUDENT, both)).diagnostics.errors


def test_labels_and_heads() -> None:
    three = 'data reviews = csv("data/three.csv", text = "text", label = "label")\n'
    fitting = 'student s = hf("models/student", num_labels = 3)\n'
    good(spec(HARD + stage("minimize hard"), models=fitting, data=three))
    assert codes(check(spec(HARD + stage("minimize hard"), models=STUDENT, data=three))) == ["E0323"]
    # A head that the labels never meet may have as few classes as it likes.
    good(spec(SOFT + stage("minimize soft"), data=three))


def test_the_tokenizer_that_a_loss_never_meets_is_free() -> None:
    models = 'teacher t = hf("models/other_tokenizer")\n' + STUDENT
    assert codes(check(spec(SOFT + stage("minimize soft"), models=models))) == ["E0321"]
    assert codes(check(spec(SOFT + HARD + stage("minimize hard"), models=models))) == ["W0701"]


def test_a_chain_of_models_checks_each_stage() -> None:
    models = TEACHER + "model mid = truncated(t, layers = [0, 2, 4, 6, 8, 10])\n" + SHORT
    text = "loss a = mse(mid.final <- t.final)\nloss b = mse(s.final <- mid.final)\n"
    first, second = good(spec(text + stage("minimize a", "one") + stage("minimize b", "two"), models=models)).stages
    assert (first.trains, second.trains) == ((TrainTarget("model", "mid"),), (S,))


def test_the_runtime_block_never_changes_the_graph() -> None:
    text = SOFT + stage("minimize soft")
    plain, how = good(spec(text)), good(spec(text + "runtime {\n  precision = bf16\n  checkpoint = true\n}\n"))
    assert set(plain.graph) == set(how.graph)
    assert dict(how.runtime) == {"precision": "bf16", "checkpoint": True}


def test_two_sources_need_a_choice() -> None:
    data = REVIEWS + 'data more = csv("data/three.csv", text = "text")\n'
    assert codes(check(spec(SOFT + stage("minimize soft"), data=data))) == ["E0412"]
    checked = good(spec(SOFT + stage("source = more\nminimize soft", "a") + stage("source = reviews\nminimize soft", "b"), data=data))  # fmt: skip
    assert [found.source.name for found in checked.stages if found.source] == ["more", "reviews"]


def test_what_of_a_body_has_no_name_is_explained_by_its_modules() -> None:
    found = explain(good(spec(SOFT + stage("freeze s.body\ntrain s\nminimize soft"))).graph).stages[0]
    assert found.trains == ("s.head",)
    found = explain(good(spec(SOFT + stage("freeze s.layer\nminimize soft"))).graph).stages[0]
    assert found.trains == ("s.embed", 's.module("bert.pooler")', "s.head")
