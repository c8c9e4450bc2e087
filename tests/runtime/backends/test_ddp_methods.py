"""Every method of the library gives in two processes the losses that it gives in one."""

import json

import numpy as np
import pytest
from ranks import CASES, HERE, losses, started


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """The losses of all methods at 4 rows (and 3), and of some at 2 (and 1: one process has none), on each rank."""
    out = tmp_path_factory.mktemp("ranks")
    some = ("kd", "minilm", "rl_kd", "lrc_bert", "mgskd")
    found = {}
    for rows, names in ((4, tuple(CASES)), (2, some)):
        processes = started(2, HERE / "ranks.py", out / str(rows), rows, "ddp", *names)
        assert [process.wait(300) for process in processes] == [0, 0]
        found[rows] = [json.loads((out / f"{rows}.{rank}").read_text()) for rank in (0, 1)]
    return found


def same(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_losses_of_one(in_two, name):
    first, second = in_two[4]
    assert first[name] == second[name]
    same(first[name], losses(name, 4, micro=1 + len(name) % 2))


@pytest.mark.parametrize("name", ["kd", "minilm", "rl_kd", "lrc_bert", "mgskd"])
def test_a_process_without_a_row_counts_nowhere(in_two, name):
    first, second = in_two[2]
    assert first[name] == second[name]
    same(first[name], losses(name, 2, micro=1 + len(name) % 2))
