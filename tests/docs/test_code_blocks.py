"""Every block that a reader may copy: specs parse and check, Python compiles, commands exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from docs_blocks import ROOT, Block, blocks, blocks_of
from typer.testing import CliRunner

from gkd_dsl import library
from gkd_dsl.cli.main import COMMANDS, application
from gkd_dsl.fitting import fitting
from gkd_dsl.meaning.check import check_text
from gkd_dsl.syntax import parse
from gkd_dsl.text import Source

SPECS = blocks("gkd")
WHOLE = [block for block in SPECS if block.text.startswith("gkd 1\n")]
PARTS = [block for block in SPECS if block not in WHOLE]
PYTHON = blocks("python")
SHELL = blocks("bash")
COMMAND_LINES = [(block, line) for block in SHELL for line in block.text.splitlines() if line.strip()]
OTHER_COMMANDS = ("cd", "git", "python3", "tensorboard", ".venv/bin/pip", ".venv/bin/python", "source", "tar", "export",
                  "torchrun")  # fmt: skip


def test_there_are_blocks_of_each_kind() -> None:
    assert len(SPECS) > 30
    assert len(WHOLE) > 8
    assert len(PYTHON) > 3
    assert len(COMMAND_LINES) > 10


@pytest.mark.parametrize("block", SPECS, ids=str)
def test_a_spec_parses(block: Block) -> None:
    text = block.text if block.text.startswith("gkd 1\n") else f"gkd 1\n{block.text}"
    _, found = parse(Source(str(block), text))
    assert [(d.code, d.message) for d in found] == []


@pytest.mark.parametrize("block", WHOLE, ids=str)
def test_a_whole_spec_checks(block: Block, docs_root: Path, tmp_path: Path) -> None:
    root = docs_root
    if block.file.startswith("docs/methods/") and '"path/to/' in block.text:
        # The example of a method leaves the place of the models open: they are those that suit it.
        info = library.describe(Path(block.file).stem)
        fitting(info.name).specimens.build(info, tmp_path)
        root = tmp_path
    if block.file.startswith("examples") or "examples/" in block.text:
        root = ROOT
    if block.file == "docs/large-models.md":
        root = ROOT / "examples" / "large"
    if 'import python "docstrings.py"' in block.text:
        root = ROOT / "examples"
    params = {"data": "reviews.tsv"} if "param data: text" in block.text and root != ROOT / "examples" / "large" else {}
    checked = check_text(block.text, str(block), root=root, params=params)
    assert [(d.code, d.message) for d in checked.diagnostics.errors] == []
    if not block.file.startswith("docs/methods/"):
        assert [d.message for d in checked.diagnostics] == []


STUDENTS = ('hf("./student")', "truncated(t, layers = [1, 3, 5, 7])", 'hf("bert-base-uncased", num_labels = 2)')
AROUND = {
    "t": 'teacher t = hf("./teacher")',
    "s": "student s = {student}",
    "reviews": 'data reviews = csv("reviews.csv", text = "text", label = "label")',
    "W": "project W = linear(s.H -> t.H)",
    "hard": "loss hard = cross_entropy(s.logits, batch.labels)",
    "soft": "loss soft = kl(s.logits <- t.logits)",
    "hid": "loss hid = sum(mse(s.layer[i].out |> W <- t.layer[j].out) for (i, j) in uniform(s.layer, t.layer))",
    "acc": "metric acc = accuracy(s.logits, batch.labels)",
}
"""What a part of a spec may take for granted; a part that declares one of these names brings its own."""


@pytest.mark.parametrize("block", PARTS, ids=str)
def test_a_part_of_a_spec_checks_among_usual_declarations(block: Block, docs_root: Path) -> None:
    named = set(
        re.findall(r"^\s*(?:teacher|student|model|data|project|loss|metric) (\w+)\b(?!\s*\{)", block.text, re.M)
    )
    faults = []
    for student in STUDENTS:
        lines = [text.replace("{student}", student) for name, text in AROUND.items() if name not in named]
        if "hf(teacher)" in block.text:
            lines.insert(0, 'param teacher: text = "./teacher"')
        text = "\n".join(["gkd 1", *lines, block.text])
        if len(re.findall(r"^data ", text, re.M)) > 1:
            text = re.sub(r"^(stage [^{]*\{)(?!.*source)", r"\1\n  source = reviews", text, flags=re.M)
        if "stage " not in block.text:
            text += "\nstage around for 1 epoch {\n  source = reviews\n  minimize hard\n}\n"
        checked = check_text(text, str(block), root=docs_root, params={"path": "x"} if "param path" in text else {})
        faults.append([f"{d.code}: {d.message}" for d in checked.diagnostics.errors])
        if not faults[-1]:
            return
    raise AssertionError(min(faults, key=len))


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_what_python_imports_is_there(block: Block) -> None:
    for module, names in re.findall(r"^from (gkd_dsl[\w.]*) import ([\w, ]+)$", block.text, re.M):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module} has no {name}"
    for name in re.findall(r"\bgkd_dsl\.(\w+)\(", block.text):
        assert hasattr(importlib.import_module("gkd_dsl"), name), f"gkd_dsl has no {name}"


@pytest.mark.parametrize(("block", "line"), COMMAND_LINES, ids=[f"{b}:{n}" for n, (b, _) in enumerate(COMMAND_LINES)])
def test_a_command_exists(block: Block, line: str) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "gkd":
        assert words[1] in COMMANDS or words[1] == "--version"
        options = _options(words[1]) if words[1] in COMMANDS else set()
        given = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
        assert given <= options, f"gkd {words[1]} has no {given - options}"
    else:
        assert words[0] in OTHER_COMMANDS, f"{block}: {words[0]}"


def _options(command: str) -> set[str]:
    """The options of a command, as its help lists them."""
    shown = CliRunner().invoke(application(), [command, "--help"], prog_name="gkd", env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown.output.partition("Options:")[2]))


def test_an_open_block_is_found() -> None:
    with pytest.raises(ValueError, match=r"page.md:2"):
        blocks_of("text\n```gkd\ngkd 1\n", "page.md")


def test_a_block_in_a_list_loses_its_indent() -> None:
    (block,) = blocks_of("- a\n\n  ```gkd\n  loss a = b\n  ```\n", "page.md")
    assert block == Block("page.md", 4, "gkd", "loss a = b\n")
