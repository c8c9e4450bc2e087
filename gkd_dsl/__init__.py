"""gkd-dsl: a small language for distilling large language models."""

# The module `gkd_dsl.source` is loaded first: loading it later would put it over the decorator of that name.
import gkd_dsl.source  # noqa: F401  isort: skip
from gkd_dsl.extension import op, source

__all__ = ["op", "source"]
