"""Imports: files, the library, circles, and Python files that are read and not run."""

from __future__ import annotations

from pathlib import Path

import pytest
from meaning_help import GOLDEN, HARD, check, codes, good, inputs, node, spec, stage

from gkd_dsl.graph.nodes import OpNode

METHOD = (
    "gkd 1\n\nmethod soft_labels(teacher t, student s) {\n  loss soft = kl(s.logits <- t.logits)\n  total = soft\n}\n"
)
OPERATOR = '''
import gkd_dsl
open({path!r}, "w").write("ran")


@gkd_dsl.op("squared(student: Float[..., C] <- teacher: Float[..., C], scale: float = 1.0) -> Loss[...]")
def squared(student, teacher, scale):
    """Squared difference of the logits."""
    return scale * (student - teacher).square().mean(-1)


@gkd_dsl.source("lines(count: int = 4) -> rows")
def lines(count):
    """A few texts."""
    return [{{"text": "a film"}}] * count
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(GOLDEN / name)
    return tmp_path


def test_a_relative_file(folder: Path) -> None:
    (folder / "terms").mkdir()
    (folder / "terms" / "soft.gkd").write_text(METHOD)
    for line, call in (
        ('import "terms/soft.gkd" use soft_labels\n', "soft_labels"),
        ('import "./terms/soft.gkd" as terms\n', "terms.soft_labels"),
    ):
        checked = good(spec(f"{line}use {call}(t -> s) as m\n" + stage("minimize m")), root=folder)
        assert list(inputs(checked, "stage/main").values()) == ["loss/m/soft"]


def test_paths_in_an_imported_file_start_at_its_folder(folder: Path) -> None:
    (folder / "terms").mkdir()
    (folder / "terms" / "soft.gkd").write_text(METHOD)
    (folder / "terms" / "half.gkd").write_text(
        'gkd 1\nimport "soft.gkd" use soft_labels\n\nmethod half(teacher t, student s) {\n'
        "  use soft_labels(t -> s) as inner\n  total = 0.5 * inner.total\n}\n"
    )
    checked = good(spec('import "terms/half.gkd" use half\nuse half(t -> s) as m\n' + stage("minimize m")), root=folder)
    assert checked.stages[0].weights[0].amount == 0.5


def test_an_error_in_an_imported_file_is_shown_there(folder: Path) -> None:
    (folder / "soft.gkd").write_text(METHOD.replace("total = soft", "total = soft +"))
    checked = check(spec('import "soft.gkd" use soft_labels\nuse soft_labels(t -> s) as m\n' + stage("minimize m.soft")), root=folder)  # fmt: skip
    assert {d.span.source.name for d in checked.diagnostics if d.span is not None} == {"soft.gkd"}


def test_a_circle_is_shown_with_its_path(folder: Path) -> None:
    (folder / "a.gkd").write_text('gkd 1\nimport "b.gkd" use b\n' + METHOD.replace("gkd 1\n", ""))
    (folder / "b.gkd").write_text(
        'gkd 1\nimport "c.gkd" use c\n' + METHOD.replace("gkd 1\n", "").replace("soft_labels", "b")
    )
    (folder / "c.gkd").write_text('gkd 1\nimport "a.gkd" use soft_labels\n' + METHOD.replace("gkd 1\n", "").replace("soft_labels", "c"))  # fmt: skip
    checked = check(
        spec('import "a.gkd" use soft_labels\nuse soft_labels(t -> s) as m\n' + stage("minimize m")), root=folder
    )
    (found,) = checked.diagnostics
    assert found.code == "E0507"
    assert "a.gkd -> b.gkd -> c.gkd -> a.gkd" in found.message


def test_a_file_may_be_imported_along_two_ways(folder: Path) -> None:
    (folder / "soft.gkd").write_text(METHOD)
    (folder / "other.gkd").write_text(
        'gkd 1\nimport "soft.gkd" use soft_labels\n\nmethod other(teacher t, student s) {\n'
        "  use soft_labels(t -> s) as inner\n  total = inner.total\n}\n"
    )
    text = 'import "soft.gkd" use soft_labels\nimport "other.gkd" use other\n'
    text += "use soft_labels(t -> s) as a\nuse other(t -> s) as b\n"
    good(spec(text + stage("minimize a + b")), root=folder)


def test_a_python_file_is_read_and_not_run(folder: Path) -> None:
    ran = folder / "ran.txt"
    (folder / "ops.py").write_text(OPERATOR.format(path=str(ran)))
    text = 'import python "ops.py" as ops\nloss soft = ops.squared(s.logits <- t.logits, scale = 2.0)\n'
    checked = good(spec(text + stage("minimize soft")), root=folder)
    op = node(checked, inputs(checked, "loss/soft")["0"])
    assert isinstance(op, OpNode)
    assert (op.op, op.attr("scale"), str(op.type)) == ("ops.py:squared", 2.0, "Loss[B]")
    assert not ran.exists()


def test_a_python_operator_is_typed(folder: Path) -> None:
    (folder / "ops.py").write_text(OPERATOR.format(path=str(folder / "ran.txt")))
    for call, code in (
        ("ops.squared(s.final <- t.final)", "E0301"),
        ("ops.squared(s.logits <- t.logits, scal = 2.0)", "E0234"),
        ("ops.sqared(s.logits <- t.logits)", "E0231"),
        ("ops.lines(s.logits)", "E0230"),
    ):
        text = f'import python "ops.py" as ops\nloss soft = {call}\n'
        assert codes(check(spec(text + stage("minimize soft")), root=folder)) == [code], call


def test_a_source_in_python(folder: Path) -> None:
    (folder / "ops.py").write_text(OPERATOR.format(path=str(folder / "ran.txt")))
    text = 'import python "ops.py" as here\ndata few = here.lines(count = 9)\nloss soft = kl(s.logits <- t.logits)\n'
    checked = good(spec(text + stage("minimize soft"), data=""), root=folder)
    assert checked.stages[0].source is not None
    assert (checked.stages[0].source.kind, checked.stages[0].source.arg("count")) == ("ops.py:lines", 9)
    assert codes(check(spec(text.replace("9", '"nine"') + stage("minimize soft"), data=""), root=folder)) == ["E0404"]


def test_a_missing_method_keeps_its_uses_silent() -> None:
    checked = check(spec('import "gkd:kd" use kdd\nuse kd(t -> s) as k\n' + HARD + stage("minimize hard + k.total")))
    assert codes(checked) == ["E0209"]


@pytest.mark.parametrize("place", ["~nobody-of-this-name/a", "./" + "a" * 5000, "b\\u0000c"])
def test_a_place_that_no_system_has_is_not_there(place: str) -> None:
    for line, code in (
        (f'student s = hf("{place}")', "E0501"),
        (f'teacher t = cached("{place}")', "E0437"),
        (f'import "{place}.gkd" as x', "E0512"),
        (f'import python "{place}.py" as x', "E0513"),
        (f'student s = hf("models/student") {{\n  adapter = peft("{place}")\n}}', "E0501"),
    ):
        assert code in codes(check(f"gkd 1\n{line}\n"))
