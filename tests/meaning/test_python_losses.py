"""A loss written in Python counts as those of the language do: valid tokens, narrowed by `mask`."""

from __future__ import annotations

import json

import pytest

from gkd_dsl.graph.access import inputs
from gkd_dsl.meaning.check import check_text

OPS = """
import gkd_dsl

@gkd_dsl.op("far(student: Float[..., H] <- teacher: Float[..., H]) -> Loss[...]")
def far(student, teacher):
    return (student - teacher).abs().mean(-1)
"""
SPEC = """gkd 1
import python "ops.py" as ops
teacher t = hf("m")
student s = truncated(t, layers = [0])
data d = text("d.txt")
loss a = {call}
stage main for 1 epoch {{ minimize a }}
"""


@pytest.fixture
def root(tmp_path):
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    (tmp_path / "ops.py").write_text(OPS)
    (tmp_path / "d.txt").write_text("one text\n" * 50)
    return tmp_path


def counted(root, call):
    checked = check_text(SPEC.format(call=call), root=root)
    assert [d.message for d in checked.diagnostics.errors] == []
    graph = checked.graph
    (key,) = [key for key in graph if key.startswith("op/far")]
    valid = inputs(graph, key).get("valid")
    return graph.nodes[valid]["node"].op if valid is not None else None


@pytest.mark.parametrize(
    ("call", "op"),
    [
        ("ops.far(s.final <- t.final)", "valid_tokens"),
        ("ops.far(s.final <- t.final, mask = batch.input_ids != 5)", "and"),
        ("ops.far(s.cls <- t.cls)", None),
    ],
)
def test_positions_that_count(root, call, op):
    assert counted(root, call) == op
