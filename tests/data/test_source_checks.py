"""Checks of files before a run, on small real files."""

import json
import os
import subprocess
import sys

import pytest

from gkd_dsl.sources import ReadError, check_source, label_count, label_map, rows_of, source_kind
from gkd_dsl.syntax import parse_signature


def only(problems):
    assert len(problems) == 1, problems
    return problems[0]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def texts(kind, args, path):
    return [row.values["text"] for row in rows_of(kind, args, path)]


def test_quotes_newlines_crlf_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.csv", '\ufefftext,label\r\n"one, two",1\r\n"a ""quoted""\nline",0\r\n\r\nnull,1\r\n')
    assert check_source("csv", {"path": "a.csv", "label": "label"}, tmp_path) == []
    assert texts("csv", {"text": "text"}, path) == ["one, two", 'a "quoted"\nline', "null"]
    assert [row.line for row in rows_of("csv", {"text": "text"}, path)] == [2, 3, 6]


def test_tab_separated_without_header(tmp_path):
    write(tmp_path / "r.tsv", '1\t2.5\t"Open, it\r\n2\t-1.0\tfine\r\n3\t0\tneither\r\n')
    args = {"path": "r.tsv", "columns": ("id", "rating", "text"), "label": "rating", "quoting": False}
    assert check_source("csv", {**args, "threshold": 0.0}, tmp_path) == []
    assert texts("csv", {**args, "text": "text"}, tmp_path / "r.tsv") == ['"Open, it', "fine", "neither"]
    assert label_count("csv", {**args, "threshold": 0.0}, tmp_path) == 2
    found = only(check_source("csv", args, tmp_path))
    assert found.arg == "label"
    assert "numbers with fractions" in found.message
    assert "threshold = 0.0" in found.hint


def test_a_quote_that_is_a_character(tmp_path):
    write(tmp_path / "r.csv", 'text,label\n"Open,1\nfine,0\nfine,1\n')
    found = only(check_source("csv", {"path": "r.csv"}, tmp_path))
    assert found.kind == "row"
    assert "line 2" in found.message
    assert "quoting = false" in found.hint
    assert check_source("csv", {"path": "r.csv", "quoting": False}, tmp_path) == []


def test_missing_file_and_near_names(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "reviews.tsv", "text\na\n")
    found = only(check_source("csv", {"path": "data/review.tsv"}, tmp_path))
    assert found.message == "there is no file `data/review.tsv`"
    assert found.near == ("data/reviews.tsv",)
    assert found.arg == "path"
    assert only(check_source("csv", {"path": "dat/x.csv"}, tmp_path)).message == "there is no folder `dat`"
    assert "is a folder" in only(check_source("csv", {"path": "data"}, tmp_path)).message
    assert "no file matches" in only(check_source("text", {"path": "data/*.txt"}, tmp_path)).message


def test_empty_compressed_and_headed_only(tmp_path):
    write(tmp_path / "e.csv", " \n")
    assert "is empty" in only(check_source("csv", {"path": "e.csv"}, tmp_path)).message
    (tmp_path / "z.csv").write_bytes(b"\x1f\x8bxxxx")
    assert "is compressed" in only(check_source("csv", {"path": "z.csv"}, tmp_path)).message
    write(tmp_path / "h.csv", "text,label\n")
    assert "a header and no rows" in only(check_source("csv", {"path": "h.csv"}, tmp_path)).message


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", "text\na\n")
    opened = type(path).open

    def refuse(self, *args, **kwargs):
        if self.name == "a.csv":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(type(path), "open", refuse)
    found = only(check_source("csv", {"path": "a.csv"}, tmp_path))
    assert found.message == "`a.csv` cannot be read: Permission denied"


def test_missing_column_says_which_are_there(tmp_path):
    write(tmp_path / "a.csv", "Sentence,Label\nfine,1\n")
    found = check_source("csv", {"path": "a.csv", "text": "sentence", "label": "lable"}, tmp_path)
    assert [(p.arg, p.near) for p in found] == [("text", ("Sentence",)), ("label", ("Label",))]
    assert found[0].message == "`a.csv` has no column `sentence`"
    assert found[0].hint == "its columns are Sentence, Label"


