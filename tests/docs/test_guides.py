"""What the guides claim: forwards of a step, what is shared, which code a combination gets, and the test that they show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_blocks import ROOT, Block, blocks

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text

COMBINING, OWN = "docs/guides/combining-methods.md", "docs/guides/your-own-method.md"


def under(page: str, title: str, language: str = "gkd") -> Block:
    """The first block below a heading."""
    text = (ROOT / page).read_text(encoding="utf-8")
    line = text[: text.index(f"## {title}\n")].count("\n") + 1
    return next(block for block in blocks(language) if block.file == page and block.line > line)


def stages(text: str, root: Path):
    found = check_text(text, "guide.gkd", root=root)
    assert [(d.code, d.message) for d in found.diagnostics] == []
    return compile_plan(found.graph).stages


def test_two_methods_share_their_forwards(docs_root: Path) -> None:
    (main,) = stages(under(COMBINING, "Two methods in one stage").text, docs_root)
    assert sorted(forward.model for forward in main.forwards) == ["s", "t"]
    assert [loss.name for loss in main.losses] == ["k/hard", "k/soft", "tb/attn", "tb/hid"]
    assert [project.name for project in main.projections] == ["tb/W"]


def test_a_weight_may_move(docs_root: Path) -> None:
    (main,) = stages(under(COMBINING, "Weights and schedules").text, docs_root)
    moving = {loss.name: str(weight) for weight, loss in zip(main.weights, main.losses, strict=True)}
    assert all("ramp" in weight for weight in moving.values())


def test_totals_that_both_have_the_labels(docs_root: Path) -> None:
    text = (
        under(COMBINING, "Two methods in one stage")
        .text.replace("tinybert", "pkd")
        .replace('"./student"', '"./teacher"')
    )
    text = re.sub(r"minimize .*", "minimize k + tb", text)
    (main,) = stages(text, docs_root)
    assert [loss.name for loss in main.losses].count("k/hard") == 1
    assert {"k/hard", "k/soft", "tb/hard", "tb/soft"} <= {loss.name for loss in main.losses}


def test_one_after_the_other(docs_root: Path) -> None:
    text = under(COMBINING, "One after the other").text
    first, second = stages(text, docs_root)
    assert [(stage.name, stage.stage.source.name) for stage in (first, second)] == [
        ("relations.pretrain", "lines"), ("k.task", "reviews"),
    ]  # fmt: skip
    text = text.replace('data lines = text("corpus.txt")\n', "").replace(", source = lines", "")
    assert [stage.stage.source.name for stage in stages(text.replace(", source = reviews", ""), docs_root)] == [
        "reviews"
    ] * 2


def test_several_teachers_run_three_forwards(docs_root: Path) -> None:
    (main,) = stages(under(COMBINING, "Several teachers").text, docs_root)
    assert sorted(forward.model for forward in main.forwards) == ["big", "s", "small"]


def test_a_pass_as_a_student_is_no_forward_more(docs_root: Path) -> None:
    text = under(COMBINING, "A pass as a student").text
    (main,) = stages(text, docs_root)
    assert sorted(forward.model for forward in main.forwards) == ["s", "t"]
    (apart,) = stages(text.replace("th.mixed", "s"), docs_root)
    assert sorted(forward.model for forward in apart.forwards) == ["s", "s", "t"]


WIDE = "student s = truncated(t, layers = 0 ..< 6)"


@pytest.mark.parametrize(
    ("code", "student", "body"),
    [
        ("E0301", 'student s = hf("./student")', 'import "gkd:pkd" use pkd\nuse pkd(t -> s) as m'),
        ("E0312", 'student s = hf("./student", num_attention_heads = 6)', 'import "gkd:minilm" use minilm\nuse minilm(t -> s) as m'),
        ("E0312", 'student s = hf("./student", num_attention_heads = 6)',
         'import "gkd:tinybert" use tinybert\nuse tinybert(t -> s) as m'),
        ("E0237", "student s = truncated(t, layers = 0 ..< 5)", 'import "gkd:pkd" use pkd\nuse pkd(t -> s) as m'),
        ("E0271", WIDE, 'import "gkd:theseus" use theseus\nimport "gkd:minilm" use minilm\nuse theseus(t -> s) as th\n'
         "use minilm(t -> th.mixed) as m"),
        *(("E0301", 'student s = hf("./student")', f'import "gkd:{name}" use {name}\nuse {name}(t -> s) as m')
          for name in ("sid", "alp_kd", "distilbert", "diito")),
        ("E0312", 'student s = hf("./student", num_attention_heads = 6)', 'import "gkd:sid" use sid\nuse sid(t -> s) as m'),
        ("E0237", "student s = truncated(t, layers = 0 ..< 5)", 'import "gkd:theseus" use theseus\nuse theseus(t -> s) as m'),
        ("E0270", 'student s = hf("./student")', 'import "gkd:theseus" use theseus\nuse theseus(t -> s) as m'),
        ("E0331", WIDE, 'import "gkd:kd" use kd\nuse kd(t -> s) as k\nloss m = k.hard * k.soft'),
    ],
)  # fmt: skip
def test_what_excludes_what(code: str, student: str, body: str, docs_root: Path) -> None:
    models = f'teacher t = hf("./teacher")\n{student}\ndata rows = csv("reviews.csv", text = "text", label = "label")'
    imports = "\n".join(line for line in body.splitlines() if line.startswith("import"))
    rest = "\n".join(line for line in body.splitlines() if not line.startswith("import"))
    text = f"gkd 1\n{imports}\n{models}\n{rest}\nstage main for 1 epoch {{\n  minimize m\n}}\n"
    found = check_text(text, "guide.gkd", root=docs_root)
    assert code in {diagnostic.code for diagnostic in found.diagnostics.errors}
    row = next(line for line in (ROOT / COMBINING).read_text(encoding="utf-8").splitlines() if f"[{code}]" in line)
    assert row.startswith("|")


def test_the_ways_out_are_ways_out(docs_root: Path) -> None:
    heads = under(COMBINING, "Two methods in one stage").text.replace("tb.attn + 0.1 * tb.hid", "tb")
    heads = heads.replace("tinybert", "minilmv2").replace('hf("./student")', 'hf("./student", num_attention_heads = 6)')
    assert stages(heads, docs_root)


def test_the_method_is_ten_lines_and_its_test_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = under(OWN, "Ten lines").text
    assert len(method.splitlines()) <= 10
    (tmp_path / "hints.gkd").write_text(method)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    shown = under(OWN, "A test", "python").text
    names: dict[str, object] = {}
    exec(compile(shown, "test_hints.py", "exec"), names)
    names["test_the_middle_layers_by_hand"](tmp_path / "run")  # type: ignore[operator]
    other = method.replace("t.layer[t.N / 2 - 1]", "t.layer[0]")
    (tmp_path / "hints.gkd").write_text(other)
    (tmp_path / "again").mkdir()
    with pytest.raises(AssertionError):
        names["test_the_middle_layers_by_hand"](tmp_path / "again")  # type: ignore[operator]


def test_the_stages_that_it_shows_run(docs_root: Path, tmp_path: Path) -> None:
    (docs_root / "staged_hints.gkd").write_text(under(OWN, "Stages").text)
    use = under(OWN, "Ten lines").text
    users = [block.text for block in blocks("gkd") if block.file == OWN and "use hints(t -> s" in block.text]
    assert use not in users
    text = re.sub(
        r"stage main.*", "run h\n", users[0].replace("hints", "staged_hints").replace(", weight = 10.0", ""), flags=re.S
    )
    assert [stage.name for stage in stages(text, docs_root)] == ["h.hint", "h.task"]
