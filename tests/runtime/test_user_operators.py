"""An operator in a Python file that raises ends in words, at the line that raised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plans import stage_plan

import gkd_dsl
from gkd_dsl.graph.nodes import SourceSpec
from gkd_dsl.models.describe import random_init
from gkd_dsl.runtime import rows
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.extensions import load_extensions
from gkd_dsl.runtime.models.load import load
from gkd_dsl.runtime.ops.registry import functions

OPS = """import gkd_dsl


@gkd_dsl.op("{name}(student: Float[..., H] <- teacher: Float[..., H]) -> Loss[...]")
def {name}(student, teacher, valid=None):
    {body}
    return (student - teacher).abs().mean(-1)
"""
SPEC = """gkd 1
import python "ops_{name}.py" as ops
teacher t = random_init("m")
student s = random_init("m")
data d = text("d.txt")
loss a = ops.{name}(s.final <- t.final)
stage main for 1 epoch {{ minimize a }}
"""


@pytest.fixture
def distiller_of(tmp_path: Path):
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    (tmp_path / "d.txt").write_text("one text\n" * 50)

    def make(name: str, body: str):
        (tmp_path / f"ops_{name}.py").write_text(OPS.format(name=name, body=body))
        models = {key: load(random_init(str(tmp_path / "m")), seed=seed) for seed, key in enumerate("ts")}
        return gkd_dsl.loads(SPEC.format(name=name), root=tmp_path).compile(**models)

    return make


def batch(padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    pad = (0, padding)
    return {
        "input_ids": torch.nn.functional.pad(ids, pad),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), pad),
    }


def test_what_it_raises_is_named_with_its_line(distiller_of) -> None:
    with pytest.raises(RunError) as caught:
        distiller_of("boom", 'raise ValueError("no such luck")')(batch())
    assert caught.value.code == "E0807"
    assert caught.value.message == "the operator `ops_boom.py:boom` raised ValueError: no such luck"
    assert caught.value.hint == "in line 6 of its file"


def test_it_is_run_in_full_precision_beside_forwards_in_half(distiller_of) -> None:
    distiller = distiller_of("apart", "import torch; assert not torch.is_autocast_enabled('cpu')")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(distiller(batch()))


def test_it_is_given_all_rows_and_gives_those_of_this_process(distiller_of, monkeypatch) -> None:
    """Its axes are `...`. The other process has the same row here, which stands for the exchange."""
    distiller = distiller_of("rows", "assert len(student) == len(teacher) == len(valid)")
    distiller.module.eval()
    row = {name: value[:1] for name, value in batch().items()}
    alone, counts = distiller(row), distiller.denominators([row])
    monkeypatch.setattr(rows, "whole", lambda value: torch.cat((value, value)))
    with rows.shared(rows.Share(1, (1, 1))):
        torch.testing.assert_close(distiller(row, counts), alone)


def test_memory_that_runs_out_stays_what_it_is(distiller_of) -> None:
    with pytest.raises(MemoryError):
        distiller_of("hungry", "raise MemoryError()")(batch())


def test_padding_does_not_count_whatever_it_gives_there(distiller_of) -> None:
    distiller = distiller_of("fine", 'student = student.masked_fill(~valid[..., None], float("nan"))')
    distiller.module.eval()
    short, padded = distiller(batch()), distiller(batch(padding=3))
    assert torch.isfinite(short)
    torch.testing.assert_close(padded, short)


@pytest.mark.parametrize("place", ["valid_program", "program", "metric", "source"])
def test_it_is_loaded_wherever_it_is_used(place: str, tmp_path: Path) -> None:
    plan = stage_plan(("hard",), metrics=("acc",))
    mine = [replace(item, op="gone.py:mine") for item in plan.valid_program[:1]]
    if place == "metric":
        plan = replace(plan, metrics=tuple(replace(item, program=(*item.program, *mine)) for item in plan.metrics))
    elif place == "source":
        plan = replace(plan, stage=replace(plan.stage, source=SourceSpec("rows", "gone.py:mine", ())))
    else:
        plan = replace(plan, **{place: (*getattr(plan, place), *mine)})
    with pytest.raises(RunError, match=r"`gone\.py:mine` cannot be used"):
        load_extensions(plan, tmp_path)


def test_a_file_without_the_operator_it_had(tmp_path: Path) -> None:
    (tmp_path / "ops.py").write_text("import gkd_dsl\n")
    plan = stage_plan(("hard",))
    plan = replace(plan, valid_program=tuple(replace(item, op="ops.py:mine") for item in plan.valid_program))
    with pytest.raises(RunError, match=r"ops\.py has no op `mine`; check the spec again: the file has changed"):
        load_extensions(plan, tmp_path)


def test_of_two_files_of_one_name_the_latest_is_run(tmp_path: Path) -> None:
    """Two specs in one session, or one whose file was changed in between."""
    plan = stage_plan(("hard",))
    plan = replace(plan, valid_program=tuple(replace(item, op="ops.py:mine") for item in plan.valid_program))
    for number in (1, 2):
        (tmp_path / f"{number}").mkdir()
        text = '@gkd_dsl.op("mine(x: Float[B]) -> Float[B]")\ndef mine(x):\n    return x * '
        (tmp_path / f"{number}" / "ops.py").write_text(f"import gkd_dsl\n\n\n{text}{number}\n")
        load_extensions(plan, tmp_path / f"{number}")
        assert functions()["ops.py:mine"](torch.ones(2)).tolist() == [number] * 2
