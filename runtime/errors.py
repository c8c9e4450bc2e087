"""What goes wrong while a spec runs, as data for a diagnostic."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gkd_dsl.diagnostics.model import Diagnostic, Note

SHAPES = "E0801"
NOT_FINITE = "E0802"
OUT_OF_MEMORY = "E0803"
CANNOT_WRITE = "E0804"
CHECKPOINT = "E0805"
RUN_FOLDER = "E0806"
CANNOT_RUN = "E0807"
CACHE = "E0808"


class RunError(Exception):
    """A run that cannot start or go on: a code, what happened, and a hint at what to do."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(code, message, hint)
        self.code, self.message, self.hint = code, message, hint

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f"; {self.hint}" if self.hint else "")

    @property
    def diagnostic(self) -> Diagnostic:
        """The error as a diagnostic without a place."""
        return Diagnostic(self.code, self.message, notes=(Note(self.hint),) if self.hint else ())


class Stopped(Exception):  # noqa: N818 - being stopped on request is no error
    """A run that was asked to stop, and has saved its state. `folder` is the run folder."""

    def __init__(self, stage: str, step: int, total: int, folder: Path | None) -> None:
        super().__init__(stage, step, total, folder)
        self.stage, self.step, self.total, self.folder = stage, step, total, folder

    def __str__(self) -> str:
        text = f"stopped in stage `{self.stage}` after step {self.step} of {self.total}"
        if self.folder is None:
            return f"{text}; nothing is saved: this run has no folder"
        return f"{text}; the state is saved: go on with `--resume --out {self.folder}`"


@contextmanager
def writing(what: str, path: Path, kept: str = "") -> Iterator[None]:
    """Turn a failure to write into a RunError that says why, and what is kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number(str(error))
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.EROFS: "the file system is read-only",
        }
        reason = reasons.get(number or 0) or (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "free some space" if number in (errno.ENOSPC, errno.EDQUOT) else "choose a folder that can be written"
        raise RunError(
            CANNOT_WRITE, f"{what} cannot be written to {path}: {reason}", f"{hint}, {kept}" if kept else hint
        ) from error


def _number(text: str) -> int | None:
    """The error number in the text of an error of the safetensors library."""
    known = {"os error 28": errno.ENOSPC, "No space": errno.ENOSPC, "os error 13": errno.EACCES}
    return next((number for part, number in known.items() if part in text), None)


@contextmanager
def in_memory(words: Callable[[BaseException], tuple[str, str]]) -> Iterator[None]:
    """Turn a shortage of memory into a RunError; `words` says what happened and what helps, and is asked then alone."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RunError(OUT_OF_MEMORY, *words(error)) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)
