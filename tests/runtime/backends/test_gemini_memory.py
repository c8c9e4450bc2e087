"""Memory that runs out under Gemini: what its chunks hold, what the plan is, what to change."""

import re
import subprocess

import pytest
from forked import GEMINI
from ranks import HERE, started
from small_folders import write

pytestmark = pytest.mark.gemini
SPEC = """gkd 1
teacher t = hf("./t", num_labels = 3)
student s = hf("./s", num_labels = 3)
data d = csv("rows.csv", text = "text", label = "label")
loss soft = kl(s.logits <- t.logits)
stage main for 3 steps {
  batch_size = 4
  max_length = 12
  minimize soft
}
runtime {
  backend = gemini
  offload_optim_frac = 1.0
  min_chunk_size_m = 0.001
  search_range_m = 1
}
"""


def test_a_step_that_finds_no_memory(tmp_path):
    write(tmp_path)
    (tmp_path / "a.gkd").write_text(SPEC)
    process, *_ = started(
        1, HERE / "gemini_full.py", "run", "a.gkd", "--offline", "--out", "run", cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, modules=GEMINI,
    )  # fmt: skip
    said = " ".join(process.communicate(timeout=300)[0].split())
    assert process.returncode
    assert "E0803" in said
    assert "too little memory for a micro-batch of 4 texts of " in said
    assert re.search(r"alive were chunks on the device [\d.]+ \wiB, in the host [\d.]+", said), said
    assert "the plan is " in said
    # The moments and masters of the student, in the host as the runtime block says.
    assert "and in the host optimizer " in said
    assert "Traceback" not in said
