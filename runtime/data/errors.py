"""What is wrong with the data of a run, in words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from gkd_dsl.extension import ExtensionError
from gkd_dsl.runtime.data.quiet import cache_folder
from gkd_dsl.sources.readers import ReadError


class DataError(Exception):
    """Data that cannot be used: `source` is its name in the spec, `arg` the argument at fault, `hint` what to do."""

    def __init__(self, message: str, source: str = "", arg: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, source, arg, hint)
        self.message, self.source, self.arg, self.hint = message, source, arg, hint

    def __str__(self) -> str:
        head = f"data `{self.source}`: {self.message}" if self.source else self.message
        return f"{head}; {self.hint}" if self.hint else head


@contextmanager
def named(source: str) -> Iterator[None]:
    """Give every error inside the name of the source, and those of readers and extensions our type."""
    try:
        yield
    except DataError as error:
        raise DataError(error.message, error.source or source, error.arg, error.hint) from error.__cause__
    except Exception as error:
        cause = _cause(error)
        if cause is None:
            if disk_is_full(error):
                raise DataError(
                    f"the disk of {cache_folder()} is full, where rows and tokens are prepared",
                    source,
                    hint="free some space, or name a folder on another disk by the variable GKD_CACHE",
                ) from error
            raise
        if isinstance(cause, DataError):
            raise DataError(cause.message, source, cause.arg, cause.hint) from cause.__cause__
        if isinstance(cause, ReadError):
            place = f"{cause.path.name}, line {cause.line}" if cause.line else cause.path.name
            raise DataError(f"{place}: {cause.message}", source, cause.arg, cause.hint) from cause
        raise DataError(str(cause), source) from cause


def _cause(error: BaseException | None) -> DataError | ReadError | ExtensionError | None:
    """The error of ours that another library has wrapped."""
    while error is not None:
        if isinstance(error, DataError | ReadError | ExtensionError):
            return error
        error = error.__cause__ or error.__context__
    return None


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error; `datasets` also looks at the free space beforehand."""
    while error is not None:
        if isinstance(error, OSError) and (
            error.errno in (errno.ENOSPC, errno.EDQUOT) or "Not enough disk space" in str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
