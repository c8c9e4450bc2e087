import json
import re
from pathlib import Path

import pytest

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.meaning.check import check_text

CONFIGS = json.loads((Path(__file__).parents[1] / "models" / "tiny.json").read_text())


@pytest.fixture
def save(tmp_path):
    """Write a family's tiny config.json, with changes, to a folder."""

    def write(family, name=None, **changes):
        config = {**CONFIGS.get(family, {"model_type": family}), **changes}
        folder = tmp_path / (name or family)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


SPEC = """gkd 1
teacher t = {teacher}
student s = {student}
param rows: text "rows"
data d = text(rows)
loss soft = {loss}
stage main for 10 steps {{
  minimize soft
  source = d
  batch_size = 8
  accumulate = 4
  max_length = 64
{stage}
}}
runtime {{
{runtime}
}}
"""
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 2000, "hidden_size": 64,
    "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def compiled(tmp_path):
    """The plan of a spec of two Llamas, of 8 and of 2 blocks, with a runtime block; its check has no errors."""
    for name, layers in (("t", 8), ("s", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": layers}))

    def made(runtime="", loss="kl(s.logits <- t.logits)", teacher='hf("t")', student='hf("s")', stage="", **settings):
        text = SPEC.format(runtime=runtime, loss=loss, teacher=teacher, student=student, stage=stage)
        for name, value in settings.items():
            text = re.sub(rf"{name} = \d+", f"{name} = {value}", text)
        checked = check_text(text, "spec.gkd", root=tmp_path)
        assert checked.ok, [diagnostic.message for diagnostic in checked.diagnostics]
        assert not checked.later
        return compile_plan(checked.graph, runtime=checked.runtime)

    return made
