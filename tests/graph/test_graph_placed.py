"""What `explain` says of fused losses is what the runtime block leaves of them."""

import pytest
from graph_help import write_llamas

from gkd_dsl.graph.explain import explain
from gkd_dsl.meaning.check import check_text

SPEC = """gkd 1
teacher t = hf("t")
student s = hf("s")
data d = csv("rows.csv", text = "text")
loss soft = kl(s.logits <- t.logits)
loss next = cross_entropy(s.logits, batch.labels)
stage main for 10 steps {
  minimize soft + next
}
runtime {
  RUNTIME
}
"""
KEPT = 'teacher t {\n placement = cached\n cache = "kept"\n top_k = %d\n}'


@pytest.mark.parametrize(
    ("runtime", "heads"),
    [
        ("precision = fp32", [("s", "t")]),
        ("fuse_logits = off", []),
        ("teacher t { placement = offload }", [("s", "t")]),
        ("teacher t { placement = disk }", [("s", "t")]),
        ("backend = gemini\n teacher t { placement = gemini }", [("s",)]),
        (KEPT % 0, [("s",)]),
        (KEPT % 5, [("s",)]),
    ],
)
def test_heads_that_run_with_the_losses(runtime, heads, tmp_path):
    assert fused(SPEC.replace("RUNTIME", runtime), tmp_path) == heads


@pytest.mark.parametrize(
    ("how", "heads"),
    [
        ("bitsandbytes(load_in_8bit = true)", [("s", "t")]),
        ('bitsandbytes(load_in_8bit = true, llm_int8_skip_modules = ["lm_head"])', [("s", "t")]),
        ('bitsandbytes(load_in_8bit = true, llm_int8_skip_modules = ["q_proj"])', [("s",)]),
    ],
)
def test_a_head_that_is_quantised_is_not_run_with_them(how, heads, tmp_path):
    text = SPEC.replace('hf("t")', f'hf("t") {{\n  quantize = {how}\n}}').replace("RUNTIME", "precision = bf16")
    assert fused(text, tmp_path) == heads


def fused(text, tmp_path):
    write_llamas(tmp_path)
    checked = check_text(text, "placed.gkd", root=tmp_path)
    assert [d.message for d in checked.diagnostics.errors] == []
    (stage,) = explain(checked.graph, runtime=checked.runtime).stages
    return [row.models for row in stage.fused]
