"""`gkd run --processes N`: the processes of a run on this machine, started and watched."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

FAULT, STOPPED = 1, 130
_LOOK_EVERY = 0.1
# What a process is given to end by itself when another has failed, then when it was asked to.
_GRACE = 5.0
_SAID = 2000


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    said: IO[bytes] | None

    def how(self) -> str:
        """How it ended, in words."""
        code = self.process.returncode
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def last_words(self) -> str:
        """The end of what it wrote to standard error; that of the first process is on the screen already."""
        if self.said is None:
            return ""
        self.said.seek(0)
        return self.said.read()[-_SAID:].decode("utf-8", "replace").strip()


def launch(arguments: Sequence[str], count: int) -> tuple[int, str]:
    """Run `gkd` with these arguments in `count` processes: the exit code, and what to tell of a process that failed.

    The first one has this terminal. When one fails the others are stopped within seconds. SIGINT and SIGTERM are
    passed on, so that all finish their step and save.
    """
    port = _free_port()
    children = [_start(arguments, rank, count, port) for rank in range(count)]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hand_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    for number in before:
        signal.signal(number, hand_on)
    try:
        return _watch(children)
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()
            if child.said is not None:
                child.said.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(arguments: Sequence[str], rank: int, count: int, port: int) -> _Child:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    said = tempfile.TemporaryFile() if rank else None  # noqa: SIM115 - read when the process has failed
    process = subprocess.Popen(
        [sys.executable, "-c", "from gkd_dsl.cli.main import main; main()", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL if rank else None,
        stderr=said,
        # A key that interrupts the terminal reaches this process alone, which hands it on once.
        start_new_session=True,
    )
    return _Child(rank, process, said)


def _watch(children: list[_Child]) -> tuple[int, str]:
    failed: list[_Child] = []
    while True:
        codes = [child.process.poll() for child in children]
        failed = [child for child, code in zip(children, codes, strict=True) if code not in (None, 0, STOPPED)]
        if failed or None not in codes:
            break
        time.sleep(_LOOK_EVERY)
    if not failed:
        return (STOPPED if STOPPED in codes else 0), ""
    # One that a signal ended is the cause; what the others say then follows from it.
    _end(children)
    first = next((child for child in failed if child.process.returncode < 0), failed[0])
    told = f"process {first.rank} of {len(children)} {first.how()}, and the others were stopped"
    words = first.last_words()
    told = f"{told}; it said:\n{words}" if words else told
    if first.process.returncode < 0:
        return FAULT, f"{told}\n   = the last checkpoint is whole: go on with `--resume`"
    return FAULT, f"{told}\n   = mend what it said; `--resume` goes on where a checkpoint is"


def _end(children: list[_Child]) -> None:
    """Let the processes end by themselves for a moment, then end them."""
    for ask in (None, subprocess.Popen.terminate, subprocess.Popen.kill):
        running = [child for child in children if child.process.poll() is None]
        if ask is not None:
            for child in running:
                ask(child.process)
        until = time.monotonic() + _GRACE
        while time.monotonic() < until and any(child.process.poll() is None for child in running):
            time.sleep(_LOOK_EVERY)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def arguments_of(
    spec: str, params: dict[str, str], *, out: Path | None, resume: bool, offline: bool, json: bool
) -> list[str]:
    """The arguments of `gkd run` again, for each process."""
    found = ["run", spec, *(part for key, value in params.items() for part in ("--set", f"{key}={value}"))]
    found += ["--out", str(out)] if out is not None else []
    return found + [word for word, on in (("--resume", resume), ("--offline", offline), ("--json", json)) if on]
