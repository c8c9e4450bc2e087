"""Checkpoints: written whole or not at all, and read back bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from gkd_dsl.runtime.errors import CHECKPOINT, RunError, writing

FORMAT = 1
_STATE, _SPEC, _OPTIMIZER, _PROJECTIONS = "state.json", "spec.json", "optimizer.safetensors", "projections.safetensors"
_MODEL, _POLICIES = "model.{}.safetensors", "policies.safetensors"
_KEEP = 2


@dataclass
class Position:
    """Where a run is: `step` steps of stage `stage` (number `order`) are done, and `batch` micro-batches of `epoch`.

    `best` is the best value of the stage's chosen metric so far, `best_step` the step that gave it. `finished`
    says that the stage is over. `counters` and `recent` are the state of the stage's counters.
    """

    stage: str
    order: int
    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    total_steps: int = 0
    best: float | None = None
    best_step: int | None = None
    finished: bool = False
    counters: dict[str, int] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class State:
    """What a checkpoint holds.

    models       tensors of each model by its name in the spec
    projections  tensors by `name/weight`
    optimizer    tensors by `what/parameter`
    rng          see `rng.get_state`
    spec         the fields of the plan, see `fingerprint`
    policies     all of the state of each policy, by `name/what/parameter`
    """

    position: Position
    models: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    projections: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    rng: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, str] = field(default_factory=dict)
    policies: dict[str, Tensor] = field(default_factory=dict)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers of a module by name; a tensor that has two names is there once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach()
    return found


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy saved tensors into a module, in place. Raises RunError where names or shapes differ."""
    own = module_tensors(module)
    odd = sorted(own.keys() ^ tensors.keys())
    odd += [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if odd:
        raise RunError(CHECKPOINT, f"the checkpoint does not fit {what}: `{odd[0]}` differs")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


class Checkpoints:
    """The checkpoints of a run, in one folder, with the pointers `last` and `best` beside it.

    A pointer is a text file that holds the path of a checkpoint relative to the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / "checkpoints"

    def save(self, state: State, *, best: bool = False) -> Path:
        """Write a checkpoint and point `last` (and `best`) at it; older ones beyond two and the best go.

        Until its name appears nothing refers to it, so a failure at any moment leaves the earlier ones whole.
        Raises RunError.
        """
        position = state.position
        name = f"{position.stage.replace('/', '.')}-{position.step}"
        target, work = self.folder / name, self.folder / f".{name}.{os.getpid()}"
        last = self.pointed("last")
        whole = f"then go on with `--resume`: the checkpoint {last.name} is whole" if last is not None else ""
        kept = whole or "no checkpoint is there yet"
        try:
            with writing("a checkpoint", self.folder, kept):
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                _write(work, state)
                if target.exists():
                    # Left over from a run that was killed after this step, or the same step saved once more.
                    aside = self.folder / f".old.{name}.{os.getpid()}"
                    os.replace(target, aside)
                    os.replace(work, target)
                    shutil.rmtree(aside, ignore_errors=True)
                else:
                    os.replace(work, target)
                _sync(self.folder)
                # `last` comes second: a run that ends between the two does this step again, and finds its best anew.
                if best:
                    self._point("best", target)
                self._point("last", target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._tidy(target)
        return target

    def pointed(self, name: str) -> Path | None:
        """The checkpoint that `last` or `best` names; None where there is none.

        Where `last` names none, as after a kill before it was written or in a copy that lacks it, it is the newest.
        """
        try:
            text = (self.run / name).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            text = ""
        path = self.run / text
        if text and (path / _STATE).is_file():
            return path
        return self._newest() if name == "last" else None

    def _newest(self) -> Path | None:
        """The checkpoint that is the furthest in the run, by what it says itself."""
        found = [
            (_reached(path), path) for path in self.folder.glob(f"*/{_STATE}") if not path.parent.name.startswith(".")
        ]
        there = [(reached, path.parent) for reached, path in found if reached is not None]
        return max(there)[1] if there else None

    def drop_best(self) -> None:
        """Forget the best of an earlier stage. Raises RunError."""
        with writing("the run folder", self.run):
            (self.run / "best").unlink(missing_ok=True)

    def _point(self, name: str, target: Path) -> None:
        work = self.run / f".{name}.{os.getpid()}"
        try:
            with work.open("w", encoding="utf-8") as file:
                file.write(target.relative_to(self.run).as_posix() + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(work, self.run / name)
        finally:
            work.unlink(missing_ok=True)
        _sync(self.run)

    def _tidy(self, newest: Path) -> None:
        """Delete what is neither the best nor among the newest two, and what a killed run left half written."""
        best = self.pointed("best")
        try:
            there = list(self.folder.iterdir())
            whole = sorted(
                (path for path in there if (path / _STATE).is_file() and not path.name.startswith(".")),
                key=lambda path: (path == newest, path.stat().st_mtime_ns),
            )
        except OSError:
            return
        half = [path for path in there if path.name.startswith(".")]
        for path in [*half, *whole[:-_KEEP]]:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)


def _reached(state: Path) -> tuple[int, int] | None:
    """The number of the stage and the step of a checkpoint by its file; None for one that cannot be read."""
    try:
        position = json.loads(state.read_text(encoding="utf-8"))["position"]
        return int(position["order"]), int(position["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read(folder: Path) -> State:
    """A checkpoint. Raises RunError for one that is missing, damaged, or of another version of the format."""
    try:
        data = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise RunError(
                CHECKPOINT, f"the checkpoint {folder} has format {data['format']}, and this version reads {FORMAT}"
            )
        return State(
            Position(**data["position"]),
            {name: safetensors.torch.load_file(folder / file) for name, file in data["models"].items()},
            safetensors.torch.load_file(folder / _PROJECTIONS),
            safetensors.torch.load_file(folder / _OPTIMIZER),
            data["rng"],
            dict(json.loads((folder / _SPEC).read_text(encoding="utf-8"))),
            # Checkpoints of specs without policies have no such file.
            safetensors.torch.load_file(folder / _POLICIES) if (folder / _POLICIES).is_file() else {},
        )
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        others = sorted(path.parent.name for path in folder.parent.glob(f"*/{_STATE}") if path.parent != folder)
        hint = f"to go on from {others[-1]}, write checkpoints/{others[-1]} into the file `last`" if others else ""
        raise RunError(CHECKPOINT, f"the checkpoint {folder} cannot be read: {error}", hint) from error


def _write(folder: Path, state: State) -> None:
    files = {}
    for number, (name, tensors) in enumerate(state.models.items()):
        files[name] = _MODEL.format(name if name.isidentifier() else number)
        _save(folder / files[name], tensors)
    _save(folder / _PROJECTIONS, state.projections)
    _save(folder / _OPTIMIZER, state.optimizer)
    if state.policies:
        _save(folder / _POLICIES, state.policies)
    _save_json(folder / _SPEC, state.spec)
    data = {
        "format": FORMAT,
        "position": asdict(state.position),
        "models": files,
        "rng": state.rng,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
    }
    _save_json(folder / _STATE, data)
    _sync(folder)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    safetensors.torch.save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _save_json(path: Path, data: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def differences(saved: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str | None, str | None]]:
    """The fields that differ between two fingerprints, with both values."""
    for name in dict.fromkeys((*now, *saved)):
        if saved.get(name) != now.get(name):
            yield name, saved.get(name), now.get(name)


def refuse_other_spec(saved: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Raise RunError, naming the first field that differs, where a checkpoint is of another spec."""
    found = list(differences(saved, now))
    if not found:
        return
    name, there, here = found[0]
    more = f", and {len(found) - 1} more fields differ" if len(found) > 1 else ""
    raise RunError(
        CHECKPOINT,
        f"the checkpoint {folder.name} is of another spec: {name} is {there or 'absent'} there "
        f"and {here or 'absent'} here{more}",
        "put it back, or start a new run without `--resume`",
    )
