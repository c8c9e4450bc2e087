"""A quantised teacher beside a student in Gemini's chunks."""

import json
import subprocess

import pytest
from forked import GEMINI
from ranks import HERE, started

pytestmark = pytest.mark.gemini


def test_losses_are_those_of_one_plain_process(tmp_path):
    (process,) = started(1, HERE / "packed_teacher.py", tmp_path, stdout=subprocess.PIPE, modules=GEMINI)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    gemini, local = json.loads(out.splitlines()[-1])
    assert len(gemini) == len(local) == 12
    # Gemini rounds the student's weights to bf16, autocast its products alone.
    assert gemini == pytest.approx(local, rel=2e-2)
    assert gemini != local
