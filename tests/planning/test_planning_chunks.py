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
CONFIGS = json.loads((Path(__file__).parents[1] / "models" / "tiny.json").read_text())
WIDE = {
    "bert": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 4,
             "vocab_size": 3000},
    "llama": {"hidden_size": 96, "intermediate_size": 300, "num_hidden_layers": 5, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 4000, "head_dim": 24},
}  # fmt: skip


TASKS = {"bert": "masked_lm", "llama": "causal_lm"}
SEARCHES = [(0.01, 0.1), (0.05, 0.02), (0.2, 1.0), (32.0, 32.0)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder of each family, and what ColossalAI makes of it in each search."""
    root = tmp_path_factory.mktemp("chunks")
    for family, sizes in WIDE.items():
        (root / family).mkdir()
        (root / family / "config.json").write_text(json.dumps({**CONFIGS[family], **sizes}))
    cases = [(family, *search) for family in TASKS for search in SEARCHES]
    jobs = [(str(root / family), TASKS[family], *search) for family, *search in cases]
    words = [sys.executable, str(SCRIPT), json.dumps(jobs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-2000:]
    return root, dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("search", SEARCHES)
def test_they_are_those_of_gemini(family, search, found):
    root, made = found
    total, largest, times = made[family, *search]
    least, reach = (round(size * 2**20) for size in search)
    planned = chunks(parameters(describe(str(root / family), task=TASKS[family])), least, reach)
    # Of sizes that waste as little the plan may take another.
    assert planned.total == pytest.approx(total, rel=0.03)
    assert planned.largest == pytest.approx(largest, rel=0.25)
    if total > least:
        assert planned.times == pytest.approx(times, rel=0.25)
