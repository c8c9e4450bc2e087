"""What the Triton kernels give where Triton interprets them, for `test_fused_triton.py`: run as a script, in a process
of its own, since Triton asks once whether it interprets. Writes the results of all cases to the file it is told."""

import itertools
import sys

import torch

from gkd_dsl.runtime.ops.fused_rows import RowLoss

ROWS, COLUMNS, ALL = 5, 100, 8
SOFT = {
    "none": None,
    "kl": ("kl", {}),
    "kl.hot": ("kl", {"temperature": 3.0}),
    "kl.plain": ("kl", {"temperature": 2.0, "t2": False}),
    "soft_cross_entropy": ("soft_cross_entropy", {"temperature": 2.0}),
    "reverse_kl": ("reverse_kl", {"temperature": 0.7}),
    "jsd": ("jsd", {}),
    "jsd.skew": ("jsd", {"beta": 0.1, "temperature": 2.0, "t2": True}),
    "jsd.0": ("jsd", {"beta": 0.0}),
    "jsd.1": ("jsd", {"beta": 1.0, "temperature": 2.0}),
}
HARD = {"none": None, "hard": {}, "smooth": {"label_smoothing": 0.2}}
SHAPES = {"plain": ((1.0, None), (1.0, None)), "shaped": ((-0.6, 4.0), (1.7, 5.0))}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
}
CASES = [
    *(case for case in itertools.product(SOFT, HARD, SHAPES, ["fp32"]) if case[:2] != ("none", "none")),
    *itertools.product(("kl", "soft_cross_entropy", "reverse_kl", "jsd.skew"), ("none", "smooth"), ["plain"], ["bf16"]),
    *itertools.product(("kl.hot", "jsd"), ["hard"], ["shaped"], ("bf16", "mixed", "fp16")),
    ("none", "smooth", "shaped", "bf16"),
]
ONE = [case for case in CASES if case[1:] == ("smooth", "shaped", "fp32")]
PICKED = [case for case in CASES if case[3] in ("mixed", "fp16")]
VALUES = [case for case in CASES if case[3] == "bf16"]
FIRST = 2
"""The first row of the tile among all."""


def drawn(case):
    """Losses over all rows, what the maps of the student's tile and of all rows of the teacher give."""
    soft, hard, _, dtype = case
    generator = torch.Generator().manual_seed(CASES.index(case))
    student = (torch.randn(ROWS, COLUMNS, generator=generator) * 3.0).to(DTYPES[dtype][0])
    teacher = (torch.randn(ALL, COLUMNS, generator=generator) * 3.0).to(DTYPES[dtype][1])
    weights = torch.rand(2, ALL, generator=generator) + 0.1
    labels = torch.randint(COLUMNS, (ALL,), generator=generator)
    labels[FIRST] = COLUMNS - 1
    # Row 3 of the tile counts in neither, row 1 only in the soft loss, row 4 only in the hard one.
    weights[0, [FIRST + 3, FIRST + 4]] = 0.0
    weights[1, [FIRST + 3, FIRST + 1]] = 0.0
    labels[[FIRST + 3, FIRST + 1]] = -100
    student[3, 5:] = torch.nan
    teacher[FIRST + 3, 2] = torch.inf
    teacher[FIRST + 4] = torch.nan
    losses = []
    if HARD[hard] is not None:
        losses.append(RowLoss("cross_entropy", -0.4, weights[1], None, HARD[hard], labels))
    if SOFT[soft] is not None:
        losses.append(RowLoss(SOFT[soft][0], 1.3, weights[0], 0, SOFT[soft][1]))
    return losses, student, teacher


def interpreted(case, kernels, *, gradient=True, rows=slice(None), picked=False):
    """The gradient in the place of the student's logits, and the values `[losses, ALL]`."""
    losses, student, teacher = drawn(case)
    student = student[rows].clone()
    job = kernels.job(losses, 1, student.device)
    values = torch.zeros(len(losses), 16)
    place = None
    if job.soft is None:
        given = None
    elif picked:
        # Among other rows, which are wider than their logits.
        wide = torch.full((3 * ALL, COLUMNS + 7), torch.nan, dtype=teacher.dtype)
        place = torch.arange(ALL) * 3 + 1
        wide[place, :COLUMNS] = teacher
        given = wide[:, :COLUMNS]
    else:
        given = teacher[FIRST : FIRST + ROWS][rows]
    ours, theirs = (kernels.Shape(*shape) for shape in SHAPES[case[2]])
    kernels.rows(job, student, ours, given, theirs, place, FIRST, values, gradient)
    return student, values


