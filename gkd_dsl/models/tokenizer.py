"""Whether two tokenizers give the same ids, from their files alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from gkd_dsl.models.info import Vocabulary

_SMALL = 1 << 20
_LAST_ID = re.compile(rb":\s*(\d+)\s*\}\s*,\s*$")
_ADDED_ID = re.compile(rb'"id"\s*:\s*(\d+)')
_BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The tokenizer in a folder; None where there is none, or only files that give no ids without a library.

    The fingerprint of a file under 1 MiB is made of its meaning (vocabulary, merges, added tokens,
    normaliser, pre-tokeniser, special tokens around a text), so it is equal for files that differ only in
    padding or layout. That of a larger file is made of its bytes: use `same_ids` to compare two.
    """
    for names in (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt")):
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            config = folder / "tokenizer_config.json"
            stamp = tuple(_stamp(file) for file in (*files, config) if file.is_file())
            return _vocabulary(stamp)
    return None


def same_ids(a: Vocabulary, b: Vocabulary) -> bool | None:
    """Whether two tokenizers give the same ids for the same text; None where their files cannot be compared.

    Parses the files only when the fingerprints differ and one of them is of bytes.
    """
    if a.fingerprint == b.fingerprint:
        return True
    left, right = _kind(a), _kind(b)
    if "bytes" in (left, right):
        left_full, right_full = _full(a), _full(b)
        if left_full is None or right_full is None:
            return None
        if left_full == right_full:
            return True
        left, right = left_full.partition(":")[0], right_full.partition(":")[0]
    return False if left == right else None


def by_meaning(vocabulary: Vocabulary) -> Vocabulary:
    """The same with a fingerprint that can be compared where its file is not; as it is where that cannot be made."""
    return Vocabulary(_full(vocabulary) or vocabulary.fingerprint, vocabulary.size, "")


def _kind(vocabulary: Vocabulary) -> str:
    return vocabulary.fingerprint.partition(":")[0]


def _full(vocabulary: Vocabulary) -> str | None:
    if _kind(vocabulary) != "bytes":
        return vocabulary.fingerprint
    try:
        return _canonical(_stamp(Path(vocabulary.file)))[0]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=256)
def _vocabulary(stamp: tuple[tuple[str, int, int], ...]) -> Vocabulary | None:
    path, _, size = stamp[0]
    name = Path(path).name
    try:
        if name == "tokenizer.json":
            if size > _SMALL:
                content = Path(path).read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                return Vocabulary(f"bytes:{digest}", _size_of_large(content) or _canonical(stamp[0])[1], path)
            fingerprint, count = _canonical(stamp[0])
            return Vocabulary(fingerprint, count, path)
        config = _tokenizer_config(stamp)
        if name == "vocab.txt":
            fingerprint, count = _from_vocab_txt(Path(path), config)
        else:
            fingerprint, count = _from_bpe_files(Path(path), Path(stamp[1][0]), config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return Vocabulary(fingerprint, count, path)


def _tokenizer_config(stamp: tuple[tuple[str, int, int], ...]) -> dict[str, Any]:
    path = Path(stamp[-1][0])
    if path.name != "tokenizer_config.json":
        return {}
    parsed = json.loads(path.read_text(encoding="utf-8"))
    return parsed if isinstance(parsed, dict) else {}


def _size_of_large(content: bytes) -> int | None:
    """One more than the highest id, read off the ends of the vocabulary and of the added tokens; None if unsure."""
    model, merges = content.find(b'"model"'), content.rfind(b'"merges"')
    last = _LAST_ID.search(content, max(model, merges - 200), merges) if 0 <= model < merges else None
    if last is None:
        return None
    return max([int(last[1]), *(int(found) for found in _ADDED_ID.findall(content, 0, model))]) + 1


@lru_cache(maxsize=64)
def _canonical(stamp: tuple[str, int, int]) -> tuple[str, int]:
    """The fingerprint of a `tokenizer.json` by its meaning, and its number of ids."""
    parsed = json.loads(Path(stamp[0]).read_text(encoding="utf-8"))
    model = dict(parsed["model"])
    vocab = model.pop("vocab")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.pop("merges", None) or ()]
    if not isinstance(vocab, Mapping):
        model["scores"] = [score for _, score in vocab]
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    for key, usual in (("dropout", None), ("fuse_unk", False), ("byte_fallback", False), ("ignore_merges", False),
                       ("continuing_subword_prefix", ""), ("end_of_word_suffix", ""), ("unk_token", None)):  # fmt: skip
        if model.get(key) in (usual, None):
            model.pop(key, None)
    # files of older releases leave the type out
    model.setdefault("type", "BPE" if merges else "WordPiece")
    added = sorted(
        (
            token["id"],
            token["content"],
            *(bool(token.get(f)) for f in ("single_word", "lstrip", "rstrip", "normalized")),
        )
        for token in parsed.get("added_tokens") or ()
    )
    count = len(vocab) + sum(token[1] not in vocab for token in added)
    rest = {
        "model": model,
        "added": added,
        "normalizer": _normalizer(parsed.get("normalizer")),
        "pre_tokenizer": parsed.get("pre_tokenizer"),
        "around": _around(parsed.get("post_processor")),
    }
    return _digest("ids", vocab, merges, rest), count


