"""Files and folders as a spec names them: what cannot be looked at counts as not there."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(written: str | Path) -> Path:
    """A path with `~` and `~user` read; as it is written where there is no such user."""
    try:
        return Path(written).expanduser()
    except RuntimeError:
        return Path(written)


def is_file(path: Path) -> bool:
    """Whether a path is a file. False also for a name that is too long, or in a folder that may not be read."""
    return os.path.isfile(path)


def is_dir(path: Path) -> bool:
    """Whether a path is a folder. False also for a name that is too long, or in a folder that may not be read."""
    return os.path.isdir(path)


def entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it may not be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []
