"""The machine to plan for: as it is given, or the one this runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gkd_dsl.planning.units import in_bytes

LINK = 25e9
"""Bytes a second between host and device where nothing is said: a PCIe 4 slot of 16 lanes, as it is reached."""

DISK = 5e9
"""Bytes a second from a disk where nothing is said."""

COMPUTE = {"cuda": 300e12, "cpu": 0.1e12}
"""Operations a second of a device where nothing is said."""


@dataclass(frozen=True)
class Machine:
    """Devices of one host.

    devices        how many are used
    device_memory  bytes of each
    host_memory    bytes of the host; on a machine without a GPU both are the same memory
    link           bytes a second between the host and each device
    compute        operations a second of each device
    between        bytes a second from a device to the others
    disk           bytes a second from the disk, for all devices together
    kind           `cuda`, or `cpu`
    """

    devices: int
    device_memory: int
    host_memory: int
    link: float = LINK
    compute: float = COMPUTE["cuda"]
    kind: Literal["cuda", "cpu"] = "cuda"
    between: float = LINK
    disk: float = DISK

    def __str__(self) -> str:
        if self.kind == "cpu":
            return f"the CPU, {in_bytes(self.host_memory)}"
        devices = f"{self.devices} devices of" if self.devices > 1 else "1 device of"
        return f"{devices} {in_bytes(self.device_memory)}, host {in_bytes(self.host_memory)}"


def this_machine() -> Machine:
    """The machine this runs on: its GPUs as `nvidia-smi` lists them, else its CPU."""
    host = _host_memory()
    found = _gpus()
    if found:
        return Machine(len(found), min(found), host)
    return Machine(1, host, host, compute=COMPUTE["cpu"], kind="cpu")


def _host_memory() -> int:
    """Bytes of memory: of the control group where it is less than the machine's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def _gpus() -> list[int]:
    """Bytes of each GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    words = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) * 2**20 for line in done.stdout.split() if line.isdigit()]
