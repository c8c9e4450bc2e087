"""Processes that do not find each other say so, in bounded time."""

import socket
from datetime import timedelta

import pytest
import torch

from gkd_dsl.runtime import processes
from gkd_dsl.runtime.errors import RunError
from gkd_dsl.runtime.processes import Processes


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    """Not in a group that another test of this process made."""
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: False)


@pytest.fixture
def port(monkeypatch):
    """A port that something else listens at, as MASTER_PORT."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        yield taken.getsockname()[1]


def refused(rank):
    with pytest.raises(RunError) as raised:
        Processes(rank, 2, rank).join(torch.device("cpu"))
    assert raised.value.code == "E0807"
    assert "MASTER_PORT" in raised.value.hint
    return raised.value.message


def test_a_port_that_is_taken(port):
    said = refused(0)
    assert said.startswith(f"process 0 of 2 cannot meet the others at 127.0.0.1:{port}: ")
    assert "EADDRINUSE" in said


def test_the_others_do_not_come(monkeypatch):
    monkeypatch.setattr(processes, "_MEETING", timedelta(seconds=1))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    assert "1/2 clients joined" in refused(0)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_number_that_is_none(name, monkeypatch):
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", name: "many"}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RunError, match=f"{name} in the environment is 'many', and has to be a number"):
        Processes.here()


@pytest.mark.parametrize("rank", ["2", "7"])
def test_a_process_beyond_the_last(rank, monkeypatch):
    for key, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RunError, match=f"RANK in the environment is {rank}, and WORLD_SIZE is 2"):
        Processes.here()


def test_what_a_launcher_says(monkeypatch):
    for key, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert Processes.here() == Processes(3, 4, 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Processes.here() == Processes(3, 4, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Processes.here() == Processes()
