"""What pages show as the answer of the checker is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs_blocks import ROOT, blocks

from gkd_dsl.diagnostics.render import render_text
from gkd_dsl.meaning.check import check_text

SPEC = next(block.text for block in blocks("gkd") if block.file == "docs/first-spec.md")


@pytest.mark.parametrize(
    ("right", "wrong", "pages"),
    [
        ("s.layer[i].out |> W <-", "s.layer[i].out <-", ("README.md", "docs/first-spec.md")),
        ("kl(s.logits <- t.logits", "kl(t.logits <- s.logits", ("docs/first-spec.md",)),
        ("until = 10%", "until = 10", ("docs/first-spec.md",)),
    ],
)
def test_a_mistake(right: str, wrong: str, pages: tuple[str, ...], docs_root: Path) -> None:
    assert right in SPEC
    checked = check_text(SPEC.replace(right, wrong), "reviews.gkd", root=docs_root)
    said = render_text(checked.diagnostics).rstrip("\n")
    assert "error[" in said
    for page in pages:
        assert f"```text\n{said}\n```" in (ROOT / page).read_text(encoding="utf-8"), said


def test_the_readme_and_the_first_spec_are_one() -> None:
    assert SPEC in [block.text for block in blocks("gkd") if block.file == "README.md"]


def test_counts_in_the_readme() -> None:
    from gkd_dsl import library
    from gkd_dsl.ops import registry

    said = f"{len(library.names())} methods, {len(registry.names('loss'))} losses"
    for page in ("README.md", "docs/compare-peers.md"):
        assert said in (ROOT / page).read_text(encoding="utf-8")
