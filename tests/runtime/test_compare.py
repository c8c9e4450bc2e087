"""Sizes, speeds and figures of teacher and student side by side."""

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from gkd_dsl.runtime import compare as room
from gkd_dsl.runtime.compare import Comparison, Measure, compare, parameters, tensor_bytes


def bert(layers, width=16):
    sizes = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 2 * width}
    return BertModel(BertConfig(vocab_size=50, num_hidden_layers=layers, max_position_embeddings=32, **sizes))


def batch(rows=4, length=8):
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": ones, "token_type_ids": ones * 0, "labels": ones[:, 0]}


def test_parameters_and_bytes_count_shared_tensors_once():
    layer = torch.nn.Linear(3, 4)
    both = torch.nn.ModuleList([layer, layer])
    assert parameters(both) == 3 * 4 + 4
    assert tensor_bytes(both) == 4 * (3 * 4 + 4)


def test_speeds_come_from_alternating_rounds(monkeypatch):
    """A machine that slows down by half from round to round leaves the ratio as it is."""
    now = [0.0]
    order = []

    def clock():
        return now[0]

    def read(model, batches):
        if len(batches) == 2:
            order.append(model.layers)
            slow = 2.0 ** ((len(order) - 1) // 2)
            now[0] += slow * (0.4 if model.layers == 4 else 0.1)

    monkeypatch.setattr(room.time, "perf_counter", clock)
    monkeypatch.setattr(room, "_read", read)
    teacher, student = bert(4), bert(2)
    teacher.layers, student.layers = 4, 2
    found = compare({"teacher": teacher, "student": student}, [batch(6), batch(2)], rounds=3, seconds=1e9)
    assert order == [4, 2, 2, 4, 4, 2]
    assert found.faster == pytest.approx(4.0)
    assert found.sentences == 8
    assert [m.speed for m in found.models] == pytest.approx([8 / 0.8, 8 / 0.2])
    # Rounds of 80, 40 and 20 sentences a second: quartiles halfway to the median.
    assert found.models[1].spread == pytest.approx((30.0, 60.0))


def test_no_round_begins_after_its_time():
    found = compare({"t": bert(2), "s": bert(1)}, [batch()], rounds=50, seconds=0.0)
    assert found.rounds == 1
    assert found.models[0].spread == (found.models[0].speed, found.models[0].speed)


def test_real_models_of_two_families_and_their_modes():
    teacher = bert(3).train()
    student = DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_heads=2, n_layers=1, hidden_dim=32)).eval()
    found = compare({"teacher": teacher, "student": student}, [batch(), batch()], rounds=2)
    assert teacher.training
    assert not student.training
    assert [m.parameters for m in found.models] == [
        sum(p.numel() for p in model.parameters()) for model in (teacher, student)
    ]
    assert all(m.speed > 0 and m.spread[0] <= m.speed <= m.spread[1] for m in found.models)


def test_size_on_disk(tmp_path):
    teacher, student = bert(2), bert(1)
    student.save_pretrained(tmp_path / "s")
    found = compare({"teacher": teacher, "student": student}, [batch()], rounds=1, folders={"student": tmp_path / "s"})
    assert found.models[1].size == (tmp_path / "s" / "model.safetensors").stat().st_size
    assert found.models[0].size == tensor_bytes(teacher)


def test_too_little_to_compare():
    with pytest.raises(ValueError, match="two models"):
        compare({"t": bert(1)}, [batch()])
    with pytest.raises(ValueError, match="at least one batch"):
        compare({"t": bert(1), "s": bert(1)}, [])


def test_table_and_json():
    found = Comparison(
        (
            Measure("teacher", 22_713_216, 90_868_376, 210.4, (205.0, 215.0)),
            Measure("student", 11_356_608, 45_434_188, 420.8, (410.0, 431.0)),
        ),
        2.0,
        400,
        5,
        "cpu",
        2,
        {"agreement": (0.401, 0.803), "loss": (None, 0.25)},
    )
    screen = io.StringIO()
    Console(file=screen, width=100).print(found.table())
    text = screen.getvalue()
    for line in (
        ("parameters", "22.71 M", "11.36 M", "2.00 x fewer"),
        ("size on disk", "90.9 MB", "45.4 MB", "2.00 x smaller"),
        ("sentences per second", "210", "421", "2.00 x faster"),
        ("agreement", "0.803", "0.401 before training"),
        ("loss", "0.250"),
    ):
        row = next(row for row in text.splitlines() if row.strip().startswith(line[0]))
        assert all(part in row for part in line), row
    assert "400 held-out sentences, 5 rounds in turn, median; cpu, 2 threads" in " ".join(text.split())
    data = json.loads(json.dumps(found.to_json()))
    assert data["models"][1]["sentences_per_second"] == 420.8
    assert data["metrics"]["agreement"] == {"before": 0.401, "after": 0.803}
    assert data["speed_ratio"] == 2.0
    slower = Comparison(found.models, 0.5, 1, 1, "cpu", 1)
    Console(file=screen, width=100).print(slower.table())
    assert "2.00 x slower" in screen.getvalue()
