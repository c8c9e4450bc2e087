"""Planned memory against counted bytes, at small shapes; the benchmark has more of them, and larger ones."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def accuracy():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import plan_accuracy

        yield plan_accuracy
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    "name", ["BERT, attention taps", "BERT, 32 x 64 tokens, two micro-batches", "Llama, generalized JSD"]
)
def test_within_a_tenth(name, accuracy, tmp_path):
    case = next(case for case in accuracy.CASES if case.name == name)
    found = accuracy.measure(case, tmp_path, "cpu", accuracy.USUAL)
    assert found["ratio"] == pytest.approx(1, abs=accuracy.GOAL), found
