"""Everything that can be wrong with data is told in words."""

import errno
import getpass
import os

import datasets
import pytest
from loader_help import labelled_file, loader_for, word_tokenizer

from gkd_dsl import extension
from gkd_dsl.runtime.data import DataError
from gkd_dsl.runtime.data.quiet import cache_folder, quiet


def error(tokenizer, folder, kind="csv", **rest):
    with pytest.raises(DataError) as caught:
        loader_for(tokenizer, folder, kind, **rest)
    assert str(caught.value).startswith("data `texts`: ")
    return caught.value


def test_a_label_beyond_the_model(tokenizer, tmp_path):
    labelled_file(tmp_path)
    found = error(tokenizer, tmp_path, path="a.csv", label="label", classes=2)
    assert found.message == "row 3 has label `2`, class 2, and the model has 2 classes"
    assert found.hint == "classes are 0 to 1; `labels = [...]` gives other labels their numbers"
    named = error(tokenizer, tmp_path, path="a.csv", label="label", labels=(0, 1, 2), classes=2)
    assert named.hint == "give the model `num_labels = 3`"
    loader_for(tokenizer, tmp_path, "csv", path="a.csv", label="label", classes=3)


def test_labels_that_cannot_be_numbered(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("text,y,z,n\n" + "w1,0.5,,-1\nw2,1.5,1,1\n" * 4)
    found = error(tokenizer, tmp_path, path="a.csv", label="y")
    assert "numbers with fractions, such as 0.5" in found.message
    assert "threshold" in found.hint
    assert error(tokenizer, tmp_path, path="a.csv", label="z").message == "row 1 has no label"
    assert "-1 is no class" in error(tokenizer, tmp_path, path="a.csv", label="n").message
    unknown = error(tokenizer, tmp_path, path="a.csv", label="n", labels=("1", "2"))
    assert unknown.message == "row 1: the label `-1` is not one of 1, 2"
    (tmp_path / "b.csv").write_text("text,y\nw1,0.5\nw2,high\n")
    found = error(tokenizer, tmp_path, path="b.csv", label="y", threshold=0.0)
    assert found.message == "row 2: the label `high` is not a number"


def test_an_unseen_label_in_the_held_out_file(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("text,y\n" + "w1,good\nw2,bad\n" * 4)
    (tmp_path / "dev.csv").write_text("text,y\nw1,fair\n")
    found = error(tokenizer, tmp_path, path="a.csv", label="y", held_out="dev.csv")
    assert found.message == "row 1: the label `fair` is not one of bad, good"


def test_a_text_column_without_texts(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 5)
    found = error(tokenizer, tmp_path, "jsonl", path="a.jsonl")
    assert found.message == "the column `text` is empty in all 5 rows"
    (tmp_path / "b.jsonl").write_text('{"text": null}\n' * 5 + '{"text": "w1"}\n' * 5)
    loader = loader_for(tokenizer, tmp_path, "jsonl", path="b.jsonl", held_out=0.0)
    assert loader.sizes.left_out == {"without text": 5}


def test_everything_filtered_out(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("text,y\n" + "w1,1\n" * 6)
    found = error(tokenizer, tmp_path, path="a.csv", label="y", threshold=1.0)
    assert found.message == "no row is left: 6 on the threshold"
    (tmp_path / "a.jsonl").write_text('{"q": "w1 w2 w3 w4", "a": "w5"}\n' * 6)
    found = error(
        word_tokenizer(causal=True),
        tmp_path,
        "jsonl",
        task="causal_lm",
        path="a.jsonl",
        prompt="q",
        completion="a",
        max_length=4,
    )
    assert found.message == "no row is left: in all 6 nothing is to be learned"
    assert found.hint == "prompts fill the 4 tokens of a row: raise `max_length`"


def test_fewer_rows_than_a_batch(tokenizer, tmp_path):
    labelled_file(tmp_path, 30)
    found = error(tokenizer, tmp_path, path="a.csv", batch_size=32)
    assert found.message == "there are 27 rows to train on, fewer than a batch of 32 (3 are held out)"
    assert found.hint == "write `batch_size = 27` in stage `main`"


def test_files_that_changed_since_the_check(tokenizer, tmp_path):
    assert error(tokenizer, tmp_path, path="a.csv").message == "a.csv: it cannot be read: No such file or directory"
    (tmp_path / "a.csv").write_text("text,y\nw1,1\nw2\n")
    found = error(tokenizer, tmp_path, path="a.csv")
    assert found.message == "a.csv, line 3: the row has 1 cell, 2 columns are named"
    (tmp_path / "a.csv").write_text("words,y\nw1,1\n")
    assert "it has no column `text`" in error(tokenizer, tmp_path, path="a.csv").message
    (tmp_path / "a.csv").write_text("text\n")
    assert "the source has no rows" in error(tokenizer, tmp_path, path="a.csv").message
    assert "no file matches" in error(tokenizer, tmp_path, "text", path="*.txt").message


def test_columns_that_the_stage_reads(tokenizer, tmp_path):
    labelled_file(tmp_path)
    found = error(tokenizer, tmp_path, path="a.csv", reads=("input_ids", "labels"))
    assert found.message == "the stage reads `batch.labels`, and the source has none"
    assert found.hint == 'add `label = "..."`'
    found = error(tokenizer, tmp_path, path="a.csv", reads=("weights",))
    assert found.hint == "it gives attention_mask, input_ids, token_type_ids"


def test_tasks_that_the_tokenizer_or_the_source_cannot_do(tokenizer, tmp_path):
    labelled_file(tmp_path)
    tokenizer.mask_token = None
    found = error(tokenizer, tmp_path, path="a.csv", task="masked_lm")
    assert found.message == "the tokenizer has no mask token, which a masked model needs"
    causal = word_tokenizer(causal=True)
    found = error(causal, tmp_path, path="a.csv", task="causal_lm", text_pair="label")
    assert found.hint == "use `prompt` and `completion`"


def test_sources_in_python_that_fail(tokenizer, tmp_path):
    bodies = {
        "raises_one": ("text", "raise KeyError('x')", "`raises_one` raised KeyError: 'x'"),
        "raises_late": ("text", "yield 'w1'; raise OSError('gone')", "`raises_late` raised OSError: gone"),
        "gives_numbers": ("text", "return [1]", "`gives_numbers` gave int as row 0, and a text was declared"),
        "gives_texts": ("rows", "return ['a']", "`gives_texts` gave str as row 0, and rows were declared"),
        "gives_others": ("rows", "return [{'words': 'a'}]", "row 0 of `gives_others` has no `text`"),
        "gives_lists": ("rows", "return [{'text': ['a']}]", "`text` in row 0 of `gives_lists` is not a text"),
        "gives_none": ("text", "return []", "`gives_none` gave no rows"),
    }
    lines = ["import gkd_dsl"]
    for name, (result, body, _) in bodies.items():
        lines += [f"@gkd_dsl.source('{name}() -> {result}')", f"def {name}(): {body}"]
    (tmp_path / "failing.py").write_text("\n".join(lines) + "\n")
    extension.load("./failing.py", tmp_path)
    for name, (_, _, message) in bodies.items():
        assert error(tokenizer, tmp_path, name).message == message
    assert "must be imported first" in str(error(tokenizer, tmp_path, "nowhere"))
    (tmp_path / "odd.py").write_text("import gkd_dsl\n@gkd_dsl.source('odd(( -> text')\ndef odd(): return []\n")
    extension.load("./odd.py", tmp_path)
    assert "the signature `odd(( -> text` cannot be read" in error(tokenizer, tmp_path, "odd").message
    found = error(tokenizer, tmp_path, "gives_none", held_out="dev.csv")
    assert found.message == "a source of your own holds out a share of its rows, not a file"


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ConnectionError("Couldn't reach 'acme/texts' on the Hub"), "is no folder here, and the hub cannot be reached"),
        (datasets.exceptions.DatasetNotFoundError("gone"), "there is no data set `acme/texts` on the hub"),
        (ValueError("BuilderConfig 'x' not found"), "`acme/texts` cannot be loaded: BuilderConfig 'x' not found"),
    ],
)
def test_data_sets_that_are_not_there(tokenizer, tmp_path, monkeypatch, raised, message):
    def fail(*args, **rest):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert message in error(tokenizer, tmp_path, "hf_dataset", path="acme/texts").message


