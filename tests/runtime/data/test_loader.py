"""Order, held-out rows, resume position, labels, sizes, and tokenising in parallel."""

import json
import os
import threading

import datasets
import numpy as np
import pytest
import torch
from loader_help import WORDS, labelled_file, loader_for, sentence, stage_of, word_tokenizer
from tokenizers import models, processors

from gkd_dsl import extension
from gkd_dsl.graph.nodes import SourceSpec
from gkd_dsl.runtime.data import make_loader, quiet
from gkd_dsl.runtime.data.digest import digest
from gkd_dsl.runtime.data.encode import processes_for, tokenizer_digest

ARGS = {"path": "a.csv", "label": "label"}


def same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name]), name


def rows_in(batches):
    """The rows of batches as (ids without padding, label)."""
    found = []
    for batch in batches:
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            found.append((tuple(ids[mask.bool()].tolist()), label.item()))
    return found


def test_every_row_is_trained_on_or_held_out(tokenizer, tmp_path):
    labelled_file(tmp_path)
    loader = loader_for(tokenizer, tmp_path, "csv", held_out=0.2, **ARGS)
    assert (loader.sizes.train, loader.sizes.held_out, loader.sizes.left_out) == (24, 6, {})
    train, out = rows_in(loader.epoch(0)), rows_in(loader.held_out())
    expected = []
    for number in range(30):
        ids = [1, *(5 + WORDS.index(word) for word in sentence(number).split()), 2]
        expected.append((tuple(ids), number % 3))
    assert sorted(train + out) == sorted(expected)
    assert len(out) == 6
    assert [tuple(tokenizer(text)["input_ids"]) for text in loader.held_out_sentences()] == [ids for ids, _ in out]
    assert len(loader.held_out_sentences(2)) == 2


def test_epochs_differ_and_are_functions_of_seed_and_epoch(tokenizer, tmp_path):
    labelled_file(tmp_path)
    loader = loader_for(tokenizer, tmp_path, "csv", seed=3, **ARGS)
    again = loader_for(word_tokenizer(), tmp_path, "csv", seed=3, **ARGS)
    for epoch in (0, 1, 5):
        same(loader.epoch(epoch), again.epoch(epoch))
    assert rows_in(loader.epoch(0)) != rows_in(loader.epoch(1))
    assert sorted(rows_in(loader.epoch(0))) == sorted(rows_in(loader.epoch(1)))
    other = loader_for(tokenizer, tmp_path, "csv", seed=4, **ARGS)
    assert rows_in(other.epoch(0)) != rows_in(loader.epoch(0))
    # The rows held out do not follow the seed of the order.
    same(other.held_out(), loader.held_out())
    assert loader_for(tokenizer, tmp_path, "csv", shuffle=False, **ARGS).order(7).tolist() == list(range(27))


@pytest.mark.parametrize("start", [0, 1, 4, 6, 7, 20])
def test_an_epoch_begins_where_it_is_asked_to(tokenizer, tmp_path, start):
    labelled_file(tmp_path)
    loader = loader_for(tokenizer, tmp_path, "csv", **ARGS)
    assert loader.batches_per_epoch == 7
    same(loader.epoch(2, start), list(loader.epoch(2))[start:])


def test_earlier_batches_are_not_read(tokenizer, tmp_path, monkeypatch):
    labelled_file(tmp_path)
    loader = loader_for(tokenizer, tmp_path, "csv", **ARGS)
    seen = []
    collate = type(loader.collator).__call__

    def watch(self, rows, epoch, places):
        seen.append(len(places))
        return collate(self, rows, epoch, places)

    monkeypatch.setattr(type(loader.collator), "__call__", watch)
    assert len(list(loader.epoch(0, 5))) == 2
    assert seen == [4, 3]


