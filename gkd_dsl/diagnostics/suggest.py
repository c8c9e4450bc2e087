"""Names near to one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` of the candidates that `name` may have been meant for, the likeliest first.

    Equal but for case or `_` comes first, then one edit away (two neighbours swapped is one), then what difflib finds.
    """
    pool = sorted(set(candidates) - {name})
    if not name or len(name) > 60:
        return []
    plain = _plain(name)
    ranked: list[tuple[float, str]] = []
    for candidate in pool:
        other = _plain(candidate)
        if other == plain:
            ranked.append((2.0, candidate))
        elif min(len(plain), len(other)) > 1 and _one_edit(plain, other):
            ranked.append((1.0 + 0.01 * (candidate[:1].lower() == name[:1].lower()), candidate))
        else:
            ratio = difflib.SequenceMatcher(None, plain, other).ratio()
            if ratio >= (0.7 if min(len(plain), len(other)) <= 3 else 0.6):
                ranked.append((ratio, candidate))
    ranked.sort(key=lambda pair: (-pair[0], pair[1]))
    best = ranked[0][0] if ranked else 0.0
    # Where one is as good as certain, far ones only distract.
    return [candidate for score, candidate in ranked if best < 1.0 or score >= 0.8][:n]


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _one_edit(a: str, b: str) -> bool:
    if abs(len(a) - len(b)) > 1:
        return False
    if len(a) == len(b):
        different = [i for i in range(len(a)) if a[i] != b[i]]
        if len(different) == 1:
            return len(a) > 2
        return (
            len(different) == 2
            and different[1] == different[0] + 1
            and a[different[0]] == b[different[1]]
            and (a[different[1]] == b[different[0]])
        )
    short, long = (a, b) if len(a) < len(b) else (b, a)
    return len(short) > 1 and any(long[:i] + long[i + 1 :] == short for i in range(len(long)))
