"""Random numbers: seeding, and the state of every generator that a run draws from."""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy, torch and every GPU; each process of a run draws other numbers."""
    seed = (seed + rank * 1_000_003) % 2**63
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_state() -> dict[str, Any]:
    """The state of every generator, as what JSON can hold."""
    version, inner, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(inner), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(torch.cuda.get_rng_state(device)) for device in _gpus()],
    }


def together(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all processes as one: that of the first, and the others in it."""
    return {**states[0], "others": list(states[1:])} if len(states) > 1 else states[0]


def set_states(state: dict[str, Any], rank: int, seed: int) -> None:
    """Put the generators of one process back; a process that was not there is seeded anew."""
    others = state.get("others", [])
    if rank > len(others):
        seed_all(seed, rank)
    else:
        set_state(others[rank - 1] if rank else state)


def set_state(state: dict[str, Any]) -> None:
    """Put every generator back; GPUs that the state does not know are left alone."""
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    for device, saved in zip(_gpus(), state["cuda"], strict=False):
        torch.cuda.set_rng_state(_tensor(saved), device)


def _gpus() -> list[int]:
    """The GPUs of this process: its own where there are several processes."""
    if not torch.cuda.is_available():
        return []
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return [torch.cuda.current_device()] if together else list(range(torch.cuda.device_count()))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