def test_sizes_and_steps(tokenizer, tmp_path):
    labelled_file(tmp_path)
    loader = loader_for(tokenizer, tmp_path, "csv", **ARGS)
    assert [len(batch["labels"]) for batch in loader.epoch(0)] == [4, 4, 4, 4, 4, 4, 3]
    assert [loader.steps_per_epoch(accumulate) for accumulate in (1, 2, 3, 7, 8)] == [7, 4, 3, 1, 1]
    batch = next(loader.epoch(0))
    assert loader.tokens(batch) == sum(len(ids) for ids, _ in rows_in([batch]))


def test_an_epoch_left_early_stops_its_thread(tokenizer, tmp_path):
    labelled_file(tmp_path)
    loader = loader_for(tokenizer, tmp_path, "csv", batch_size=1, **ARGS)
    batches = loader.epoch(0)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_processes_give_the_same_rows_as_one(tokenizer, tmp_path, own_cache, monkeypatch):
    labelled_file(tmp_path)
    one = loader_for(tokenizer, tmp_path, "csv", workers=1, **ARGS)
    monkeypatch.setenv("GKD_CACHE", str(own_cache / "other"))
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    two = loader_for(word_tokenizer(), tmp_path, "csv", workers=2, **ARGS)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
    same(one.epoch(0), two.epoch(0))
    same(one.held_out(), two.held_out())
    assert list((own_cache / "other" / "data").glob("tokens-*_of_00002.arrow"))


def test_few_rows_start_no_process():
    assert processes_for(4_000, True) == 1
    assert processes_for(10**7, True) == min(8, len(os.sched_getaffinity(0)))
    assert processes_for(3_000, False) == 1


