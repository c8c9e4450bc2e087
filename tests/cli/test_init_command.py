"""`gkd init`: a spec for models and rows of the user's own, that checks; nothing written where it would not."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gkd_dsl import library
from gkd_dsl.cli.main import application
from gkd_dsl.fitting import fitting
from gkd_dsl.meaning.check import check_path, check_text
from gkd_dsl.scaffold_data import InitError, found_in
from gkd_dsl.scaffold_stages import readers, same_stages

NAMES = library.names()


def model(
    place: Path, head: str = "ForSequenceClassification", layers: int = 4, width: int = 48, labels: int = 2
) -> None:
    place.mkdir(parents=True)
    config = {
        "architectures": [f"Bert{head}"], "model_type": "bert", "vocab_size": 30522, "hidden_size": width,
        "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 4 * width,
        "id2label": {str(n): f"LABEL_{n}" for n in range(labels)},
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    (place / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "teacher")
    model(tmp_path / "student", layers=2)
    model(tmp_path / "narrow", layers=2, width=24)
    model(tmp_path / "encoder", head="Model")
    model(tmp_path / "masked", head="ForMaskedLM")
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"text number {n},{n % 2}\n" for n in range(60)))
    (tmp_path / "lines.txt").write_text("a line\nanother line\n" * 20)
    return tmp_path


def init(*words: str):
    return CliRunner().invoke(application(), ["init", *words], prog_name="gkd")


def sound(path: Path) -> str:
    """The text of a spec in which nothing at all is found."""
    found = check_path(path)
    assert [(d.code, d.message) for d in found.diagnostics] == []
    assert not list(found.later)
    return path.read_text()


@pytest.mark.parametrize("student", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_for_each_method_checks(name: str, student: bool, tmp_path: Path, monkeypatch) -> None:
    info, specimens = library.describe(name), fitting(name).specimens
    specimens.build(info, tmp_path)
    monkeypatch.chdir(tmp_path)
    places = {model.name: (model.role, model.value.split('"')[1]) for model in specimens.models(info)}
    words = [w for role, place in places.values() if role != "student" for w in (f"--{role}", place)]
    words += [w for role, place in places.values() if role == "student" and student for w in ("--student", place)]
    data = "train.csv" if specimens.data.startswith("csv") else "corpus.txt"
    found = init("--method", name, *words, "--data", data)
    if not student and specimens.family != "bert":
        return
    assert found.exit_code == 0, found.stderr
    checked = check_path(tmp_path / f"{name}.gkd")
    assert checked.ok
    assert not list(checked.later)
    text = (tmp_path / f"{name}.gkd").read_text()
    stems = dict.fromkeys(stage.name.removeprefix("m.").split(".")[0] for stage in checked.stages)
    assert tuple(stem for stem in stems if not stem.startswith("teach_")) == info.stage_names
    for param in info.params:
        written = f"  {param.name} = {param.default}," in text
        assert written or f"= {param.default}" in text or not param.default[:1].isdigit()


def test_a_classifier(here: Path) -> None:
    found = init(
        "--method", "kd", "--teacher", "teacher", "--student", "narrow", "--data", "rows.csv", "--out", "a.gkd"
    )
    assert found.exit_code == 0, found.stderr
    assert "wrote a.gkd" in found.stdout
    assert "gkd run a.gkd" in found.stdout
    text = sound(here / "a.gkd")
    for line in (
        'teacher t = hf("./teacher")', 'student s = hf("./narrow")', "  evaluate accuracy, agreement every 1 epoch",
        'data texts = csv("rows.csv", text = "text", label = "label", held_out = 10%)', "  minimize m",
        "  optim = adamw(lr = 5e-5, warmup = 6%)", "  keep best by accuracy",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert "lr = 5e-5,  #" not in text, "a parameter that the stage replaces would change nothing"


def test_no_parameter_that_is_shown_changes_nothing(here: Path) -> None:
    """What stands in the stages is not in the `use`, and what both read is a parameter of the spec."""
    model(here / "second", layers=3)
    for name in (name for name in NAMES if library.describe(name).several):
        words = ("--teacher", "teacher", "--teacher", "second", "--student", "student", "--data", "rows.csv")
        assert init("--method", name, *words).exit_code == 0
        text = (here / f"{name}.gkd").read_text()
        used, _, stages = text.partition(") as m")
        alone, shared = readers(name)
        if "\nrun m" in text:
            continue
        for param in alone:
            assert f"  {param} = " not in used
        for param in shared:
            assert f"\nparam {param}: " in used
            assert f"  {param} = {param}," in used
            assert re.search(rf"\b{param}\b", stages)


def test_stages_that_mean_something_else_are_not_the_same(here: Path) -> None:
    assert init(*KD, "--data", "rows.csv").exit_code == 0
    text = (here / "kd.gkd").read_text()
    plain, other = check_text(text), check_text(text.replace("lr = 5e-5", "lr = 4e-5"))
    assert same_stages(plain, check_text(text))
    assert not same_stages(plain, other)


def test_without_a_student_half_of_the_teacher(here: Path) -> None:
    assert init("--method", "kd", "--teacher", "teacher", "--data", "rows.csv").exit_code == 0
    assert "student s = truncated(t, layers = [1, 3])" in sound(here / "kd.gkd")


def test_a_paper_that_starts_from_the_first_layers(here: Path) -> None:
    assert init("--method", "pkd", "--teacher", "teacher", "--data", "rows.csv").exit_code == 0
    assert "student s = truncated(t, layers = [0, 1])" in sound(here / "pkd.gkd")


def test_a_teacher_without_a_classifier_learns_first(here: Path) -> None:
    assert init("--method", "kd", "--teacher", "encoder", "--student", "masked", "--data", "rows.csv").exit_code == 0
    text = sound(here / "kd.gkd")
    assert 'teacher t = hf("./encoder", num_labels = 2)' in text
    assert 'student s = hf("./masked", num_labels = t.num_labels)' in text
    assert text.index("stage teach_t for") < text.index("stage task for")


def test_without_rows_the_file_is_a_parameter(here: Path) -> None:
    found = init("--method", "kd", "--teacher", "teacher", "--student", "student")
    assert found.exit_code == 0, found.stderr
    assert "--set data=..." in found.stdout
    assert list(check_path(here / "kd.gkd").unset) == ["data"]
    assert check_path(here / "kd.gkd", params={"data": "rows.csv"}).ok


def test_language_models_and_encoders(here: Path) -> None:
    assert init("--method", "distilbert", "--teacher", "masked", "--data", "lines.txt").exit_code == 0
    assert "perplexity(cross_entropy(s.logits, batch.labels))" in sound(here / "distilbert.gkd")
    assert init("--method", "minilm", "--teacher", "encoder", "--data", "lines.txt").exit_code == 0
    assert "similarity_spearman" in sound(here / "minilm.gkd")


def test_places_are_written_from_the_folder_of_the_spec(here: Path) -> None:
    (here / "specs").mkdir()
    words = ("--teacher", "teacher", "--data", "rows.csv", "--out", "specs/a.gkd")
    assert init("--method", "kd", *words).exit_code == 0
    text = sound(here / "specs" / "a.gkd")
    assert 'hf("../teacher")' in text
    assert 'csv("../rows.csv"' in text
    absolute = ("--teacher", str(here / "teacher"), "--data", str(here / "rows.csv"), "--out", "specs/b.gkd")
    assert init("--method", "kd", *absolute).exit_code == 0
    assert f'hf("{here / "teacher"}")' in sound(here / "specs" / "b.gkd")


def test_printed_instead(here: Path) -> None:
    found = init("--method", "kd", "--teacher", "teacher", "--data", "rows.csv", "--out", "-")
    assert found.stdout.startswith("gkd 1\n")
    assert not list(here.glob("*.gkd"))


def test_never_over_a_file_without_force(here: Path) -> None:
    (here / "kd.gkd").write_text("mine")
    words = ("--method", "kd", "--teacher", "teacher", "--data", "rows.csv")
    refused = init(*words)
    assert refused.exit_code == 1
    assert "kd.gkd is there already" in refused.stderr
    assert "--force" in refused.stderr
    assert (here / "kd.gkd").read_text() == "mine"
    assert init(*words, "--force").exit_code == 0
    sound(here / "kd.gkd")
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_comes_meanwhile_is_kept(here: Path, monkeypatch) -> None:
    from gkd_dsl import scaffold

    made = scaffold.draft

    def slow(request, out):
        Path("kd.gkd").write_text("mine")
        return made(request, out)

    monkeypatch.setattr(scaffold, "draft", slow)
    found = init("--method", "kd", "--teacher", "teacher", "--data", "rows.csv")
    assert found.exit_code == 1
    assert "came to be" in found.stderr
    assert (here / "kd.gkd").read_text() == "mine"
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


def test_a_file_system_without_links(here: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert init("--method", "kd", "--teacher", "teacher", "--data", "rows.csv").exit_code == 0
    sound(here / "kd.gkd")


KD = ("--method", "kd", "--teacher", "teacher")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "kdd", "--teacher", "teacher"), ("no method kdd", "did you mean kd?")),
        (("--method", "kd", "--teacher", "techer"), ("--teacher techer", "did you mean the folder teacher?")),
        (("--method", "kd", "--teacher", "."), ("--teacher .: the folder . has no config.json", "encoder")),
        ((*KD, "--student", "rows.csv"), ("--student rows.csv is a file", "config.json")),
        ((*KD, "--student", "./none"), ("--student ./none", "there is no folder ./none")),
        ((*KD, "--teacher", "student"), ("kd takes 1 teacher, and 2 are given", "--teachers several")),
        ((*KD, "--model", "student"), ("kd takes no further model", "leave them out")),
        ((*KD, "--data", "row.csv"), ("--data row.csv: there is no such file", "did you mean rows.csv?")),
        ((*KD, "--data", "rows.xlsx"), ("ends in .xlsx", ".csv")),
        ((*KD, "--data", "lines.txt"), ("a text file has no labels", "table")),
        ((*KD, "--data", "rows.csv", "--label", "lable"), ("--label lable", "did you mean label?")),
        ((*KD, "--data", "rows.csv", "--text", "words"), ("--text words", "its columns are text, label")),
        ((*KD, "--out", "none/a.gkd"), ("there is no folder none", "make it first")),
        ((*KD, "--out", "teacher"), ("--out teacher is a folder", "teacher/spec.gkd")),
        (("--method", "pkd", "--teacher", "teacher", "--student", "narrow"), ("E0301", "nothing was written")),
    ],
)
def test_a_mistake_says_where_why_and_what_to_do(here: Path, words: tuple[str, ...], said: tuple[str, ...]) -> None:
    found = init(*words)
    assert found.exit_code == 1
    for text in said:
        assert text in found.stderr.replace(": rows.csv is", " is"), found.stderr
    assert not list(here.glob("*.gkd"))
    assert not list(here.glob(".*"))


def test_usage_mistakes(here: Path) -> None:
    assert init("--method", "kd").exit_code == 2
    assert init(*KD, "--num-labels", "0").exit_code == 2


def test_too_many_classes_for_the_teacher_are_shown_by_the_checker(here: Path) -> None:
    (here / "three.csv").write_text("text,label\n" + "".join(f"text {n},{n % 3}\n" for n in range(60)))
    found = init(*KD, "--data", "three.csv")
    assert found.exit_code == 1
    assert "error[E" in found.stderr
    assert "nothing was written" in found.stderr


def source(path: Path, text: str, **options):
    path.write_text(text)
    found = found_in(path, **{"labels": True, "text": None, "label": None, **options})
    return found.kind, dict(found.args)


def test_columns_by_their_names(tmp_path: Path) -> None:
    rows = "".join(f"{n},{n % 3},some words {n}\n" for n in range(40))
    assert source(tmp_path / "a.csv", "id,Sentiment,Review\n" + rows) == (
        "csv", {"text": '"Review"', "label": '"Sentiment"'},
    )  # fmt: skip
    pairs = "".join(f"{n % 2}\tone {n}\ttwo {n}\n" for n in range(40))
    assert source(tmp_path / "b.tsv", "gold_label\tpremise\thypothesis\n" + pairs)[1] == {
        "text": '"premise"', "text_pair": '"hypothesis"', "label": '"gold_label"',
    }  # fmt: skip


def test_columns_by_what_is_in_them(tmp_path: Path) -> None:
    rows = "".join(f"{n},{'ab'[n % 2]},some words {n}\n" for n in range(40))
    assert source(tmp_path / "a.csv", "one,two,three\n" + rows)[1] == {"text": '"three"', "label": '"two"'}
    assert source(tmp_path / "a.csv", rows)[1] == {
        "columns": '["column_1", "column_2", "column_3"]', "text": '"column_3"', "label": '"column_2"',
    }  # fmt: skip
    with pytest.raises(InitError, match="which column holds the label cannot be told") as error:
        source(tmp_path / "b.csv", "one,two\n" + "".join(f"{n},{n}x\n" for n in range(40)))
    assert error.value.hint == "write --label COLUMN; its columns are one, two"


def test_delimiters_quotes_and_thresholds(tmp_path: Path) -> None:
    rows = "".join(f"text {n};{n % 2}\n" for n in range(40))
    assert source(tmp_path / "a.csv", "text;label\n" + rows)[1]["delimiter"] == '";"'
    quoted = "".join(f'an open " quote {n}\t"{n % 2}\n' for n in range(40))
    assert source(tmp_path / "b.tsv", "text\tlabel\n" + quoted)[1]["quoting"] == "false"
    rated = "".join(f"text {n},{n - 20.5}\n" for n in range(40))
    assert source(tmp_path / "c.csv", "text,rating\n" + rated)[1]["threshold"] == "0.0"


def test_objects_and_prompts(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"t {n}", "label": n % 2}) + "\n" for n in range(40))
    assert source(tmp_path / "a.jsonl", rows) == ("jsonl", {"text": '"text"', "label": '"label"'})
    talks = "".join(json.dumps({"prompt": f"p {n}", "completion": f"c {n}"}) + "\n" for n in range(40))
    assert source(tmp_path / "b.jsonl", talks, labels=False, causal=True)[1] == {
        "prompt": '"prompt"', "completion": '"completion"',
    }  # fmt: skip


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InitError, match="not JSON"):
        source(tmp_path / "a.jsonl", "{nothing\n")
    with pytest.raises(InitError, match="no rows"):
        source(tmp_path / "a.csv", "")
    with pytest.raises(InitError, match="no text"):
        source(tmp_path / "a.txt", "\n", labels=False)
    with pytest.raises(InitError, match="the only one"):
        source(tmp_path / "b.csv", "label\n" + "0\n1\n" * 20)
    (tmp_path / "c.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(InitError, match="cannot be read"):
        found_in(tmp_path / "c.csv", labels=True, text=None, label=None)
