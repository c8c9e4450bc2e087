"""Chunks as the plan packs them, beside those that ColossalAI makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gkd_dsl.models.describe import describe
from gkd_dsl.planning.chunks import chunks
from gkd_dsl.planning.parameters import parameters

pytestmark = pytest.mark.gemini
SCRIPT = Path(__file__).parent / "packed_by_gemini.py"
WIDE = {
    "bert": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 4,
             "vocab_size": 3000},
    "llama": {"hidden_size": 96, "intermediate_size": 300, "num_hidden_layers": 5, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 4000, "head_dim": 24},
}  # fmt: skip


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("llama", "causal_lm")])
@pytest.mark.parametrize(("least", "reach"), [(0.01, 0.1), (0.05, 0.02), (0.2, 1.0), (32.0, 32.0)])
def test_they_are_those_of_gemini(family, task, least, reach, save):
    folder = save(family, **WIDE[family])
    words = [sys.executable, str(SCRIPT), folder, task, str(least), str(reach)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert not done.returncode, done.stderr[-2000:]
    total, largest, times = json.loads(done.stdout.splitlines()[-1])
    found = chunks(parameters(describe(folder, task=task)), round(least * 2**20), round(reach * 2**20))
    # Of sizes that waste as little the plan may take another.
    assert found.total == pytest.approx(total, rel=0.03)
    assert found.largest == pytest.approx(largest, rel=0.25)
    if total > least * 2**20:
        assert found.times == pytest.approx(times, rel=0.25)
