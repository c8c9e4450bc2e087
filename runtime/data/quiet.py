"""How `datasets` and `tokenizers` are made to work without a word, in a cache that can be written."""

from __future__ import annotations

import getpass
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import platformdirs
from datasets.utils import logging as datasets_logging


@contextmanager
def quiet(*, forks: bool = False) -> Iterator[None]:
    """No progress bars and no chatter of `datasets` and `transformers` tokenizers inside; restored afterwards.

    With `forks`, the threads of fast tokenizers are off: a forked process that inherits them can hang.
    """
    bars = datasets.are_progress_bars_disabled()
    level = datasets_logging.get_verbosity()
    length_logger = logging.getLogger("transformers.tokenization_utils_base")
    length_level = length_logger.level
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    datasets.disable_progress_bars()
    datasets_logging.set_verbosity_error()
    length_logger.setLevel(logging.ERROR)
    if forks:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with warnings.catch_warnings():
            # A fork beside running threads is safe here: the child only tokenises, without threads.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        datasets_logging.set_verbosity(level)
        length_logger.setLevel(length_level)
        if forks:
            if threads is None:
                os.environ.pop("TOKENIZERS_PARALLELISM", None)
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = threads


def cache_folder() -> Path:
    """A folder for prepared rows and tokens: `GKD_CACHE`, else the user's cache, else a temporary one."""
    asked = os.environ.get("GKD_CACHE")
    places = [Path(asked).expanduser()] if asked else []
    places += [
        Path(platformdirs.user_cache_dir("gkd-dsl")),
        Path(tempfile.gettempdir()) / f"gkd-dsl-{_user()}",
    ]
    for place in places:
        folder = place / "data"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="gkd-dsl-"))


def _user() -> str:
    """The name of the user; the number of one without a name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid()) if hasattr(os, "getuid") else "user"
