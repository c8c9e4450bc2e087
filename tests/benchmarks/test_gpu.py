"""The script for a machine with a GPU, its parts on miniature models: rows, failures that stay, the report."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import gpu_heads
import gpu_large
import gpu_losses
import gpu_memory
import gpu_rows
import gpu_speed
import gpu_world as world
from gpu_rows import Options, Row

QUICK = Options("cpu", quick=True)


def run(part, name):
    return next(row for row in part.rows(QUICK) if row.name == name).run(QUICK)


@pytest.mark.parametrize("alike", [False, True])
def test_a_model_made_in_place_is_the_config_s(alike):
    shape = world.shape_of("14B", QUICK)
    plan = world.planned(shape, world.shape_of("1.7B", QUICK), rows=2, length=8)
    info = world.info_of(plan.stages[0], "t")
    model = world.made(info, "cpu", torch.bfloat16, seed=3, alike=alike)
    ids = torch.randint(3, shape.words, (2, 8))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        # The same weights in a model that its own class has made.
        from gkd_dsl.runtime.models.load import build

        other = build(info).to(torch.bfloat16).eval()
        for module in other.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = model.get_buffer(f"model.rotary_emb.{name}").clone()
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(logits, other(input_ids=ids).logits)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    pointers = {layer.mlp.up_proj.weight.data_ptr() for layer in model.model.layers}
    assert len(pointers) == (1 if alike else shape.layers)


def test_losses_of_two_placements():
    first = run(gpu_losses, gpu_losses.REFERENCE)
    away = run(gpu_losses, "local, bf16, teacher offloaded")
    assert first["losses"] == away["losses"]
    assert away["same"]
    assert len(first["losses"]) == 4
    assert gpu_losses.gap([[1.0, 2.0]], [[1.0, 4.0]]) == 0.5


def test_memory_beside_the_plan():
    found = run(gpu_memory, "Llama, fused")
    assert 0.7 < found["ratio"] < 1.3


def test_speed_of_a_stored_teacher_and_of_one_that_is_streamed():
    bare, stored, streamed = (run(gpu_speed, name) for name in ("bare sum", "cached", "offload"))
    assert bare["tokens_per_second"] == pytest.approx(64 / bare["seconds"])
    assert "teacher_seconds" not in stored
    shape = world.shape_of("8B", QUICK)
    head = 24
    inside = shape.width * head * (2 * 4 + 2 * 2) + 3 * shape.width * shape.inner + 2 * shape.width + 2 * head
    assert streamed["block_bytes"] == 2 * shape.layers * inside
    text = gpu_speed.body([{"row": "bare sum", **bare}, {"row": "offload", **streamed}, {"row": "x", "error": "E: y"}])
    assert "| x | E: y |" in text


def test_the_link_s_share_is_bytes_over_seconds_over_bandwidth():
    rows = [
        {"row": "the link", "to_device": 10e9, "to_host": 5e9, "to_device_in_pieces": 8e9},
        {"row": "14B, offload", "block_bytes": 4e9, "teacher_seconds": 0.5, "seconds": 1.0, "host_gib": 1.0,
         "tokens_per_second": 10.0},
    ]  # fmt: skip
    assert "80% (40%)" in gpu_large.body(rows)
    assert run(gpu_large, "the link")["to_device"] > 0


def test_heads_all_in_one_process():
    found = gpu_heads.heads((32, 128, 16), QUICK)
    assert found["runs"]["ours/kl"]["seconds"] > 0
    assert not found["failed"]
    runs = {"ours/kl": {"peak_mib": 5.0, "seconds": 2.0}, "liger/kl": {"peak_mib": 20.0, "seconds": 1.0},
            "liger.128/kl": {"peak_mib": 10.0, "seconds": 4.0}}  # fmt: skip
    assert gpu_heads.verdict(runs) == {"memory_over_liger_kl": 0.5, "time_over_best_kl": 2.0}


def _dies(options):
    raise SystemExit(9)


def test_a_row_that_fails_keeps_its_error_and_the_others_run(tmp_path, monkeypatch):
    rows = [Row(name, print, group) for name, group in (("a", "one"), ("b", "one"), ("c", "one"), ("d", ""))]
    monkeypatch.setattr(gpu_rows, "rows_of", lambda part, options: rows)
    started = []

    def process(part, waiting, options, line, log, until):
        started.append([row.name for row in waiting])
        log.write_text("what was said last\n")
        entries = []
        for row in waiting:
            if row.name == "b":
                line.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
                return "the process ended with -9"
            entries.append({"row": row.name, **({"error": "E: no"} if row.name == "c" else {"seconds": 1.0})})
            if row.name == "c":
                break
        line.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return ""

    monkeypatch.setattr(gpu_rows, "_process", process)
    seen = []
    found = gpu_rows.run_part(1, QUICK, time.monotonic() + 60, tmp_path, lambda rows: seen.append(len(rows)))
    assert started == [["a", "b", "c"], ["c"], ["d"]]
    assert [row.get("error") for row in found] == [
        None, "the process ended with -9; what was said last", "E: no", None,
    ]  # fmt: skip
    assert seen[-1] == 4


def test_what_an_earlier_run_measured_stays(tmp_path, monkeypatch, capsys):
    def row(name, base=False):
        return Row(name, print, name, base=base)

    monkeypatch.setattr(gpu_speed, "rows", lambda options: [row("bare sum", True), *map(row, ("a", "b", "c", "d"))])
    ran = []

    def process(part, waiting, options, line, log, until):
        ran.extend(each.name for each in waiting)
        line.write_text("".join(
            json.dumps({"row": each.name, "tokens_per_second": 50.0 if each.base else 40.0, "seconds": 1.0, "date": "2027-01-02"}) + "\n"
            for each in waiting
        ))  # fmt: skip
        return ""

    monkeypatch.setattr(gpu_rows, "_process", process)
    words = ["gpu.py", "--device", "cpu", "--parts", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    gpu.main()
    path = tmp_path / "gpu_speed-cpu.json"
    record = json.loads(path.read_text())
    for entry in record["data"]:
        entry["date"] = "2027-01-01"
    record["data"][0]["tokens_per_second"] = 80.0
    record["data"][2] = {"row": "b", "error": "its time was up"}
    path.write_text(json.dumps(record))
    ran.clear()
    monkeypatch.setattr(sys, "argv", [*words, "--resume", "--again", "d;x"])
    gpu.main()
    assert ran == ["bare sum", "b", "d"]
    text = path.with_suffix(".md").read_text()
    # What stays is held against the bare sum of its own run.
    assert "| a | 40 | 0.50 |" in text
    assert "| b | 40 | 0.80 |" in text
    assert "- rows of earlier runs: 2027-01-01: a; c\n" in text
    ran.clear()
    monkeypatch.setattr(sys, "argv", [*words, "--resume"])
    gpu.main()
    assert ran == []
    record = json.loads(path.read_text())
    assert [entry["row"] for entry in record["data"]] == ["bare sum", "a", "b", "c", "d"]
    record["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=r"is of another machine: torch was 1\.0"):
        gpu.main()


def test_one_part_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_heads, "rows", lambda options: [Row("agreement", gpu_heads.agreement)])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--quick", "--parts", "5", "--out", str(tmp_path)])
    gpu.main()
    data = json.loads((tmp_path / "gpu_heads-cpu-quick.json").read_text())["data"]
    assert data[0]["gaps"]["ours"] < 1e-5
    assert "Agreement with the naive form" in (tmp_path / "gpu_heads-cpu-quick.md").read_text()
