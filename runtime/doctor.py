"""What a run needs of the machine: versions, devices, space, caches."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_NEEDED_SPACE = 2_000_000_000
_TRIED = "0.5.0"
_BESIDE = ("psutil", "accelerate", "peft", "einops", "galore_torch", "bitsandbytes")
_GEMINI = f"pip install --no-deps colossalai=={_TRIED} {' '.join(_BESIDE)}"
_VERSIONS = ("torch", "transformers", "datasets", "lark", "networkx", "safetensors", "huggingface_hub", "tensorboard")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `ok` is False where something has to be done; `fix` says what."""

    name: str
    ok: bool
    detail: str
    fix: str | None = None


def diagnose() -> list[Finding]:
    """Look at this machine and installation; never raises."""
    looks: list[Callable[[], list[Finding]]] = [
        _python,
        _packages,
        _devices,
        _threads,
        _working_folder,
        _caches,
        _offline,
        _colossalai,
    ]
    found: list[Finding] = []
    for look in looks:
        try:
            found += look()
        except Exception as error:
            # A broken installation is what the doctor is for: say which look failed and go on.
            name = look.__name__.strip("_").replace("_", " ")
            detail = f"it could not be looked at: {type(error).__name__}: {error}"
            found.append(Finding(name, False, detail, "repair what it names, then look again"))
    return found


def _python() -> list[Finding]:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    fine = sys.version_info >= (3, 11)
    return [Finding("python", fine, detail, None if fine else "gkd-dsl needs Python 3.11 or later")]


def _packages() -> list[Finding]:
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in metadata.requires("gkd-dsl") or ()]
    except metadata.PackageNotFoundError:
        return [Finding("gkd-dsl", False, "the package is not installed", "pip install -e . in its folder")]
    found = [Finding("gkd-dsl", True, metadata.version("gkd-dsl"))]
    ranges = {need.name.lower().replace("-", "_"): need for need in needed if need.marker is None}
    order = [name for name in _VERSIONS if name in ranges] + [name for name in ranges if name not in _VERSIONS]
    for name in order:
        need = ranges[name]
        asked = str(need.specifier)
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            found.append(Finding(name, False, f"not installed, {asked} is needed", f'pip install "{need}"'))
            continue
        fine = need.specifier.contains(version, prereleases=True)
        detail = f"{version} ({asked})"
        found.append(Finding(name, fine, detail, None if fine else f'pip install "{need.name}{asked}"'))
    return found


def _devices() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        found = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            detail = f"{torch.cuda.get_device_name(number)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            found.append(Finding(f"gpu {number}", True, detail))
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        detail = "in hardware" if real else "emulated only: slow on this device"
        return [*found, Finding("bf16", True, detail, None if real else "leave `precision = fp32`")]
    if torch.backends.mps.is_available():
        cpu = "works, and is not faster than fp32"
        return [Finding("gpu", True, "an Apple GPU, which is not used: runs go on the CPU"), Finding("bf16", True, cpu)]
    capability = torch.backends.cpu.get_cpu_capability()
    found = [Finding("gpu", True, "none is seen; runs go on the CPU")]
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        fix = "install a CUDA build of torch: https://pytorch.org/get-started"
        found = [Finding("gpu", False, "an NVIDIA driver is here, and this torch is built without CUDA", fix)]
    fast = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    detail = f"CPU ({capability}): {'in hardware' if fast else 'works, and is not faster than fp32'}"
    return [*found, Finding("bf16", True, detail)]


def _threads() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    threads = torch.get_num_threads()
    told = f"torch uses {threads} of {cores} core{'s' if cores != 1 else ''}"
    variable = os.environ.get("OMP_NUM_THREADS")
    if variable:
        told += f" (OMP_NUM_THREADS = {variable})"
    if threads > cores:
        return [Finding("cpu threads", False, told, f"more threads than cores slow a run: OMP_NUM_THREADS={cores}")]
    return [Finding("cpu threads", True, told)]


def _working_folder() -> list[Finding]:
    folder = Path.cwd()
    found = [_writable("working folder", folder, "change to a folder that you may write to")]
    free = shutil.disk_usage(folder).free
    fine = free >= _NEEDED_SPACE
    fix = None if fine else "checkpoints and exports need room: free some, or work on another disk"
    return [*found, Finding("disk space", fine, f"{free / 1e9:.1f} GB free here", fix)]


def _caches() -> list[Finding]:
    from huggingface_hub import constants

    from gkd_dsl.runtime.data.quiet import cache_folder

    hub = Path(constants.HF_HUB_CACHE)
    found = [_writable("hub cache", hub, "set HF_HOME to a folder that you may write to")]
    ours = cache_folder()
    asked = os.environ.get("GKD_CACHE")
    if asked and not ours.is_relative_to(Path(asked).expanduser()):
        detail = f"{asked} cannot be written, {ours} is used"
        return [*found, Finding("data cache", False, detail, "set GKD_CACHE to a folder that you may write to")]
    return [*found, Finding("data cache", True, str(ours))]


def _offline() -> list[Finding]:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    on = [name for name in names if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    told = f"on ({', '.join(on)}): hub models and data must be in the cache" if on else "off"
    return [Finding("offline mode", True, told)]


def _colossalai() -> list[Finding]:
    purpose = "the gemini backend, which spreads a model over several GPUs"
    if importlib.util.find_spec("colossalai") is None:
        return [Finding("colossalai", True, f"not installed; optional, for {purpose}: {_GEMINI}")]
    version = metadata.version("colossalai")
    missing = [name for name in _BESIDE if importlib.util.find_spec(name) is None]
    if missing:
        told = f"{version}, and {', '.join(missing)} missing"
        return [Finding("colossalai", False, told, f"pip install --no-deps {' '.join(missing)}")]
    found = [Finding("colossalai", True, f"{version}, for {purpose}")]
    if version != _TRIED:
        told = f"{version}; {_TRIED} is what was tried"
        found = [Finding("colossalai", False, told, f"pip install --no-deps colossalai=={_TRIED}")]
    from gkd_dsl.runtime.backends.gemini import kernels

    return [*found, Finding("gemini's AdamW", True, kernels())]


def _writable(name: str, folder: Path, fix: str) -> Finding:
    """Whether a file can be made in a folder, or the folder itself where it does not exist yet."""
    place = folder
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Finding(name, False, f"{folder} cannot be written: {error.strerror or error}", fix)
    made = "" if place == folder else ", made when it is needed"
    return Finding(name, True, f"{folder}{made}")