def test_tokens_are_cached_and_the_cache_follows_the_file(tokenizer, tmp_path, own_cache, capfd):
    path = labelled_file(tmp_path)
    first = loader_for(tokenizer, tmp_path, "csv", **ARGS)
    kept = {file: file.stat().st_mtime_ns for file in (own_cache / "data").rglob("*.arrow")}
    tokenizer("something in between", truncation=True, max_length=3, padding="max_length")
    same(first.epoch(0), loader_for(tokenizer, tmp_path, "csv", **ARGS).epoch(0))
    assert {file: file.stat().st_mtime_ns for file in (own_cache / "data").rglob("*.arrow")} == kept
    stat = path.stat()
    path.write_text(path.read_text().replace(sentence(0), sentence(8), 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = loader_for(tokenizer, tmp_path, "csv", **ARGS)
    assert sorted(rows_in(changed.epoch(0))) != sorted(rows_in(first.epoch(0)))
    shorter = loader_for(tokenizer, tmp_path, "csv", max_length=4, **ARGS)
    assert max(batch["input_ids"].shape[1] for batch in shorter.epoch(0)) == 4
    written = capfd.readouterr()
    assert written.out == written.err == ""
    assert not datasets.are_progress_bars_disabled()


def test_tokens_of_other_rows_are_not_taken_for_those_of_a_source(tokenizer, tmp_path, own_cache, monkeypatch):
    """Which rows are drawn is part of what tokens are found by: a cache that others have filled changes nothing."""
    (tmp_path / "a.txt").write_text("".join(sentence(number) + "\n" for number in range(30)))

    def ids(limit, seed):
        args = {"held_out": 0.0, "limit": limit, "path": "a.txt", "seed": seed, "shuffle": False}
        spec = SourceSpec("texts", "text", tuple(args.items()))
        loader = make_loader(stage_of(), spec, tokenizer, task="encoder", seed=0, root=tmp_path)
        return list(loader.train_rows["input_ids"])

    asked = [(10, 0), (12, 0), (10, 1), (30, 0)]
    shared = [ids(*each) for each in asked]
    for place, each in enumerate(asked):
        monkeypatch.setenv("GKD_CACHE", str(own_cache / str(place)))
        assert shared[place] == ids(*each)
    assert [len(rows) for rows in shared] == [10, 12, 10, 30]
    assert shared[0] != shared[2]


def test_rows_read_otherwise_are_other_rows(tokenizer, tmp_path):
    """In one cache: what one row is, other cells of the same file, and the same texts for another tokenizer."""
    (tmp_path / "a.txt").write_text("w0 w1\nw2\n\nw3 w4\n")
    args = {"path": "a.txt", "batch_size": 1, "held_out": 0.0, "shuffle": False}
    lengths = {}
    for by in ("line", "paragraph", "file"):
        loader = loader_for(tokenizer, tmp_path, "text", by=by, **args)
        lengths[by] = [loader.tokens(batch) - 2 for batch in loader.epoch(0)]
    assert lengths == {"line": [2, 1, 2], "paragraph": [3, 2], "file": [5]}
    turned = word_tokenizer()
    turned.backend_tokenizer.model = models.WordLevel(
        {**{word: 64 - place for place, word in enumerate(WORDS)}, "[UNK]": 3}, unk_token="[UNK]"
    )
    batch = next(loader_for(turned, tmp_path, "text", **args).epoch(0))
    assert batch["input_ids"].tolist() == [[1, 64, 63, 2]]
    (tmp_path / "a.csv").write_text("text,more\nw0,w1\nw2,w3\n")
    for column, first in (("text", 5), ("more", 6)):
        loader = loader_for(tokenizer, tmp_path, "csv", **{**args, "path": "a.csv", "text": column})
        assert next(loader.epoch(0))["input_ids"].tolist() == [[1, first, 2]]


def test_tokenizer_digest_sees_what_is_added_and_which_end_is_cut(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer.truncation_side = "left"
    assert tokenizer_digest(tokenizer) != before
    tokenizer.truncation_side = "right"
    assert tokenizer_digest(tokenizer) == before
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] [CLS] $A [SEP]", special_tokens=ends
    )
    assert tokenizer_digest(tokenizer) != before


def test_the_digest_of_rows_is_of_their_ids_their_ends_and_who_is_held_out(tokenizer, tmp_path):
    """What a stored teacher is told apart by: any other row, border, order or split is another data set."""

    def of(train, held, **args):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
        (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
        args = {"path": "train.jsonl", "text": "a", "held_out": "held.jsonl", "batch_size": 1, **args}
        return digest(loader_for(tokenizer, tmp_path, "jsonl", **args))

    def texts(*found):
        return [{"a": text, "b": "w9"} for text in found]

    train, held = texts("w0 w1", "w2"), texts("w3", "w4")
    found = [
        of(train, held),
        of(train[::-1], held),
        of(train, texts("w3", "w5")),
        of(train, held[:1]),
        of(texts("w0 w1", "w2", "w3"), held[1:]),
        of(train, held, text_pair="b"),
        of(texts("w0 w1 [SEP]", "w2"), held),
        # The same ids one after the other, with another border.
        of(texts("w0 [SEP] [CLS] w1", "w2"), held),
        of(texts("w0", "w1 [SEP] [CLS] w2"), held),
    ]
    assert len(set(found)) == len(found)
    assert of(train, held) == found[0]
    # The same ids, of which other ones are of the second text.
    one = of([{"a": "w0 [SEP] w1", "b": "w2"}], held, text_pair="b")
    assert one != of([{"a": "w0", "b": "w1 [SEP] w2"}], held, text_pair="b")


def test_tokenizer_digest_sees_the_vocabulary_and_not_the_last_call(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer(["w1", "w1 w2"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_tokens(["w77"])
    assert tokenizer_digest(tokenizer) != before


@pytest.mark.parametrize(
    ("source_length", "stage_length", "expected"), [(None, None, 128), (500, None, 150), (20, None, 20), (20, 30, 30)]
)
def test_the_length_of_a_row(tmp_path, source_length, stage_length, expected):
    (tmp_path / "a.txt").write_text("\n".join([" ".join(WORDS * 4)] * 8))
    spec = SourceSpec("texts", "text", (("max_length", source_length), ("path", "a.txt")))
    tokenizer = word_tokenizer(length=150)
    loader = make_loader(stage_of(4, stage_length), spec, tokenizer, task="encoder", seed=0, root=tmp_path)
    assert next(loader.epoch(0))["input_ids"].shape[1] == expected


def test_threshold_names_and_given_order(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text(
        "text,r,name\n" + "".join(f"w{n},{n - 6},{'good' if n % 2 else 'bad'}\n" for n in range(12))
    )
    parted = loader_for(tokenizer, tmp_path, "csv", path="a.csv", label="r", threshold=0.0, held_out=0.0)
    assert parted.sizes.left_out == {"on the threshold": 1}
    assert sorted(rows_in(parted.epoch(0))) == [((1, 5 + n, 2), int(n > 6)) for n in range(12) if n != 6]
    assert list(parted.held_out()) == []
    named = loader_for(tokenizer, tmp_path, "csv", path="a.csv", label="name", held_out=0.0)
    assert named.label_names == ("bad", "good")
    assert sorted(rows_in(named.epoch(0))) == [((1, 5 + n, 2), n % 2) for n in range(12)]
    given = loader_for(tokenizer, tmp_path, "csv", path="a.csv", label="name", labels=("good", "bad"), held_out=0.0)
    assert sorted(rows_in(given.epoch(0))) == [((1, 5 + n, 2), 1 - n % 2) for n in range(12)]


def test_a_table_without_header(tokenizer, tmp_path):
    lines = [f'{n}\t{n / 2 - 1}\tw{n} "w1' for n in range(8)]
    (tmp_path / "a.tsv").write_bytes("\r\n".join(lines).encode())
    args = {"columns": ("id", "r", "text"), "label": "r", "threshold": 0.0, "quoting": False, "held_out": 0.0}
    loader = loader_for(tokenizer, tmp_path, "csv", path="a.tsv", shuffle=False, batch_size=7, **args)
    assert rows_in(loader.epoch(0)) == [((1, 5 + n, 3, 2), int(n > 2)) for n in range(8) if n != 2]


def test_regression_keeps_the_number(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("text,r\n" + "".join(f"w{n},{n / 4 - 1}\n" for n in range(8)))
    spec = SourceSpec("texts", "csv", (("held_out", 0.0), ("label", "r"), ("path", "a.csv"), ("task", "regression")))
    loader = make_loader(stage_of(), spec, tokenizer, task="classification", seed=0, root=tmp_path)
    assert next(loader.epoch(0))["labels"].dtype == torch.float32
    assert sorted(rows_in(loader.epoch(0))) == [((1, 5 + n, 2), n / 4 - 1) for n in range(8)]


def test_limit_draws_rows_and_keeps_their_order(tokenizer, tmp_path):
    labelled_file(tmp_path)
    loader = loader_for(tokenizer, tmp_path, "csv", limit=10, shuffle=False, held_out=0.0, **ARGS)
    rows = rows_in(loader.epoch(0))
    whole = rows_in(loader_for(tokenizer, tmp_path, "csv", shuffle=False, held_out=0.0, **ARGS).epoch(0))
    places = [whole.index(row) for row in rows]
    assert len(rows) == 10
    assert places == sorted(places)
    assert places != list(range(10))


def test_the_seed_of_the_source_draws_who_is_held_out(tokenizer, tmp_path):
    labelled_file(tmp_path, 29)
    drawn = []
    for seed in (0, 1):
        args = {**ARGS, "held_out": 0.4, "seed": seed}
        spec = SourceSpec("texts", "csv", tuple(args.items()))
        loader = make_loader(stage_of(), spec, tokenizer, task="encoder", seed=0, root=tmp_path)
        drawn.append(list(loader.held_out_rows["row"]))
    # 11.6 of 29 rows.
    assert [len(rows) for rows in drawn] == [12, 12]
    assert drawn[0] != drawn[1]


def test_a_limit_is_of_the_rows_to_train_on(tokenizer, tmp_path):
    labelled_file(tmp_path)
    (tmp_path / "dev.csv").write_text("text,label\n" + "".join(f"w{n},{n % 3}\n" for n in range(9)))
    loader = loader_for(tokenizer, tmp_path, "csv", held_out="dev.csv", limit=6, **ARGS)
    assert (loader.sizes.train, loader.sizes.held_out) == (6, 9)


def test_a_held_out_file_of_its_own(tokenizer, tmp_path):
    labelled_file(tmp_path)
    (tmp_path / "dev.csv").write_text("text,label\nw1 w2,1\n,2\nw3,0\n")
    loader = loader_for(tokenizer, tmp_path, "csv", held_out="dev.csv", **ARGS)
    assert (loader.sizes.train, loader.sizes.held_out) == (30, 2)
    assert rows_in(loader.held_out()) == [((1, 6, 7, 2), 1), ((1, 8, 2), 0)]
    assert loader.held_out_sentences() == ["w1 w2", "w3"]


def test_pairs_and_token_types(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "w0 w1", "b": "w2"}\n' * 4)
    loader = loader_for(tokenizer, tmp_path, "jsonl", path="a.jsonl", text="a", text_pair="b", held_out=0.0)
    batch = next(loader.epoch(0))
    assert batch["input_ids"][0].tolist() == [1, 5, 6, 2, 7, 2]
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1]
    assert "labels" not in batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(tmp_path, side):
    (tmp_path / "a.txt").write_text("w0 w1 w2\nw3\n")
    loader = loader_for(
        word_tokenizer(side=side), tmp_path, "text", path="a.txt", batch_size=2, held_out=0.0, shuffle=False
    )
    batch = next(loader.epoch(0))
    full, short = [1, 5, 6, 7, 2], [1, 8, 2]
    padded = [*short, 0, 0] if side == "right" else [0, 0, *short]
    assert batch["input_ids"].tolist() == [full, padded]
    assert batch["attention_mask"].tolist() == [[1] * 5, [int(token != 0) for token in padded]]
    assert loader.tokens(batch) == 8


def test_a_data_set_in_a_folder(tokenizer, tmp_path):
    features = datasets.Features({"sentence": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"sentence": [sentence(n) for n in range(12)], "y": [n % 2 for n in range(12)]}
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(rows, features=features) for name in ("train", "validation")}
    )
    with quiet.quiet():
        both.save_to_disk(str(tmp_path / "saved"))
    args = {"path": "saved", "text": "sentence", "label": "y", "held_out": "validation"}
    loader = loader_for(tokenizer, tmp_path, "hf_dataset", classes=2, **args)
    assert (loader.sizes.train, loader.sizes.held_out) == (12, 12)
    assert [label for _, label in rows_in(loader.held_out())] == [0, 1] * 6
    assert sorted(rows_in(loader.epoch(0))) == sorted(rows_in(loader.held_out()))


def test_sources_in_python(tokenizer, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import gkd_dsl\n"
        "@gkd_dsl.source('words_for_test(count: int = 8) -> text')\n"
        "def words_for_test(count): return (f'w{n}' for n in range(count))\n"
        "@gkd_dsl.source('rows_for_test() -> rows')\n"
        "def rows_for_test(): return [{'text': f'w{n}', 'y': n % 2 == 0} for n in range(8)]\n"
    )
    extension.load("./mine.py", tmp_path)
    loader = loader_for(tokenizer, tmp_path, "mine.words_for_test", count=6, held_out=0.0, shuffle=False)
    assert [ids.tolist()[1] - 5 for batch in loader.epoch(0) for ids in batch["input_ids"]] == list(range(6))
    loader = loader_for(tokenizer, tmp_path, "rows_for_test", label="y", held_out=0.0, shuffle=False)
    assert [label for _, label in rows_in(loader.epoch(0))] == [1, 0] * 4
    assert loader.label_names == ("false", "true")


def test_the_cache_can_always_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("GKD_CACHE", str(blocked))
    folder = quiet.cache_folder()
    assert folder.is_dir()
    assert not folder.is_relative_to(blocked)


def test_held_out_rows_are_spread_over_the_file(tokenizer, tmp_path):
    labelled_file(tmp_path, 30)
    loader = loader_for(tokenizer, tmp_path, "csv", held_out=0.5, **ARGS)
    places = np.array(loader.held_out_rows["row"])
    assert len(places) == 15
    assert (np.diff(places) > 0).all()
    assert places.min() < 10
    assert places.max() > 20
