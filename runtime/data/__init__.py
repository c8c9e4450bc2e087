"""From a data source to batches: rows, held-out split, tokens, padding and labels."""

from gkd_dsl.runtime.data.errors import DataError
from gkd_dsl.runtime.data.loader import Loader, Sizes, make_loader

__all__ = ["DataError", "Loader", "Sizes", "make_loader"]
