"""`gkd methods`: the list, filters, the page of one method, JSON."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gkd_dsl import library, method_page
from gkd_dsl.cli.main import application
from gkd_dsl.cost import Beside, ForwardCost, StageCost, costs

NAMES = library.names()


def ask(*words: str, columns: int = 80):
    return CliRunner().invoke(application(), ["methods", *words], env={"COLUMNS": str(columns)}, prog_name="gkd")


@pytest.mark.parametrize("columns", [72, 80, 100, 120, 200])
def test_the_list_fits_the_terminal_and_names_all(columns: int) -> None:
    found = ask(columns=columns)
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    assert max(len(line) for line in lines) <= columns
    assert all(line == line.rstrip() for line in lines)
    starts = [line.split()[0] for line in lines[1:] if line and not line.startswith(" ")]
    assert starts[: len(NAMES)] == NAMES


def test_the_list_says_venue_teachers_stages_and_taps() -> None:
    wide = ask(columns=120).stdout
    rows = {line.split()[0]: line for line in wide.splitlines() if line and not line.startswith(" ")}
    for words in ("NeurIPS 2020", " 1 ", "pretrain", "attention scores and values"):
        assert words in rows["minilm"]
    for words in ("AAAI 2020", "several", "assist, task", "logits"):
        assert words in rows["takd"]


def test_filters() -> None:
    assert [info.name for info in library.chosen(library.library(), taps="Attention", teachers="1")][:1] == ["minilm"]
    listed = ask("--taps", "attention").stdout
    assert "minilm" in listed
    assert "\nkd " not in listed
    one = ask("--teachers", "one").stdout
    assert "\nkd " in one
    assert "\nkd " not in ask("--find", "patient").stdout
    assert "\npkd " in ask("--find", "patient").stdout
    assert "\nkd " not in ask("--teachers", "several").stdout


def test_nothing_that_fits() -> None:
    found = ask("--taps", "no such tap")
    assert found.exit_code == 1
    assert "no method fits --taps no such tap" in found.stderr


def test_a_filter_with_a_name_is_a_mistake() -> None:
    found = ask("kd", "--taps", "logits")
    assert found.exit_code == 2
    assert "--taps filters the list" in found.stderr
    assert ask("--source").exit_code == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [80, 120])
def test_the_page_of_each_fits_and_says_all(name: str, columns: int) -> None:
    found = ask(name, columns=columns)
    assert found.exit_code == 0
    info = library.describe(name)
    text, flat = found.stdout, " ".join(found.stdout.split())
    said = text.partition("\nto use it\n")[0]
    assert max(len(line) for line in said.splitlines()) <= columns
    for words in (info.paper, info.venue, info.arxiv, info.equation):
        assert " ".join(words.split()) in flat
    for param in info.params:
        assert param.name in text
        assert param.default in text
        assert " ".join(param.doc.split()) in flat or len(param.doc.split()) > 3
    assert f"use {name}(" in text
    assert "more than fine-tuning" in text or "1 forward;" in text


def test_a_misspelt_name_has_a_suggestion() -> None:
    found = ask("tinybret")
    assert found.exit_code == 1
    assert "did you mean tinybert?" in found.stderr
    assert "gkd methods lists them" in ask("zzzzzz").stderr


def test_json_of_the_list_and_of_one() -> None:
    assert [each["name"] for each in json.loads(ask("--json").stdout)] == NAMES
    data = json.loads(ask("tinybert", "--json").stdout)
    assert [cost["stage"] for cost in data["costs"]] == ["intermediate", "prediction"]
    assert data["costs"][0]["beside"] == [{"kind": "projection", "name": "W", "parameters": 590592}]
    assert data["costs"][0]["extra_forwards"] == 1
    assert "use tinybert(t -> s) as m" in data["example"]


def test_a_pass_and_a_policy_in_words() -> None:
    plain = ForwardCost("s", "s", True, 6, 6, (("logits", 1),), ("logits",))
    source = ForwardCost("s_src", "s", False, 3, 6, (("hidden", 1),), ("hidden[3]",))
    assert str(source) == "s_src, a pass of s (forward, 3 of 6 blocks): hidden[3]"
    cost = StageCost("main", (plain, source), (Beside("policy", "pi", 12), Beside("teacher", "t", None)), True)
    assert cost.words == "2 forwards, 1 more than fine-tuning; 1 with a backward"
    assert [str(part) for part in cost.beside] == ["policy pi, 12 parameters", "teacher t"]


def test_what_a_pass_changes_is_said() -> None:
    page = " ".join(ask("theseus", columns=120).stdout.split())
    assert "mixed, a pass of s (forward and backward, whole, blocks 0..5 replaced by those of t): logits" in page
    (first, _) = costs("theseus")
    assert first.extra == 0, "the teacher is not run by itself"
    probe = [forward for forward in costs("lrc_bert")[0].forwards if forward.changes]
    assert [forward.model for forward in probe] == ["s"]
    assert probe[0].changes == ("hidden[0] added to",)


def test_the_row_of_the_family_table(tmp_path) -> None:
    table = tmp_path / "families.md"
    table.write_text(
        "# T\n\n| method | models | BERT | GPT-2 |\n|---|---|---|---|\n| [`kd`](kd.md) | x | yes | E0321 |\n"
    )
    assert method_page.families_row("kd", table) == {"BERT": "yes", "GPT-2": "E0321"}
    assert method_page.families_row("pkd", table) == {}
    assert method_page.families_row("kd", tmp_path / "none.md") == {}
