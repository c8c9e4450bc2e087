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


def test_pairs_in_the_table_of_layer_maps() -> None:
    from gkd_dsl import aligners

    text = (ROOT / "docs/language/layer-maps.md").read_text(encoding="utf-8")
    for name in ("uniform", "skip", "last", "first", "stride"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}("))
        shown = ", ".join(str(teacher) for _, teacher in getattr(aligners, name)(4, 12))
        assert row.endswith(f"| {shown} |"), row


def test_defaults_of_a_stage_and_of_the_optimisers() -> None:
    from dataclasses import fields

    from gkd_dsl.graph.nodes import OptimSpec, StageNode

    text = (ROOT / "docs/language/stages.md").read_text(encoding="utf-8")
    defaults = {field.name: field.default for field in fields(StageNode)}
    for name in ("batch_size", "accumulate", "seed"):
        assert f"| `{name} = {defaults[name]}` | {defaults[name]} |" in text
    spec = OptimSpec()
    assert f"| `lr` | {spec.lr:.0e} |".replace("e-05", "e-5") in text
    assert f"| `warmup` | `{spec.warmup}` |" in text
    assert f"| `decay` | `{spec.decay}` |" in text
    assert f"| `weight_decay` | {spec.weight_decay:g} (`sgd`: 0)" in text
    assert f"| `clip` | {spec.clip} |" in text
