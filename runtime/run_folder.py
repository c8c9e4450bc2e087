"""The folder of a run: its spec, diagnostics, logs, checkpoints and the exported student."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gkd_dsl.runtime.checkpoint import Checkpoints
from gkd_dsl.runtime.errors import RUN_FOLDER, RunError, writing


class RunFolder:
    """The places in a run folder.

    `spec.gkd`, `plan.json`, `diagnostics.json`, `metrics.jsonl`, `tensorboard/<stage>/`,
    `checkpoints/<stage>-<step>/`, `export/`, and the pointers `last` and `best`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path)

    @classmethod
    def create(cls, name: str, *, root: Path = Path("runs"), out: Path | None = None) -> RunFolder:
        """A new folder `root/name`, or `name-2`, `name-3`, ... where that is taken; or exactly `out`.

        Raises RunError: `out` is a folder that is not empty, or nothing can be written there.
        """
        if out is not None:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise RunError(
                    RUN_FOLDER,
                    f"{out} is there already, and is not an empty folder",
                    "choose another folder, or go on with the run in it with `--resume`",
                )
            with writing("a run folder", out):
                out.mkdir(parents=True, exist_ok=True)
                _refuse_read_only(out)
            return cls(out)
        first = folder_name(name)
        number = 1
        while True:
            path = root / (first if number == 1 else f"{first}-{number}")
            try:
                with writing("a run folder", path):
                    root.mkdir(parents=True, exist_ok=True)
                    path.mkdir()
                return cls(path)
            except RunError as error:
                if not isinstance(error.__cause__, FileExistsError):
                    raise
            number += 1

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an earlier run. Raises RunError where there is none."""
        if not path.is_dir():
            raise RunError(RUN_FOLDER, f"there is no run folder {path}")
        folder = cls(path)
        if folder.checkpoints.pointed("last") is None and not (path / "plan.json").is_file():
            raise RunError(RUN_FOLDER, f"{path} holds no run to go on from", "start a new run")
        return folder

    @property
    def metrics(self) -> Path:
        """One JSON object a line for each step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Scalars, one folder a stage."""
        return self.path / "tensorboard"

    @property
    def export(self) -> Path:
        """Where the student goes."""
        return self.path / "export"

    def write_spec(self, text: str) -> None:
        """Keep the resolved spec. Raises RunError."""
        self._write("spec.gkd", text)

    def write_diagnostics(self, diagnostics: Iterable[Any]) -> None:
        """Keep every diagnostic, as what JSON can hold. Raises RunError."""
        self._write("diagnostics.json", json.dumps(list(diagnostics), indent=1) + "\n")

    def write_json(self, name: str, value: object) -> None:
        """Keep a value as JSON. Raises RunError."""
        self._write(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        target, work = self.path / name, self.path / f".{name}.{os.getpid()}"
        with writing(name, self.path):
            try:
                work.write_text(text, encoding="utf-8")
                os.replace(work, target)
            finally:
                work.unlink(missing_ok=True)


def folder_name(name: str) -> str:
    """What the first run folder of a name is called; later ones have `-2`, `-3`, ... behind it."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


def is_named(path: Path, name: str) -> bool:
    """Whether a run folder is called as those of a name are."""
    return re.fullmatch(rf"{re.escape(folder_name(name))}(-[1-9]\d*)?", path.name) is not None


def _refuse_read_only(folder: Path) -> None:
    probe = folder / f".probe.{os.getpid()}"
    probe.touch()
    probe.unlink()
