"""The pages behind `gkd explain E0301`: what a code means, an example, and what to do."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

from gkd_dsl.diagnostics.suggest import did_you_mean


class UnknownCodeError(LookupError):
    """No diagnostic has this code; `near` are codes that may have been meant."""

    def __init__(self, code: str, near: list[str]) -> None:
        self.code = code
        self.near = near
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `gkd explain` lists them"
        super().__init__(f"no diagnostic has the code {code}{hint}")


@lru_cache(maxsize=1)
def _pages() -> dict[str, str]:
    folder = resources.files("gkd_dsl.diagnostics").joinpath("codes")
    if not folder.is_dir():
        return {}
    return {
        page.name.removesuffix(".md"): page.read_text(encoding="utf-8")
        for page in sorted(folder.iterdir(), key=lambda page: page.name)
        if page.name.endswith(".md")
    }


def codes() -> dict[str, str]:
    """Every code and its title, in order."""
    return {code: text.splitlines()[0].removeprefix("#").strip() for code, text in _pages().items()}


def explain(code: str) -> str:
    """The page of a code (`E0301`, `e301` and `301` are the same); `UnknownCodeError` where there is none."""
    pages = _pages()
    wanted = code.strip().upper()
    if wanted in pages:
        return pages[wanted]
    digits = wanted.lstrip("EW")
    if digits.isdigit():
        same = [known for known in pages if known[1:] == digits.zfill(4)]
        if len(same) == 1 and wanted[:1] in (same[0][0], digits[0]):
            return pages[same[0]]
        return _unknown(code, same or _nearest(digits))
    return _unknown(code, did_you_mean(wanted, pages))


def _nearest(digits: str) -> list[str]:
    number = int(digits[:9])
    return sorted(_pages(), key=lambda known: (abs(int(known[1:]) - number), known))[:3]


def _unknown(code: str, near: list[str]) -> str:
    raise UnknownCodeError(code, near)
