"""Specs run one after the other in one of several processes.

python stored_ranks.py OUT SPEC...   under RANK and WORLD_SIZE
"""

import json
import os
import sys
from pathlib import Path

from stored_world import run


def losses(paths):
    """Every step's loss and terms, and the metrics, of each spec."""
    return [[found.steps, found.metrics] for found in map(run, paths)]


if __name__ == "__main__":
    out, *specs = sys.argv[1:]
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(losses([Path(spec) for spec in specs])))