def test_saved_data_sets(tokenizer, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    assert "`broken` cannot be loaded" in error(tokenizer, tmp_path, "hf_dataset", path="broken").message
    rows = datasets.Dataset.from_dict({"words": ["w1"] * 8, "n": [1] * 8})
    with quiet():
        datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    found = error(tokenizer, tmp_path, "hf_dataset", path="saved", text="words", split="test")
    assert (found.message, found.hint) == ("`saved` has no split `test`", "its splits are train")
    found = error(tokenizer, tmp_path, "hf_dataset", path="saved")
    assert (found.arg, found.hint) == ("text", "its columns are words, n")
    found = error(tokenizer, tmp_path, "hf_dataset", path="saved", text="n")
    assert found.message == "the column for `text` holds int values, not texts"


def test_arguments_are_checked_again(tokenizer, tmp_path):
    assert error(tokenizer, tmp_path, path="a.csv", limit=0).message == "`limit` is 0; the least is 1"


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def too_little_beforehand():
    raise OSError("Not enough disk space. Needed: Unknown size (download: Unknown size)")


def behind_a_closed_file():
    try:
        no_space()
    except OSError:
        raise ValueError("I/O operation on closed file")  # noqa: B904 - as `datasets` does


@pytest.mark.parametrize("fails", [no_space, too_little_beforehand, behind_a_closed_file])
@pytest.mark.parametrize("where", ["from_generator", "map"])
def test_a_full_disk_where_rows_are_prepared(tokenizer, tmp_path, own_cache, monkeypatch, fails, where):
    labelled_file(tmp_path)
    monkeypatch.setattr(datasets.Dataset, where, lambda *_, **__: fails())
    found = error(tokenizer, tmp_path, path="a.csv", label="label")
    assert found.message == f"the disk of {own_cache / 'data'} is full, where rows and tokens are prepared"
    assert "GKD_CACHE" in found.hint


def test_a_user_without_a_name(monkeypatch, tmp_path):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert cache_folder().is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"gkd-dsl-{os.getuid()}" / "data"