def test_a_file_without_header_is_told_how(tmp_path):
    write(tmp_path / "r.tsv", "1\t2.5\tfine\n2\t-1.0\tbad\n")
    found = only(check_source("csv", {"path": "r.tsv"}, tmp_path))
    assert 'columns = ["column_1", "column_2", "text"]' in found.hint
    fixed = {"path": "r.tsv", "columns": ("column_1", "column_2", "text")}
    assert check_source("csv", fixed, tmp_path) == []


@pytest.mark.parametrize(("mark", "name"), [("\t", "tab"), (";", ";"), ("|", "|")])
def test_another_delimiter_is_suspected(tmp_path, mark, name):
    write(tmp_path / "a.csv", f"text{mark}label\nwell, yes{mark}1\nno{mark}0\n")
    found = only(check_source("csv", {"path": "a.csv", "label": "label"}, tmp_path))
    assert found.arg == "delimiter"
    assert found.near == (name,)
    assert check_source("csv", {"path": "a.csv", "label": "label", "delimiter": name}, tmp_path) == []


def test_a_file_of_one_column_is_fine(tmp_path):
    write(tmp_path / "a.csv", "text\nwell\nyes\n")
    assert check_source("csv", {"path": "a.csv"}, tmp_path) == []


def test_labels_against_threshold_and_list(tmp_path):
    write(tmp_path / "a.csv", "text,label\na,good\nb,bad\nc,\n")
    args = {"path": "a.csv", "label": "label"}
    assert "line 4: the label is missing" in only(check_source("csv", args, tmp_path)).message
    found = only(check_source("csv", {**args, "threshold": 0.5}, tmp_path))
    assert (found.arg, found.kind) == ("threshold", "row")
    assert "the label `good` is not a number" in found.message
    found = only(check_source("csv", {**args, "labels": ("bad", "goood")}, tmp_path))
    assert "`good` is not one of bad, goood" in found.message
    assert found.near == ("goood",)


def test_arguments_that_disagree(tmp_path):
    write(tmp_path / "a.csv", "text,label\na,1\n")
    both = {"path": "a.csv", "label": "label", "threshold": 0.0, "labels": ("a", "b")}
    assert "both say" in only(check_source("csv", both, tmp_path)).message
    assert only(check_source("csv", {"path": "a.csv", "threshold": 0.0}, tmp_path)).arg == "threshold"
    assert only(check_source("csv", {"path": "a.csv", "task": "classification"}, tmp_path)).arg == "task"
    assert only(check_source("csv", {"path": "a.csv", "prompt": "text", "text": ""}, tmp_path)).arg == "prompt"
    assert only(check_source("csv", {"path": "a.csv", "delimiter": "::"}, tmp_path)).arg == "delimiter"
    assert only(check_source("csv", {"path": "a.csv", "encoding": "utf-99"}, tmp_path)).arg == "encoding"
    assert only(check_source("csv", {"path": "a.csv", "columns": ("text", "text")}, tmp_path)).arg == "columns"
    assert only(check_source("csv", {"path": "a.csv", "label": "text"}, tmp_path)).arg == "label"
    assert only(check_source("cvs", {"path": "a.csv"}, tmp_path)).near == ("csv",)


def test_row_width(tmp_path):
    write(tmp_path / "a.csv", "text,label\nwell,1\nyes, no,0\n")
    found = only(check_source("csv", {"path": "a.csv"}, tmp_path))
    assert found.message == "`a.csv`, line 3: the row has 3 cells, 2 columns are named"
    found = only(check_source("csv", {"path": "a.csv", "columns": ("id", "label", "text")}, tmp_path))
    assert (found.arg, found.kind) == ("columns", "row")