def _digest(kind: str, vocab: Mapping[str, int], merges: list[str], rest: object) -> str:
    ids = list(vocab.values())
    tokens = list(vocab)
    if ids != list(range(len(ids))):
        pairs = sorted(vocab.items(), key=lambda pair: pair[1])
        tokens, ids = [token for token, _ in pairs], [index for _, index in pairs]
    gaps = "" if ids == list(range(len(ids))) else json.dumps(ids)
    state = hashlib.sha256()
    for part in ("\0".join(tokens), gaps, "\0".join(merges), json.dumps(rest, sort_keys=True)):
        state.update(part.encode("utf-8", "surrogatepass") + b"\0\0")
    return f"{kind}:{state.hexdigest()}"


def _normalizer(normalizer: Any) -> Any:
    if isinstance(normalizer, Mapping) and normalizer.get("type") == "BertNormalizer":
        lower = bool(normalizer.get("lowercase", True))
        accents = normalizer.get("strip_accents")
        return {
            "type": "BertNormalizer",
            "clean_text": normalizer.get("clean_text", True),
            "handle_chinese_chars": normalizer.get("handle_chinese_chars", True),
            "strip_accents": lower if accents is None else accents,
            "lowercase": lower,
        }
    return normalizer


def _around(processor: Any) -> Any:
    """The special tokens put around a text; as written for processors that are not known here."""
    if not isinstance(processor, Mapping):
        return processor
    kind = processor.get("type")
    if kind == "TemplateProcessing":
        ids = {name: token.get("ids") for name, token in (processor.get("special_tokens") or {}).items()}
        return [_piece(piece, ids) for piece in processor.get("single") or ()]
    if kind == "BertProcessing":
        return [processor["cls"][1], "A", processor["sep"][1]]
    return dict(processor)


def _piece(piece: Mapping[str, Any], ids: Mapping[str, Any]) -> Any:
    if "SpecialToken" not in piece:
        return "A"
    found = ids.get(piece["SpecialToken"]["id"])
    return found[0] if isinstance(found, list) and len(found) == 1 else found


def _from_vocab_txt(path: Path, config: Mapping[str, Any]) -> tuple[str, int]:
    """The ids of a WordPiece vocabulary file as BERT's tokenizer reads it, in the form of `_canonical`."""
    tokens = path.read_text(encoding="utf-8").split("\n")
    if tokens and tokens[-1] == "":
        tokens.pop()
    index = {token.rstrip("\r"): i for i, token in enumerate(tokens)}
    cls, sep, unk = (config.get(f"{name}_token", f"[{name.upper()}]") for name in ("cls", "sep", "unk"))
    plain = config.get("tokenizer_class", "BertTokenizer") in _BERT_CLASSES and all(
        isinstance(token, str) and token in index for token in (cls, sep, unk)
    )
    specials = [config.get(f"{name.strip('[]').lower()}_token", name) for name in _BERT_SPECIALS]
    if not plain or config.get("added_tokens_decoder") or not all(isinstance(s, str) and s in index for s in specials):
        rest = {key: value for key, value in config.items() if key != "name_or_path"}
        return _digest("vocab.txt", index, [], rest), len(index)
    lower = bool(config.get("do_lower_case", True))
    accents = config.get("strip_accents")
    rest = {
        "model": {
            "type": "WordPiece",
            "unk_token": unk,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        "added": sorted((index[token], token, False, False, False, False) for token in set(specials)),
        "normalizer": _normalizer(
            {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
                "strip_accents": accents,
                "lowercase": lower,
            }
        ),
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "around": [index[cls], "A", index[sep]],
    }
    return _digest("ids", index, [], rest), len(index)


def _from_bpe_files(vocab: Path, merges: Path, config: Mapping[str, Any]) -> tuple[str, int]:
    """Byte-level BPE kept in two files; what is put around a text is the tokenizer class's own."""
    pairs = json.loads(vocab.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").split("\n")
    kept = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    names = ("tokenizer_class", "add_prefix_space", "added_tokens_decoder", "unk_token", "bos_token", "eos_token",
             "pad_token", "mask_token", "cls_token", "sep_token", "add_bos_token")  # fmt: skip
    rest = {name: config[name] for name in names if name in config}
    if isinstance(rest.get("tokenizer_class"), str):
        rest["tokenizer_class"] = rest["tokenizer_class"].removesuffix("Fast")
    return _digest("bpe-files", pairs, kept, rest), len(pairs)
