"""The specs of the methods table: every method checks over tiny models, with equal steps and settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gkd_dsl import library
from gkd_dsl.spec import load

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def specs():
    import methods_table_specs

    return methods_table_specs


@pytest.fixture(scope="module")
def settings(specs):
    return specs.Settings("unused", steps=40, teacher_steps=10, batch_size=4, max_length=16, lr=1e-3, teacher_lr=1e-3)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder with the configs of all models that the specs name."""
    root = tmp_path_factory.mktemp("work")
    for place, head, layers in (
        ("models/start", "MaskedLM", 6), ("models/0/start", "MaskedLM", 6), ("models/0/language", "MaskedLM", 6),
        ("models/0/teacher", "SequenceClassification", 6), ("models/0/second", "SequenceClassification", 6),
        ("models/0/small", "SequenceClassification", 4),
    ):  # fmt: skip
        folder = root / place
        folder.mkdir(parents=True)
        config = {
            "architectures": [f"BertFor{head}"], "model_type": "bert", "vocab_size": 8, "hidden_size": 192,
            "num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": 64,
            "max_position_embeddings": 20, "pad_token_id": 0, "id2label": {"0": "bad", "1": "good"},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad\nfilm\n")
    (root / "data").mkdir()
    rows = "text\tlabel\n" + "good film\t1\nbad film\t0\n" * 8
    for name in ("train", "held_out"):
        (root / "data" / f"{name}.tsv").write_text(rows)
    return root


@pytest.mark.parametrize("name", library.names())
def test_every_method_has_a_spec_that_checks(specs, settings, work, name):
    made = specs.method(settings, name, 0, work / "runs" / name)
    spec = load(made.path)
    assert [str(found.message) for found in spec.check().errors] == []
    plan = spec.plan()
    assert [stage.name for stage in plan.stages] == [stage.name for stage in made.stages]
    assert sum(stage.steps for stage in made.stages if stage.student) == settings.steps
    for found, told in zip(plan.stages, made.stages, strict=True):
        assert (found.stage.duration.amount, found.stage.duration.unit) == (told.steps, "steps")
        assert (found.stage.batch_size, found.stage.seed, found.stage.optim.lr) == (4, 0, 1e-3)
        assert any(target.name in ("s", "lm") for target in found.stage.trains) == told.student
    assert any(target.name == "s" for target in plan.stages[-1].stage.trains)


def test_language_models_are_told_from_classifiers(specs, settings, work):
    found = {name for name in library.names() if specs.is_language_model(library.describe(name))}
    assert found == {"distilbert", "diito", "glmd", "mobilebert"}
    for name in (*found, "pd"):
        plan = load(specs.method(settings, name, 0, work / "runs" / name).path).plan()
        tasks = [next(m.info.task for m in stage.models if m.role == "student") for stage in plan.stages]
        assert (tasks[0], tasks[-1]) == ("masked_lm", "classification")


def test_baseline_has_no_teacher(specs, settings, work):
    plan = load(specs.baseline(settings, 0, work / "runs" / "alone").path).plan()
    assert [(stage.name, [model.name for model in stage.models]) for stage in plan.stages] == [("plain", ["s"])]


def test_stages_share_the_steps_in_the_proportion_of_the_file(specs):
    text = library.method_text("tinybert")
    found = specs.shared_out(text, ["tinybert"], {"m.intermediate": True, "m.prediction": True}, 100)
    assert found == {"intermediate": 76, "prediction": 24}


def test_accuracy_and_chance():
    import methods_table_data as data

    labels = [0] * 60 + [1] * 40
    assert data.share([0] * 100, labels) == 0.6
    assert not data.beats_chance(0.6, labels)
    assert not data.beats_chance(0.69, labels)
    assert data.beats_chance(0.71, labels)


def test_rows_with_a_rating_of_zero_are_left_out(tmp_path):
    import methods_table_data as data

    file = tmp_path / "rows.tsv"
    file.write_text("1\t0.5\tgood\n2\t0\tneither\n3\t-2\tbad\n")
    assert data.read(file) == ([("good", 1), ("bad", 0)], "rows.tsv")
    file.write_text("1\tgood\n")
    with pytest.raises(SystemExit, match="line 1 of"):
        data.read(file)
    with pytest.raises(SystemExit, match="there is no file"):
        data.read(tmp_path / "none.tsv")


def test_split_is_fixed_and_apart(tmp_path):
    import methods_table_data as data

    rows = [(f"text {number}", number % 2) for number in range(500)]
    assert data.write(rows, tmp_path / "a") == data.write(rows, tmp_path / "b")
    texts, labels = data.held_out(tmp_path / "a")
    train = (tmp_path / "a" / "train.tsv").read_text().splitlines()[1:]
    assert (len(texts), len(train)) == (100, 400)
    assert {f"{text}\t{label}" for text, label in zip(texts, labels, strict=True)}.isdisjoint(train)


def test_a_row_that_fails_or_guesses_is_a_problem():
    import methods_table_report as report

    labels = [0, 1] * 50
    rows = [
        {"method": "kd", "seed": 0, "accuracy": 0.5},
        {"method": "pkd", "seed": 0, "accuracy": 0.5},
        {"method": "tinybert", "seed": 1, "error": "a loss is not finite"},
    ]
    found = report.problems(rows, {}, labels, quick=True)
    assert found == ["kd, seed 0: an accuracy of 0.5000 does not beat chance", "tinybert, seed 1: a loss is not finite"]
    assert len(report.problems(rows, {}, labels, quick=False)) == 3


def test_page_keeps_rows_that_lose():
    import methods_table_report as report

    rows = [
        {"method": "no teacher", "seed": 0, "accuracy": 0.8, "agreement": 0.8, "stages": []},
        {
            "method": "kd",
            "seed": 0,
            "accuracy": 0.7,
            "agreement": 0.9,
            "stages": [{"name": "m.task", "steps": 5, "student": True}],
        },
    ]
    teachers = [{"teacher": "teacher", "seed": 0, "accuracy": 0.9}]
    text = report.page(
        ["no teacher", "kd"], teachers, rows, {"kd": {"over_plain": [1.0, 3.0, 2.0], "memory_over_plain": 1.5}}
    )
    assert "| 70.00 | -10.00 | 90.00 | 2.00 |  | 1.50 |" in text
    assert "- `kd` (-10.00)" in text
    assert "| *teacher* | 90.00 | +10.00 |" in text