def test_an_encoding_that_is_not_utf8(tmp_path):
    write(tmp_path / "a.csv", "text\ncaf\u00e9\n", "latin-1")
    found = only(check_source("csv", {"path": "a.csv"}, tmp_path))
    assert found.arg == "encoding"
    assert "0xe9" in found.message
    assert check_source("csv", {"path": "a.csv", "encoding": "latin-1"}, tmp_path) == []


def test_jsonl(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "y": 1}\n\n{"text": "b\\u2028c", "y": true, "z": [1]}\n')
    assert check_source("jsonl", {"path": "a.jsonl", "label": "z"}, tmp_path)[0].kind == "column"
    rows = [row.values for row in rows_of("jsonl", {"text": "text", "label": "y"}, path)]
    assert rows == [{"text": "a", "label": "1"}, {"text": "b\u2028c", "label": "true"}]
    found = only(check_source("jsonl", {"path": "a.jsonl", "text": "txt"}, tmp_path))
    assert found.message == "the first object of `a.jsonl` has no key `txt`"
    assert found.near == ("text",)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('["a"]\n', "the line holds a list, not an object", "each line is one object"),
        ('"a"\n', "the line holds a text, not an object", "each line is one object"),
        ("3\n", "the line holds a number or a word", "each line is one object"),
        ('[\n{"text": "a"}\n]\n', "the line is not JSON", "one JSON document over many lines"),
        ('{"text": 3}\n', "`text` is a number, not a text", None),
        ('{"text": ["a"]}\n', "`text` is a list, not a text", None),
    ],
)
def test_jsonl_lines_that_are_none(tmp_path, text, message, hint):
    write(tmp_path / "a.jsonl", text)
    found = only(check_source("jsonl", {"path": "a.jsonl"}, tmp_path))
    assert message in found.message
    assert "line 1" in found.message
    assert (hint is None) == (found.hint is None)
    assert hint is None or hint in found.hint


def test_jsonl_key_missing_further_down(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"words": "b"}\n')
    assert "line 2" in only(check_source("jsonl", {"path": "a.jsonl"}, tmp_path)).message
    with pytest.raises(ReadError, match="has no key `text`; its keys are words"):
        texts("jsonl", {"text": "text"}, path)


