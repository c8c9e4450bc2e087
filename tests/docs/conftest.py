"""Shared by the tests of the documentation."""

from __future__ import annotations

from pathlib import Path

import docs_world
import pytest
from docs_blocks import blocks


@pytest.fixture(scope="session")
def docs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the specs of the documentation check: models, tables, and the files that pages name."""
    root = docs_world.build(tmp_path_factory.mktemp("docs"))
    for block in blocks("python"):
        first = block.text.split("\n", 1)[0]
        if first.startswith("# ") and first.endswith(".py"):
            (root / first.removeprefix("# ")).write_text(block.text)
    for block in blocks("gkd"):
        if block.text.startswith("gkd 1\n\nmethod soft_hidden("):
            (root / "soft_hidden.gkd").write_text(block.text)
        if block.text.startswith("gkd 1\n\nmethod hints("):
            (root / "hints.gkd").write_text(block.text)
    return root
