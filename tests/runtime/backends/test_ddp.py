"""What two processes tell each other, and what `ddp` makes the same in both."""

import json
import os
import socket
import time
import traceback

import pytest
import torch
from plans import models, stage_plan

from gkd_dsl.runtime.backends.base import Settings
from gkd_dsl.runtime.backends.ddp import DdpBackend
from gkd_dsl.runtime.processes import Processes
from gkd_dsl.runtime.step import StepModule

CPU = torch.device("cpu")


@pytest.fixture
def in_two(tmp_path, monkeypatch):
    """Runs a function of a `Processes` in two forked processes, and gives what it returned in each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def run(function):
        children = []
        for rank in (0, 1):
            child = os.fork()
            if not child:
                status = 1
                try:
                    (tmp_path / str(rank)).write_text(json.dumps(function(Processes(rank, 2, rank))))
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        return [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]

    return run


def test_what_processes_tell_each_other(in_two, tmp_path):
    def talk(processes):
        processes.join(CPU)
        rank, order = processes.rank, tmp_path / "order"
        found = {
            # More digits than fp32 has.
            "sum": processes.sum([2.0**24 if rank else 1.0, 0.5]),
            "any": [processes.any(rank == 1), processes.any(False), processes.any(True)],
            "told": processes.told(f"of {rank}"),
            "gathered": processes.gathered({"rank": rank}),
        }
        with processes.main_first():
            time.sleep(0.2 * (1 - rank))
            with order.open("a") as file:
                file.write(f"in {rank}\n")
        processes.wait()
        return found

    first, second = in_two(talk)
    assert first == second
    assert first["sum"] == [2.0**24 + 1.0, 1.0]
    assert first["any"] == [True, False, True]
    assert first["told"] == "of 0"
    assert first["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert (tmp_path / "order").read_text() == "in 0\nin 1\n"


def test_one_process_tells_itself():
    alone = Processes()
    assert alone.sum([1.0, 2.0]) == [1.0, 2.0]
    assert (alone.any(True), alone.any(False)) == (True, False)
    assert (alone.told("a"), alone.gathered("a")) == ("a", ["a"])
    with alone.main_first():
        alone.wait()


def test_all_start_from_the_weights_of_the_first_and_sum_gradients(in_two):
    def run(processes):
        backend = DdpBackend(Settings(device="cpu"), processes)
        step = StepModule(stage_plan(("hard", "hid")), models(seed=5 * processes.rank))
        backend.begin(step, step.plan.stage.optim)
        parameters = [parameter for _, parameter in step.trainable()]
        weights = [parameter.detach().double().sum().item() for parameter in parameters]
        # One has a gradient everywhere, one in the first process alone, one nowhere.
        for place, parameter in enumerate(parameters[:3]):
            if place == 0 or (place == 1 and processes.rank == 0):
                parameter.grad = torch.full_like(parameter, 1.0 + 2.0 * processes.rank)
        backend._join_gradients()
        return weights, [None if p.grad is None else p.grad.unique().tolist() for p in parameters[:3]]

    (weights, gradients), (others, same) = in_two(run)
    alone = StepModule(stage_plan(("hard", "hid")), models(seed=0))
    assert weights == others == [p.detach().double().sum().item() for _, p in alone.trainable()]
    assert gradients == same == [[4.0], [1.0], None]
