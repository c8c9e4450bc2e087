"""The fenced blocks of the documentation: language, text, file and line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("docs/reference/diagnostics.md",)
"""Its examples are wrong on purpose, and have golden cases of their own."""

_FENCE = re.compile(r"^( *)(`{3,})([\w-]*)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line."""

    file: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def files() -> list[Path]:
    """Every page that a reader may copy from."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(*languages: str) -> list[Block]:
    """All fenced blocks of these languages."""
    found = []
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        if name not in GENERATED:
            found += [
                block for block in blocks_of(path.read_text(encoding="utf-8"), name) if block.language in languages
            ]
    return found


def blocks_of(text: str, name: str) -> list[Block]:
    """The fenced blocks of one page. Raises ValueError for one that is never closed."""
    found: list[Block] = []
    open_: tuple[str, str, str, int] | None = None
    held: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if open_ is None and fence:
            open_, held = (fence[1], fence[2], fence[3], number + 1), []
        elif open_ is not None and fence and fence[2] == open_[1] and not fence[3]:
            found.append(Block(name, open_[3], open_[2], "\n".join(held) + "\n"))
            open_ = None
        elif open_ is not None:
            held.append(line.removeprefix(open_[0]))
    if open_ is not None:
        raise ValueError(f"{name}:{open_[3] - 1}: the block is never closed")
    return found
