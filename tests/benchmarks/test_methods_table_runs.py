"""The work of the methods table on tiny models: teachers, rows, what is stored, and what a step costs."""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WORDS = ("good", "fine", "great", "bad", "dull", "poor", "film", "plot", "cast", "the", "a")


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Settings and a work folder with data, the start and the teachers."""
    import methods_table_data as data
    import methods_table_specs as specs
    import methods_table_work as work

    root = tmp_path_factory.mktemp("table")
    encoder = root / "encoder"
    encoder.mkdir()
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=16, hidden_size=24, num_hidden_layers=6, num_attention_heads=12, intermediate_size=32,
            max_position_embeddings=20,
        )
    ).save_pretrained(encoder)  # fmt: skip
    BertTokenizer(vocab=vocabulary).save_pretrained(encoder)
    drawn = random.Random(0)
    rows = [
        (" ".join([drawn.choice(WORDS[3 - 3 * label : 6 - 3 * label]), *drawn.sample(WORDS[6:], 3)]), label)
        for label in (0, 1) for _ in range(60)
    ]  # fmt: skip
    settings = specs.Settings(
        str(encoder), steps=8, teacher_steps=4, batch_size=8, max_length=12, lr=5e-3, teacher_lr=5e-3,
        data=data.write(rows, root / "data"),
    )  # fmt: skip
    work.start(settings, root)
    teachers = [work.train_teacher(settings, root, what, 0) for what in work.TEACHERS]
    return settings, root, teachers


def test_teachers_are_trained_once(made):
    import methods_table_work as work

    settings, root, teachers = made
    assert [row["teacher"] for row in teachers] == ["teacher", "second", "small", "language"]
    assert all(0.0 <= row["accuracy"] <= 1.0 for row in teachers[:3])
    assert work.train_teacher(settings, root, "teacher", 0) == teachers[0]
    other = work.train_teacher(replace(settings, teacher_steps=5), root, "small", 0)
    assert other["key"] != teachers[2]["key"]
    work.train_teacher(settings, root, "small", 0)


def test_start_of_a_language_model_is_the_encoder_with_the_teachers_head(made):
    from safetensors.torch import load_file

    _, root, _ = made
    plain, spoken, teacher = (
        load_file(root / "models" / place / "model.safetensors") for place in ("start", "0/start", "0/language")
    )
    assert plain.keys() == spoken.keys()
    for name, value in spoken.items():
        source = plain if name.startswith("bert.") else teacher
        assert torch.equal(value, source[name]), name
    assert not any("pooler" in name for name in plain)


@pytest.mark.parametrize("name", ["no teacher", "kd", "distilbert"])
def test_a_row_has_what_the_table_shows(made, name):
    import methods_table_work as work

    settings, root, _ = made
    row = work.run_method(settings, root, name, 0, work.key_of(settings, name))
    assert "error" not in row, row
    assert row["accuracy"] * 24 == pytest.approx(round(row["accuracy"] * 24))
    assert 0.0 <= row["agreement"] <= 1.0
    assert sum(stage["steps"] for stage in row["stages"]) == settings.steps
    assert set(row["loss"]) == {stage["name"] for stage in row["stages"]}


def test_a_row_is_the_same_again(made):
    import methods_table_work as work

    settings, root, _ = made
    one, two = (work.run_method(settings, root, "kd", 0, work.key_of(settings, "kd")) for _ in range(2))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_what_goes_wrong_is_the_rows_error(made):
    import methods_table_work as work

    settings, root, _ = made
    wild = replace(settings, lr=1e30)
    row = work.run_method(wild, root, "kd", 0, work.key_of(wild, "kd"))
    assert "E0403" in row["error"]
    assert "accuracy" not in row


def test_logits_that_are_not_finite_are_refused(made):
    import methods_table_data as data
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _, root, _ = made
    folder = root / "models" / "0" / "teacher"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(data.predictions(model, tokenizer, ["a good film", "dull"], 12)) == 2
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        data.predictions(model, tokenizer, ["a good film"], 12)


def test_stored_rows_are_those_of_the_settings(made, tmp_path):
    import methods_table as table
    import methods_table_work as work

    settings, _, _ = made
    rows = tmp_path / "rows.jsonl"
    options = argparse.Namespace(rows=rows, seeds=[0, 1])
    assert len(table.missing(options, settings, ["kd", "pkd"])) == 4
    row = {"method": "kd", "seed": 0, "key": work.key_of(settings, "kd")}
    rows.write_text(json.dumps(row) + '\n{"method": "pkd", "se')
    assert table.stored(rows, settings, ["kd", "pkd"], [0, 1]) == [row]
    other = {"method": "pkd", "seed": 1, "key": work.key_of(settings, "pkd")}
    table.store(rows, other)
    teacher = {"teacher": "second", "seed": 1, "key": settings.key(), "accuracy": 0.5}
    table.store(rows, teacher)
    assert table.stored(rows, settings, ["kd", "pkd"], [0, 1]) == [row, other]
    assert table.stored_teachers(rows, settings, [0, 1]) == [teacher]
    assert table.stored_teachers(rows, settings, [0]) == []
    assert ("kd", 0, row["key"]) not in table.missing(options, settings, ["kd", "pkd"])
    assert len(table.missing(options, settings, ["kd", "pkd"])) == 2
    assert len(table.missing(options, replace(settings, steps=9), ["kd", "pkd"])) == 4


def test_cost_of_a_step_beside_the_references(made):
    import methods_table_cost as cost

    settings, root, _ = made
    found = cost.measure(settings, root, ["minilm"], 0, rounds=2, steps=1)
    assert list(found) == ["no teacher", "kd", "minilm"]
    assert not any("error" in row for row in found.values()), found
    assert found["no teacher"]["over_plain"] == [1.0, 1.0]
    assert found["kd"]["over_kd"] == [1.0, 1.0]
    assert found["no teacher"]["memory_over_plain"] == 1.0
    assert all(len(row["over_plain"]) == 2 and min(row["over_plain"]) > 0 for row in found.values())
    # The teacher's weights are held beside the student's.
    assert found["kd"]["bytes"] > found["no teacher"]["bytes"]
    cost.clear(root)
    assert not (root / "cost").exists()


def test_bytes_of_tensors():
    import methods_table_cost as cost

    before = cost.living()
    one = torch.zeros(1000)
    view = one[:500]
    assert cost.living() - before == 4000
    del one, view
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        first = torch.zeros(1000)
        del first
        second = torch.ones(3000)
    assert cost.most(seen) == 12000
    del second
