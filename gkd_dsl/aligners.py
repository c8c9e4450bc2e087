"""Layer maps: which teacher block each student block learns from.

Every function takes the number of student blocks and of teacher blocks and gives pairs
`(student, teacher)` of block indices from 0, in the order of the student's. They raise ValueError, with a
sentence for the user, where no such map exists.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

Pairs = list[tuple[int, int]]


def _sizes(students: int, teachers: int) -> None:
    if students < 1 or teachers < 1:
        raise ValueError(f"both sides need at least one layer; the student has {students}, the teacher {teachers}")


def _not_deeper(students: int, teachers: int) -> None:
    _sizes(students, teachers)
    if students > teachers:
        raise ValueError(f"the student has more layers ({students}) than the teacher ({teachers})")


def _ratio(students: int, teachers: int) -> int:
    _not_deeper(students, teachers)
    if teachers % students:
        raise ValueError(
            f"{teachers} teacher layers are not a whole multiple of {students} student layers; "
            "`uniform` takes any sizes"
        )
    return teachers // students


def _count(n: int | None, most: int, default: int, what: str) -> int:
    if n is None:
        return default
    if isinstance(n, bool) or not isinstance(n, int):
        raise ValueError(f"`n` is a whole number of pairs, not {n}")
    if not 1 <= n <= most:
        raise ValueError(f"`n` = {n}, but {what} allows 1 to {most} pairs")
    return n


def uniform(students: int, teachers: int) -> Pairs:
    """The last block of each of `students` near-equal runs of teacher blocks.

    Student i gets teacher ceil((i + 1) teachers / students) - 1, so the last meets the last. 4 of 12: 2, 5, 8, 11
    (TinyBERT, arXiv 1909.10351); 4 of 6, which does not divide: 1, 2, 4, 5. Raises ValueError for a student
    deeper than its teacher.
    """
    _not_deeper(students, teachers)
    return [(i, -(-(i + 1) * teachers // students) - 1) for i in range(students)]


def skip(students: int, teachers: int, *, include_last: bool = False) -> Pairs:
    """PKD's skip: every k-th teacher block, k = teachers / students, without the final layer of either.

    Student i gets teacher (i + 1) k - 1. 6 of 12: 1, 3, 5, 7, 9 for students 0 to 4, that is hidden states
    2, 4, 6, 8, 10 for 1 to 5 (arXiv 1908.09355: what the final layer knows is in the logits). `include_last`
    adds the pair of final layers. Raises ValueError where k is not whole or nothing is left.
    """
    step = _ratio(students, teachers)
    count = students if include_last else students - 1
    if count < 1:
        raise ValueError("a student of one layer has only its final one; `include_last = true` pairs it")
    return [(i, (i + 1) * step - 1) for i in range(count)]


def last(students: int, teachers: int, *, n: int | None = None, include_last: bool = False) -> Pairs:
    """PKD's last: the student's blocks with as many teacher blocks before the end, without the final layers.

    Student i gets teacher i + teachers - students. 6 of 12: 6 to 10 for students 0 to 4, that is hidden states
    7 to 11 for 1 to 5 (arXiv 1908.09355). `n` keeps the n pairs nearest the end; `include_last` adds the pair of
    final layers. Raises ValueError for a student deeper than its teacher (unless n is given and both have n
    layers) or where nothing is left.
    """
    _sizes(students, teachers)
    if n is None:
        _not_deeper(students, teachers)
    stop = 0 if include_last else 1
    most = min(students, teachers) - stop
    if most < 1:
        raise ValueError("one layer is only a final one; `include_last = true` pairs it")
    count = _count(n, most, most, "`last`")
    return [(students - stop - count + i, teachers - stop - count + i) for i in range(count)]


def first(students: int, teachers: int, *, n: int | None = None) -> Pairs:
    """Student block i with teacher block i; `n` keeps the first n pairs.

    Raises ValueError for a student deeper than its teacher, unless `n` fits both.
    """
    _sizes(students, teachers)
    if n is None:
        _not_deeper(students, teachers)
    count = _count(n, min(students, teachers), students, "`first`")
    return [(i, i) for i in range(count)]


def stride(students: int, teachers: int, *, step: int | None = None, start: int = 0) -> Pairs:
    """Student block i with teacher block start + i step.

    `step` is teachers / students unless given: 6 of 12 from 0: 0, 2, 4, 6, 8, 10, the layers that DistilBERT
    copies (arXiv 1910.01108). Raises ValueError where the step is not whole or a teacher block does not exist.
    """
    for name, value in (("step", step), ("start", start)):
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise ValueError(f"`{name}` is a whole number of layers, not {value}")
    _sizes(students, teachers)
    if step is None:
        step = _ratio(students, teachers)
    if step < 1 or start < 0:
        raise ValueError(f"`step` is at least 1 and `start` at least 0; they are {step} and {start}")
    end = start + (students - 1) * step
    if end >= teachers:
        raise ValueError(
            f"student layer {students - 1} would meet teacher layer {end}, but the teacher's last is {teachers - 1}"
        )
    return [(i, start + i * step) for i in range(students)]


def all_pairs(students: int, teachers: int) -> Pairs:
    """Every student block with every teacher block."""
    _sizes(students, teachers)
    return [(i, j) for i in range(students) for j in range(teachers)]


def _drawn_from(students: int, teachers: int, n: int | None) -> tuple[int, int]:
    """How many pairs are drawn, and from how many teacher blocks."""
    _not_deeper(students, teachers)
    count = _count(n, students, max(1, students - 1), "`random_sorted`")
    return count, teachers if count == students else teachers - 1


def random_sorted(students: int, teachers: int, *, n: int | None = None, seed: int = 0, epoch: int = 0) -> Pairs:
    """RAIL-KD: `n` distinct teacher blocks drawn anew for each epoch, in ascending order.

    Student blocks 0 to n - 1 meet them; n is students - 1 unless given, drawn from all teacher blocks but the
    final one (arXiv 2109.10164). With n = students the final block can be drawn too. The map is a pure function
    of (seed, epoch), the same on every machine. Raises ValueError for a student deeper than its teacher.
    """
    return list(_draw(students, teachers, n, seed, epoch))


@lru_cache(maxsize=1024)
def _draw(students: int, teachers: int, n: int | None, seed: int, epoch: int) -> tuple[tuple[int, int], ...]:
    count, pool = _drawn_from(students, teachers, n)

    def key(block: int) -> bytes:
        return hashlib.sha256(f"random_sorted {seed} {epoch} {block}".encode()).digest()

    drawn = sorted(sorted(range(pool), key=key)[:count])
    return tuple(enumerate(drawn))


def possible_pairs(students: int, teachers: int, n: int | None = None) -> Pairs:
    """Every pair that `random_sorted` can draw in some epoch."""
    count, pool = _drawn_from(students, teachers, n)
    return [(i, j) for i in range(count) for j in range(i, pool - count + i + 1)]
