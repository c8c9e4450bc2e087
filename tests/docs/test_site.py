"""The navigation of the site, and what the pages link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from docs_blocks import ROOT, files

DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def _listed(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inside = nav.values() if isinstance(nav, dict) else nav
    return [page for each in inside for page in _listed(each)]  # type: ignore[union-attr]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = _listed(CONFIG["nav"])
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == there


def test_nothing_is_fetched_from_the_network() -> None:
    assert CONFIG["theme"]["font"] is False
    assert "extra_javascript" not in CONFIG
    assert "extra_css" not in CONFIG
    assert set(CONFIG["plugins"]) == {"search"}


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "#")):
            continue
        place, _, anchor = target.partition("#")
        linked = (path.parent / place).resolve()
        assert linked.exists(), f"{target}"
        if anchor and linked.suffix == ".md":
            assert anchor in _anchors(linked), f"{target}"


def _anchors(path: Path) -> set[str]:
    found = set()
    for title in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M):
        given = re.search(r"\{ #([\w-]+) \}", title)
        plain = re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()
        found.add(given[1] if given else re.sub(r"[\s]+", "-", plain))
    return found


def test_pages_name_no_place_of_this_machine() -> None:
    for path in files():
        text = path.read_text(encoding="utf-8")
        for word in (str(ROOT), "/home/", "/root/"):
            assert word not in text, f"{word} in {path.name}"
