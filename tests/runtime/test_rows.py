"""Rows of a micro-batch over processes, and which process this is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkd_dsl.ops.registry import specs
from gkd_dsl.runtime import rng
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.processes import Processes
from gkd_dsl.runtime.program import _batch_slots, _relates
from gkd_dsl.runtime.rows import Share, collective, current, own, shared, whole


@given(rows=st.integers(1, 40), count=st.integers(1, 9))
def test_every_row_is_of_one_process(rows, count):
    shares = [Share.of(rows, rank, count) for rank in range(count)]
    taken = [row for share in shares if not share.idle for row in range(rows)[share.rows]]
    assert taken == list(range(rows))
    sizes = [len(range(rows)[share.rows]) for share in shares]
    assert max(sizes) - min(size for size, share in zip(sizes, shares, strict=True) if not share.idle) <= 1
    # One without a row computes with the last.
    assert all(list(range(rows)[share.rows]) == [rows - 1] for share in shares if share.idle)


def test_outside_a_share_rows_are_all_there():
    value = torch.arange(4.0)
    assert current() is None
    assert whole(value) is value
    assert own(value) is value
    with shared(Share.of(4, 1, 2)):
        assert own(value).tolist() == [2.0, 3.0]
    assert current() is None


def test_operators_that_relate_rows_are_known():
    found = {spec.name for spec in specs() if _relates(spec.name)}
    assert found == {
        "contrastive", "sample_relation_kl", "sample_angle", "rank_bin", "roll", "random_spans", "random_segment_starts",
    }  # fmt: skip
    assert all(_batch_slots(name) is None for name in found)


def test_an_exchange_that_fails_says_what_it_means():
    with pytest.raises(RunError, match="another process of this run has ended") as raised, collective():
        raise RuntimeError("Connection closed by peer")
    assert raised.value.code == "E0807"
    assert "--resume" in raised.value.hint


def test_which_process_this_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.here() == Processes(0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RunError, match="WORLD_SIZE is set, and RANK is not"):
        Processes.here()
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Processes.here() == Processes(3, 4, 1)
    assert not Processes.here().main


def test_generators_of_all_processes_are_kept_and_a_new_one_is_seeded():
    before = rng.get_state()
    try:
        states = []
        for rank in (0, 1):
            rng.seed_all(7, rank)
            states.append(rng.get_state())
        drawn = [torch.rand(3)]
        kept = rng.together(states)
        found = []
        for rank in (0, 1, 2):
            rng.set_states(kept, rank, 11)
            found.append(torch.rand(3))
        assert torch.equal(found[1], drawn[0])
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[2], found[1])
        rng.seed_all(11, 2)
        assert torch.equal(torch.rand(3), found[2])
    finally:
        rng.set_state(before)