def test_text_by_line_paragraph_and_file(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\n two \r\n\r\n\r\nthree\r\n")
    assert texts("text", {}, path) == ["one", "two", "three"]
    assert texts("text", {"by": "paragraph"}, path) == ["one two", "three"]
    assert [row.line for row in rows_of("text", {"by": "paragraph"}, path)] == [1, 5]
    assert texts("text", {"by": "file"}, path) == ["one\r\n two \r\n\r\n\r\nthree"]
    assert check_source("text", {"path": "*.txt"}, tmp_path) == []


def test_an_empty_text_column(tmp_path):
    write(tmp_path / "a.csv", "text,label\n,1\n ,0\n")
    assert "is empty in the first 2 rows" in only(check_source("csv", {"path": "a.csv"}, tmp_path)).message


def test_the_held_out_file_is_checked_too(tmp_path):
    write(tmp_path / "a.csv", "text\na\n")
    write(tmp_path / "dev.csv", "words\na\n")
    found = only(check_source("csv", {"path": "a.csv", "held_out": "dv.csv"}, tmp_path))
    assert (found.arg, found.near[0]) == ("held_out", "dev.csv")
    assert (
        "`dev.csv` has no column"
        in only(check_source("csv", {"path": "a.csv", "held_out": "dev.csv"}, tmp_path)).message
    )


@pytest.mark.parametrize(
    ("labels", "args", "count"),
    [
        (["0", "1", "2"], {}, 3),
        (["0.0", "1.0"], {}, 2),
        (["neg", "pos", "neg"], {}, 2),
        (["1", "5"], {}, 6),
        (["1", "5"], {"labels": (1, 5)}, 2),
        (["-1", "1"], {}, None),
        (["0.5"], {"task": "regression"}, None),
    ],
)
def test_label_count(tmp_path, labels, args, count):
    write(tmp_path / "a.csv", "text,y\n" + "".join(f"t,{label}\n" for label in labels))
    assert label_count("csv", {"path": "a.csv", "label": "y", **args}, tmp_path) == count


def test_a_saved_data_set_is_read_from_its_description(tmp_path):
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    (folder / "state.json").write_text("{}")
    features = {"sentence": {}, "label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    args = {"path": "saved", "text": "sentence", "label": "label", "held_out": "validation"}
    assert check_source("hf_dataset", args, tmp_path) == []
    assert label_count("hf_dataset", args, tmp_path) == 2
    assert only(check_source("hf_dataset", {**args, "split": "trian"}, tmp_path)).near == ("train",)
    assert only(check_source("hf_dataset", {**args, "text": "sentense"}, tmp_path)).near == ("sentence",)
    assert only(check_source("hf_dataset", {"path": "./none"}, tmp_path)).kind == "file"


def test_checks_import_no_torch():
    code = (
        "import sys, gkd_dsl.sources, gkd_dsl.extension;"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pandas', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


def test_a_source_of_a_user_is_checked_by_its_arguments(tmp_path):
    kind = source_kind(parse_signature("mine(limit: int = 4) -> rows", "mine"))
    assert check_source(kind, {"label": "y"}, tmp_path) == []
    assert only(check_source(kind, {"held_out": "dev.csv"}, tmp_path)).arg == "held_out"
    assert only(check_source(kind, {"limt": 3}, tmp_path)).near == ("limit",)
    assert label_count(kind, {"label": "y", "labels": ("a", "b")}, tmp_path) == 2
    assert label_count(kind, {"label": "y"}, tmp_path) is None


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"dataset_dict.json": "{"}, "`dataset_dict.json`: it cannot be read as JSON"),
        ({"dataset_dict.json": "[]"}, "`dataset_dict.json`: it holds no JSON object"),
        ({"dataset_dict.json": '{"splits": 5}'}, "has no split `train`"),
        ({"state.json": "{}", "dataset_info.json": "{"}, "`dataset_info.json`: it cannot be read as JSON"),
        ({"state.json": "{}", "dataset_info.json": '{"features": {"y": 1, "label": 2}}'}, "has no column `text`"),
        ({"state.json": "{}", "dataset_info.json": '{"features": {"text": 1, "label": 2}}'}, None),
    ],
)
def test_a_broken_data_set_is_told(tmp_path, files, said):
    (tmp_path / "d").mkdir()
    for name, text in files.items():
        (tmp_path / "d" / name).write_text(text)
    args = {"path": "d", "label": "label"}
    problems = check_source("hf_dataset", args, tmp_path)
    assert [said in problem.message for problem in problems] == ([] if said is None else [True])
    assert label_count("hf_dataset", args, tmp_path) is None


@pytest.mark.parametrize("path", ["~nobody-of-this-name/a.csv", "a" * 5000 + ".csv", "b\0c.csv", "d\0*.csv"])
def test_a_path_that_no_system_has_is_not_there(tmp_path, path):
    (problem,) = check_source("csv", {"path": path, "text": "text"}, tmp_path)
    assert (problem.arg, problem.kind) == ("path", "file")
    (problem,) = check_source("csv", {"path": "a.csv", "encoding": "a\0"}, tmp_path)
    assert problem.message == "there is no encoding `a\0`"
    (problem,) = check_source("csv", {"path": "a.csv", "label": "y", "labels": ("1", 0, 1)}, tmp_path)
    assert problem.message == "a label stands twice in `labels`"


def test_above_the_threshold_is_one(tmp_path):
    above = label_map({"threshold": 0.5}, "classification", None)
    assert [above.number(text) for text in ("0.6", "0.4", "0.5", "-3", "7")] == [1, 0, None, 0, 1]


@pytest.mark.parametrize("row", ["a,b,c", "a"])
def test_a_row_of_another_width_is_not_read(tmp_path, row):
    path = write(tmp_path / "a.csv", f"text,label\nfine,1\n{row}\n")
    with pytest.raises(ReadError, match="2 columns are named"):
        list(rows_of("csv", {"text": "text", "label": "label"}, path))
