"""The processes of a run: which one this is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gkd_dsl.runtime.errors import CANNOT_RUN, RunError
from gkd_dsl.runtime.rows import collective

T = TypeVar("T")
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# One process may read and tokenise data for as long, while the others wait.
_PATIENCE = timedelta(hours=4)
# Before that they only have to be started.
_MEETING = timedelta(minutes=15)


@dataclass(frozen=True)
class Processes:
    """This process is number `rank` of `count`, and number `local` on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Processes:
        """As the launcher (`gkd run --processes`, torchrun, colossalai run) says in the environment.

        Raises RunError where the environment is incomplete or makes no sense.
        """
        if (_number("WORLD_SIZE") or 1) == 1:
            return cls()
        missing = [name for name in _NEEDED if not os.environ.get(name)]
        if missing:
            hint = "start it by `gkd run --processes N` or torchrun"
            raise RunError(CANNOT_RUN, f"WORLD_SIZE is set, and {missing[0]} is not", hint)
        rank, count, local = (_number(name) or 0 for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if rank >= count:
            hint = f"processes are numbered from 0 to {count - 1}"
            raise RunError(CANNOT_RUN, f"RANK in the environment is {rank}, and WORLD_SIZE is {count}", hint)
        return cls(rank, count, local if os.environ.get("LOCAL_RANK") else rank)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the others: gloo between CPUs, NCCL between GPUs. Once is enough."""
        if dist.is_initialized():
            return
        transport = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A process that is alone needs no address.
        store = dist.HashStore() if self.count == 1 else self._meet()
        with collective():
            dist.init_process_group(transport, rank=self.rank, world_size=self.count, timeout=_PATIENCE, store=store)

    def _meet(self) -> Any:
        """The store over which the processes find each other. Raises RunError where they do not."""
        try:
            store, *_ = next(dist.rendezvous("env://", self.rank, self.count, timeout=_MEETING))
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            why = str(error).strip().partition("\n")[0]
            raise RunError(
                CANNOT_RUN,
                f"process {self.rank} of {self.count} cannot meet the others at {place}: {why}",
                "start all of them, under an address that all of them reach and a MASTER_PORT that nothing else has",
            ) from error
        store.set_timeout(_PATIENCE)
        return store

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.sum([float(flag)])[0] > 0.0) if self.count > 1 else flag

    def sum(self, numbers: list[float]) -> list[float]:
        """Sums over all processes, in fp64."""
        if self.count == 1:
            return numbers
        held = torch.tensor(numbers, dtype=torch.float64)
        with collective():
            dist.all_reduce(held)
        return held.tolist()

    def told(self, value: T) -> T:
        """What the main process has there, on every process."""
        if self.count == 1:
            return value
        held: list[Any] = [value if self.main else None]
        with collective():
            dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def gathered(self, value: T) -> list[T]:
        """What each process has there, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with collective():
            # Objects travel by the CPU on every transport.
            dist.all_gather_object(found, value, group=_on_cpu())
        return found

    def wait(self) -> None:
        """Until all have come here."""
        self.any(False)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through first, the others after it."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


def _number(name: str) -> int | None:
    """A number of the environment; None where it is not said. Raises RunError for what is no number."""
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        hint = "start it by `gkd run --processes N` or torchrun"
        raise RunError(CANNOT_RUN, f"{name} in the environment is {text!r}, and has to be a number", hint)
    return int(text)


_CPU_GROUP: list[Any] = []


def _on_cpu() -> Any:
    """A group whose objects travel over gloo; made once, by all processes."""
    if dist.get_backend() == "gloo":
        return None
    if not _CPU_GROUP:
        _CPU_GROUP.append(dist.new_group(backend="gloo", timeout=_PATIENCE))
    return _CPU_GROUP[0]