def extreme(op):
    """Logits far apart and far from 0, and a class that the teacher excludes where the divergence stays finite."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(3, COLUMNS, generator=generator) * 400.0 + 1000.0 for _ in range(2))
    if op != "reverse_kl":
        teacher[:, 7] = -torch.inf
    return RowLoss(op, 1.0, torch.ones(3), 0), student, teacher


def of_extremes(kernels, op):
    loss, student, teacher = extreme(op)
    values = torch.zeros(1, 16)
    job = kernels.job([loss], 1, student.device)
    kernels.rows(job, student, kernels.Shape(), teacher, kernels.Shape(), None, 0, values, True)
    return student, values[0, :3]


def scaled(kernels):
    x = torch.arange(5000.0)
    kernels.scale(x, torch.tensor(2.5))
    kept = torch.full((70,), 3.0, dtype=torch.bfloat16)
    kernels.scale(kept, torch.tensor(1.0))
    few = torch.full((2, 3), 3.0, dtype=torch.bfloat16)
    kernels.scale(few, torch.tensor(0.5))
    return x, kept, few


def head(kernels, monkeyed):
    """Losses with a head in two tiles by the kernel, and by the eager way: total, sums, three gradients each."""
    from gkd_dsl.runtime.ops import fused_head
    from gkd_dsl.runtime.ops.fused_head import Head, Teacher, fused_losses

    found = {}
    for dtype, given in itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)):
        generator = torch.Generator().manual_seed(7)
        hidden, weight, bias, taught, theirs = (
            torch.randn(*size, generator=generator)
            for size in ((ROWS, 8), (COLUMNS, 8), (COLUMNS,), (ROWS, 4), (COLUMNS, 4))
        )
        weights = torch.rand(ROWS, generator=generator)
        labels = torch.randint(COLUMNS, (ROWS,), generator=generator)
        losses = [
            RowLoss("kl", 0.5, weights, 0, {"temperature": 2.0}),
            RowLoss("cross_entropy", 0.25, weights, labels=labels),
        ]
        source = Teacher(taught, Head(theirs, scale=2.0))
        if given:
            logits = (taught @ theirs.T * 2.0).repeat_interleave(2, 0)
            source = Teacher(logits=logits, rows=torch.arange(ROWS) * 2 + 1)
        for way in ("kernel", "eager"):
            fused_head.KERNEL_DEVICES = {"cpu"} if way == "kernel" else set()
            calls = monkeyed["calls"]
            inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                total, sums = fused_losses(
                    inputs[0], Head(*inputs[1:], scale=3.0, softcap=6.0, divide=True), [source], losses, tile_rows=4
                )
            gradients = torch.autograd.grad(3.0 * total, inputs)
            found[str(dtype), given, way] = (total.detach(), sums, gradients, monkeyed["calls"] - calls)
    return found


def main(path):
    from gkd_dsl.runtime.ops import fused_head, fused_triton

    fused_triton.BLOCK = 64
    monkeyed = {"calls": 0}
    rows = fused_triton.rows

    def counted(*given):
        monkeyed["calls"] += 1
        rows(*given)

    fused_triton.rows = counted
    found = {
        "cases": {case: interpreted(case, fused_triton) for case in CASES},
        "picked": {case: interpreted(case, fused_triton, picked=True) for case in PICKED},
        "values": {case: interpreted(case, fused_triton, gradient=False) for case in VALUES},
        "one": {case: interpreted(case, fused_triton, rows=slice(0, 1)) for case in ONE},
        "extreme": {op: of_extremes(fused_triton, op) for op in ("kl", "reverse_kl", "soft_cross_entropy", "jsd")},
        "scaled": scaled(fused_triton),
        "head": head(fused_triton, monkeyed),
        "failed": [repr(error) for error in fused_head._failed],
    }
    torch.save(found, path)


if __name__ == "__main__":
    main(sys.argv[1])
