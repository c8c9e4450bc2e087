"""Amounts with their units: `40GiB`, `50GB/s`, `300TFLOP/s`."""

from __future__ import annotations

import math
import re

_NUMBER = re.compile(r"\s*(\d+(?:_\d+)*(?:\.\d+(?:_\d+)*)?)\s*([A-Za-z/]*)\s*")
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_FLOPS = {"GFLOP/s": 10**9, "TFLOP/s": 10**12, "PFLOP/s": 10**15}


class UnitError(ValueError):
    """An amount that cannot be read: what is wrong with it, and what to write."""


def memory(text: str) -> int:
    """Bytes of `40GiB` or `40GB`. Raises UnitError."""
    return int(_read(text, _BYTES, "an amount of memory", "40GiB"))


def rate(text: str) -> float:
    """Bytes a second of `50GB/s`. Raises UnitError."""
    return _read(text, {f"{unit}/s": size for unit, size in _BYTES.items()}, "a rate of transfer", "50GB/s")


def speed(text: str) -> float:
    """Operations a second of `300TFLOP/s`. Raises UnitError."""
    return _read(text, _FLOPS, "a rate of arithmetic", "300TFLOP/s")


def _read(text: str, units: dict[str, int], what: str, example: str) -> float:
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise UnitError(f"{text!r} is not {what}; write for example {example}")
    number, unit = float(found[1].replace("_", "")), found[2]
    if not unit:
        raise UnitError(f"{text!r} has no unit; write for example {number:g}{example.lstrip('0123456789')}")
    exact = units.get(unit) or next((size for name, size in units.items() if name.lower() == unit.lower()), None)
    if exact is None:
        raise UnitError(f"{unit!r} in {text!r} is not the unit of {what}; write one of {', '.join(units)}")
    if number * exact < 1:
        raise UnitError(f"{text!r} is nothing; write for example {example}")
    if not math.isfinite(number * exact):
        raise UnitError(f"{what} of {len(found[1])} digits is none; write for example {example}")
    return number * exact


def in_bytes(count: float) -> str:
    """`37.2 GiB`, `512 MiB`, `0`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= 0.9995 * _BYTES[unit]:
            value = count / _BYTES[unit]
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:,.0f} {unit}"
    return "0" if count < 0.5 else f"{count:.0f} B"


def in_rate(count: float, unit: str) -> str:
    """`300 TFLOP/s`, `25 GB/s`."""
    for size, prefix in ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.4g} {prefix}{unit}"
    return f"{count:.4g} {unit}"


def in_seconds(seconds: float) -> str:
    """`2.8 s`, `35 ms`, `4.1 min`."""
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    if seconds == 0:
        return "0 s"
    if seconds >= 1e-4:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.1f} us" if seconds >= 1e-7 else f"{seconds * 1e9:.3g} ns"


def in_count(count: float) -> str:
    """`405.9B`, `1.7B`, `124.4M`, `1,234`."""
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:,.0f}"
