"""A check loads neither torch nor transformers, and runs none of the user's Python."""

from __future__ import annotations

import json
import subprocess
import sys

from meaning_help import GOLDEN

TEXT = """gkd 1

import "gkd:tinybert" use tinybert
import python "E0513/ops.py" as ops

param T: float = 2.0 in 1.0 ..= 20.0

teacher t = hf("models/teacher")
student s = hf("models/student")
data reviews = csv("data/reviews.csv", text = "text", label = "label")
use tinybert(t -> s, T = T) as tb
loss extra = ops.soft(s.logits <- t.logits)
metric acc = accuracy(s.logits, batch.labels)

stage main for 3 epochs {
  minimize tb.total + extra
  evaluate acc every 100 steps
}
"""

CODE = f"""
import json, sys
from pathlib import Path
from gkd_dsl.meaning.check import check_text
checked = check_text({TEXT!r}, root=Path({str(GOLDEN)!r}))
heavy = ("torch", "transformers", "datasets", "numpy", "scipy", "tokenizers", "safetensors", "pandas", "ops")
print(json.dumps([[d.message for d in checked.diagnostics], [name for name in heavy if name in sys.modules]]))
"""


def test_check_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [[], []]
