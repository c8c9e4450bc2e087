import json

import pytest

from gkd_dsl.models import tokenizer
from gkd_dsl.models.tokenizer import read_vocabulary, same_ids

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"]
BERT = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": i, "content": WORDS[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i in range(5)
    ],
    "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
        ],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2]}, "[SEP]": {"id": "[SEP]", "ids": [3]}},
    },
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {word: i for i, word in enumerate(WORDS)},
    },
}


@pytest.fixture
def save(tmp_path):
    count = 0

    def write(files):
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        folder.mkdir()
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
        return read_vocabulary(folder)

    return write


def changed(**changes):
    copy = json.loads(json.dumps(BERT))
    for key, value in changes.items():
        *above, last = key.split("__")
        place = copy
        for name in above:
            place = place[name]
        place[last] = value
    return {"tokenizer.json": copy}


def test_padding_and_layout_do_not_count(save):
    plain = save(changed())
    assert plain.size == 8
    assert plain.file.endswith("tokenizer.json")
    padded = save({"tokenizer.json": json.dumps({**BERT, "padding": {"strategy": {"Fixed": 128}}}, indent=3)})
    reordered = save(changed(model__vocab=dict(reversed(BERT["model"]["vocab"].items()))))
    processed = save(changed(post_processor={"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}))
    for other in (padded, reordered, processed):
        assert other.fingerprint == plain.fingerprint
        assert same_ids(plain, other) is True


@pytest.mark.parametrize(
    "change",
    [
        {"model__vocab": {**BERT["model"]["vocab"], "a": 6, "b": 5}},
        {"model__vocab": {**BERT["model"]["vocab"], "d": 8}},
        {"normalizer__lowercase": False},
        {"normalizer__strip_accents": False},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model__unk_token": "a"},
        {"added_tokens": BERT["added_tokens"][:4]},
        {"post_processor": None},
    ],
)
def test_what_changes_ids_counts(save, change):
    assert same_ids(save(changed()), save(changed(**change))) is False


def test_a_vocabulary_file_equals_its_tokenizer_json(save):
    full = save(changed())
    bare = save({"vocab.txt": "\n".join(WORDS) + "\n"})
    assert bare.size == 8
    assert bare.fingerprint == full.fingerprint
    cased = save({"vocab.txt": "\n".join(WORDS), "tokenizer_config.json": {"do_lower_case": False}})
    assert same_ids(cased, full) is False
    assert same_ids(cased, save(changed(normalizer__lowercase=False))) is True


def test_a_vocabulary_file_of_another_class_is_not_compared(save):
    other = save({"vocab.txt": "\n".join(WORDS), "tokenizer_config.json": {"tokenizer_class": "BertJapaneseTokenizer"}})
    assert same_ids(other, save(changed())) is None
    lacking = save({"vocab.txt": "a\nb"})
    assert same_ids(lacking, save(changed())) is None
    assert same_ids(lacking, save({"vocab.txt": "a\nb"})) is True
    assert same_ids(lacking, save({"vocab.txt": "a\nc"})) is False


def test_merges(save):
    def bpe(merges, **more):
        model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": merges, **more}
        return {"tokenizer.json": {"added_tokens": [{"id": 3, "content": "<end>"}], "model": model}}

    first = save(bpe(["a b"]))
    assert first.size == 4
    assert same_ids(first, save(bpe([["a", "b"]], dropout=None, fuse_unk=False))) is True
    assert same_ids(first, save(bpe([]))) is False
    assert same_ids(first, save(bpe(["a b"], byte_fallback=True))) is False


def test_two_files(save):
    files = {"vocab.json": {"a": 0, "b": 1}, "merges.txt": "#version: 0.2\na b\n"}
    first = save(files)
    assert (first.size, same_ids(first, save(files))) == (2, True)
    assert same_ids(first, save({**files, "merges.txt": "a b"})) is True
    assert same_ids(first, save({**files, "merges.txt": "b a"})) is False
    assert same_ids(first, save(changed())) is None


def test_large_files_are_parsed_only_when_their_bytes_differ(save, monkeypatch):
    monkeypatch.setattr(tokenizer, "_SMALL", 10)
    model = {"type": "BPE", "vocab": {f"t{i}": i for i in range(40)}, "merges": ["t0 t1"]}
    content = {"added_tokens": [{"id": 40, "content": "<end>"}], "model": model}
    parsed = []
    original = tokenizer._canonical
    monkeypatch.setattr(tokenizer, "_canonical", lambda stamp: parsed.append(stamp) or original(stamp))
    first, second = save({"tokenizer.json": content}), save({"tokenizer.json": content})
    assert first.fingerprint.startswith("bytes:")
    assert first.size == 41
    assert same_ids(first, second) is True
    assert parsed == []
    padded = save({"tokenizer.json": {"padding": {"pad_id": 0}, **content}})
    assert same_ids(first, padded) is True
    assert len(parsed) == 2
    model["vocab"]["t0"] = 41
    assert same_ids(first, save({"tokenizer.json": content})) is False


def test_a_small_file_beside_a_large_one(save, monkeypatch):
    small = save(changed())
    monkeypatch.setattr(tokenizer, "_SMALL", 10)
    large = save(changed(padding={"pad_id": 0}))
    assert large.fingerprint != small.fingerprint
    assert same_ids(small, large) is True


def test_folders_without_a_tokenizer_that_can_be_read(save):
    assert save({}) is None
    assert save({"vocab.json": {}}) is None
    assert save({"tokenizer.json": "{"}) is None
    assert save({"tokenizer.json": "{}"}) is None


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(BERT))
    before = read_vocabulary(tmp_path)
    path.write_text(json.dumps(changed(normalizer__lowercase=False)["tokenizer.json"]))
    assert read_vocabulary(tmp_path) != before


def test_scores_of_pieces_count(save):
    """A unigram model cuts a text where the sum of the scores is largest: other scores are other ids."""
    pieces = [["<unk>", 0.0], ["a", -1.0], ["b", -2.0], ["ab", -2.5]]
    model = {"type": "Unigram", "unk_id": 0, "vocab": pieces}
    other = {**model, "vocab": [*pieces[:3], ["ab", -3.5]]}
    assert same_ids(save(changed(model=model)), save(changed(model=model))) is True
    assert same_ids(save(changed(model=model)), save(changed(model=other))) is False


@pytest.mark.parametrize(
    ("lowercase", "accents", "same"), [(True, True, True), (True, False, False), (False, False, None)]
)
def test_accents_go_with_capitals_unless_it_is_said(save, lowercase, accents, same):
    plain = save(changed())
    said = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
    given = save(changed(normalizer={**said, "lowercase": lowercase, "strip_accents": accents}))
    unsaid = save(changed(normalizer={**said, "lowercase": lowercase, "strip_accents": None}))
    assert same_ids(unsaid, given) is (True if same is None else same)
    assert same_ids(plain, given) is bool(same)
