"""A run with a quantised teacher under Gemini, and in one plain process.

python packed_teacher.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "teachers"))

from stored_world import CLASSIFY, classifiers, run, spec  # noqa: E402

STILL = 'random_init("s", hidden_dropout_prob = 0.0, attention_probs_dropout_prob = 0.0)'
PACKED = 'hf("t") {\n  quantize = bitsandbytes(load_in_8bit = true, llm_int8_threshold = 0.0)\n}'
GEMINI = "backend = gemini\n  min_chunk_size_m = 0.001\n  search_range_m = 1"


def losses(folder, backend):
    text = CLASSIFY.replace('random_init("s")', STILL).replace('hf("t")', PACKED)
    text = text.replace("device = cpu", f"precision = bf16\n  {backend}")
    return [step["loss"] for step in run(spec(folder, text, OBJECTIVE="soft + hid", name="packed.gkd")).steps]


if __name__ == "__main__":
    from host_accelerator import install

    install()
    os.environ["GKD_CACHE"] = sys.argv[1]
    place = classifiers(Path(sys.argv[1]))
    print(json.dumps([losses(place, GEMINI), losses(place, "backend = local")]))
