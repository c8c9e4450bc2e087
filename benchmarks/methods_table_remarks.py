"""What is said of single rows of the methods table: why a method does worse than no teacher, by measurement."""

from __future__ import annotations

from collections.abc import Mapping

REMARKS: Mapping[str, str] = {}
