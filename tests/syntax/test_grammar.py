"""The grammar builds without a conflict, and the parser comes from a cache that may fail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gkd_dsl.syntax import ast, grammar, parse, words
from gkd_dsl.text import Source

SPECS = sorted((Path(__file__).parent / "specs").glob("*.gkd"))


def test_builds_strict_with_named_terminals() -> None:
    built = grammar.build(grammar.grammar_text(), strict=True)
    names = [terminal.name for terminal in built.terminals]
    assert not [name for name in names if name.startswith("__")]
    for keyword in (*words.STATEMENTS, "gkd"):
        assert keyword.upper() in names


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_specs_parse_by_plain_lark_too(path: Path) -> None:
    text = path.read_bytes().decode("utf-8")
    built = grammar.parser()
    assert built.parse(text, start="file").data == "file"
    file, found = parse(Source(path.name, text))
    assert [d.message for d in found] == []
    assert file.header is not None
    assert file.header.version == 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deep" / "grammar.pickle"
    monkeypatch.setattr(grammar, "_cache_file", lambda text: path)
    return path


def fresh() -> ast.File:
    grammar.parser.cache_clear()
    try:
        grammar.parser().parse("gkd 1\nlet x = 1\n", start="file")
        return parse(Source("f", "gkd 1\nlet x = 1\n"))[0]
    finally:
        grammar.parser.cache_clear()


def test_cache_is_written_and_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fresh()
    assert cache.is_file()
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    monkeypatch.setattr(grammar, "build", lambda text: pytest.fail("built although the cache is there"))
    assert len(fresh().items) == len(first.items) == 1


@pytest.mark.parametrize("damage", [b"", b"not a pickle", None])
def test_corrupt_cache_is_replaced(cache: Path, damage: bytes | None) -> None:
    fresh()
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert len(fresh().items) == 1
    assert len(cache.read_bytes()) > len(whole) // 2


def test_unwritable_cache_is_done_without(cache: Path) -> None:
    cache.parent.parent.joinpath("deep").write_text("a file where a folder belongs")
    assert len(fresh().items) == 1


def test_many_at_once(cache: Path) -> None:
    def one(_: int) -> bool:
        built = grammar.build(grammar.grammar_text())
        grammar._save(built, cache)
        return grammar._load(cache) is not None

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(4)))
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
