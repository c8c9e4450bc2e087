"""The Lark parser of the grammar, kept in the user's cache between processes."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import lark
from lark import Lark, Token

STARTS = ("file", "signature", "expr")

# Lark evaluates the grammar's string literals by `ast.literal_eval`, which raises SystemError ("AST constructor
# recursion depth mismatch") in CPython 3.11 when two threads are inside it: threads build one after the other.
_BUILDING = threading.Lock()


class Newlines:
    """Drops line ends inside `()` and `[]` and those that repeat.

    It only looks behind: the contextual lexer reads the next token in the state that the last one led to,
    so a filter that waits for a token would make it read in a stale state.
    """

    always_accept = ("_NL",)

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """The stream without the line ends that mean nothing."""
        depth, last = 0, ""
        for token in stream:
            if token.type == "_NL":
                if depth or last == "_NL":
                    continue
            elif token.type in ("LPAR", "LSQB"):
                depth += 1
            elif token.type in ("RPAR", "RSQB"):
                depth = max(0, depth - 1)
            elif token.type in ("LBRACE", "RBRACE"):
                depth = 0
            last = token.type
            yield token


def grammar_text() -> str:
    """The text of `gkd.lark`."""
    return resources.files("gkd_dsl.grammar").joinpath("gkd.lark").read_text(encoding="utf-8")


def build(text: str, **options: Any) -> Lark:
    """A parser from the grammar's text; `strict=True` refuses every conflict (needs `interegular`)."""
    with _BUILDING:
        return Lark(
            text,
            parser="lalr",
            lexer="contextual",
            start=list(STARTS),
            postlex=Newlines(),
            propagate_positions=True,
            maybe_placeholders=True,
            **options,
        )


@lru_cache(maxsize=1)
def parser() -> Lark:
    """The parser, from the cache where it is there and whole, else built (and kept for the next process)."""
    text = grammar_text()
    path = _cache_file(text)
    loaded = _load(path)
    if loaded is not None:
        return loaded
    built = build(text)
    _save(built, path)
    return built


def _cache_file(text: str) -> Path | None:
    try:
        from platformdirs import user_cache_path

        key = hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
        python = f"{sys.implementation.name}{sys.version_info[0]}{sys.version_info[1]}"
        return user_cache_path("gkd-dsl") / f"grammar-{lark.__version__}-{python}-{key}.pickle"
    except (ImportError, OSError, RuntimeError):
        return None


def _load(path: Path | None) -> Lark | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            data = pickle.load(file)
        return Lark._load_from_dict(data["data"], data["memo"], postlex=Newlines())
    except Exception:  # A cache may be missing, cut short or of another build: none of it is the user's concern.
        return None


def _save(built: Lark, path: Path | None) -> None:
    """Write beside the place and rename, so that another process never sees half a file."""
    if path is None:
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            built.save(file, exclude_options=("postlex",))
        os.replace(temporary, path)
    except Exception:  # An unwritable or full cache costs 0.2 s a process and nothing else.
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
