"""Metrics: fed batch by batch, computed once over the whole held-out set.

`make(name, attrs)` gives an accumulator; `update(**inputs)` takes its tensors by slot, `valid` (Bool[B, L], Bool[B]
or None) among them; `compute()` gives the number, NaN where it is not defined (nothing counted, a constant series).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gkd_dsl.runtime.ops.common import default_dims, full, mask_for
from gkd_dsl.runtime.ops.reduce import reduce_loss


class Metric(Protocol):
    """An accumulator over a held-out set."""

    def update(self, **inputs: Any) -> None:
        """Take one batch."""

    def compute(self) -> float:
        """The number over all batches so far."""


_METRICS: dict[str, Callable[..., Metric]] = {}


def metric(name: str) -> Callable[[type], type]:
    """Make a class the accumulator of this name. Raises ValueError when the name is taken."""

    def add(cls: type) -> type:
        if name in _METRICS:
            raise ValueError(f"there is a metric `{name}` already")
        _METRICS[name] = cls
        return cls

    return add


def metrics() -> dict[str, Callable[..., Metric]]:
    """Every accumulator by name. The dictionary is a copy."""
    return dict(_METRICS)


def make(name: str, attrs: Mapping[str, Any]) -> Metric:
    """A fresh accumulator with its plain arguments. Raises KeyError for a name that is none."""
    return _METRICS[name](**attrs)


def _chosen(shape: Sequence[int], valid: Tensor | None, device: torch.device) -> Tensor:
    """Bool of the shape of the positions: which count."""
    mask = mask_for(shape, default_dims(len(shape)), valid, False, device)
    return torch.ones(tuple(shape), dtype=torch.bool, device=device) if mask is None else mask.expand(tuple(shape))


@metric("accuracy")
class Accuracy:
    """Share of positions where the largest logit is that of the label; -100 does not count."""

    def __init__(self) -> None:
        self.right = self.count = 0

    def update(self, *, student: Tensor, labels: Tensor, valid: Tensor | None = None) -> None:
        """Logits [..., C] and labels [...]."""
        counted = _chosen(labels.shape, valid, labels.device) & (labels != -100)
        self.right += int(((student.argmax(-1) == labels) & counted).sum())
        self.count += int(counted.sum())

    def compute(self) -> float:
        """Between 0 and 1."""
        return self.right / self.count if self.count else math.nan


@metric("agreement")
class Agreement:
    """Share of positions where student and teacher have the same largest logit."""

    def __init__(self) -> None:
        self.same = self.count = 0

    def update(self, *, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> None:
        """Logits [..., C] twice."""
        counted = _chosen(student.shape[:-1], valid, student.device)
        self.same += int(((student.argmax(-1) == teacher.argmax(-1)) & counted).sum())
        self.count += int(counted.sum())

    def compute(self) -> float:
        """Between 0 and 1."""
        return self.same / self.count if self.count else math.nan


@metric("mean_loss")
class MeanLoss:
    """A loss over the whole set: the sum over its counted positions by their number."""

    def __init__(self, dims: Sequence[str] | None = None, causal: bool = False) -> None:
        self.dims = dims
        self.causal = causal
        self.total = 0.0
        self.count = 0

    def update(self, *, x: Tensor, valid: Tensor | None = None) -> None:
        """Values per position."""
        dims = self.dims if self.dims is not None else default_dims(x.ndim)
        total, count = reduce_loss(x, dims, valid, causal=self.causal)
        self.total += total.item()
        self.count += int(count)

    def compute(self) -> float:
        """The mean."""
        return self.total / self.count if self.count else math.nan


@metric("perplexity")
class Perplexity(MeanLoss):
    """Exponential of a mean cross entropy."""

    def __init__(self, dims: Sequence[str] | None = None) -> None:
        super().__init__(dims)

    def compute(self) -> float:
        """At least 1; inf where the exponential is beyond a float."""
        mean = super().compute()
        return math.exp(mean) if not mean > 709.0 else math.inf


class _Classes:
    """Predicted and true classes of every counted position."""

    def __init__(self) -> None:
        self.predicted: list[np.ndarray] = []
        self.true: list[np.ndarray] = []

    def update(self, *, student: Tensor, labels: Tensor, valid: Tensor | None = None) -> None:
        """Logits [..., C] and labels [...]; -100 does not count."""
        counted = _chosen(labels.shape, valid, labels.device) & (labels != -100)
        self.predicted.append(student.argmax(-1)[counted].cpu().numpy())
        self.true.append(labels[counted].cpu().numpy())

    def table(self) -> np.ndarray:
        """How often each true class (row) was given each predicted class (column)."""
        if not self.true:
            return np.zeros((0, 0))
        predicted, true = np.concatenate(self.predicted), np.concatenate(self.true)
        classes = int(max(predicted.max(initial=-1), true.max(initial=-1))) + 1
        return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes).astype(float)


@metric("f1")
class F1(_Classes):
    """Harmonic mean of precision and recall, of one class or of all (`macro`: of those that occur)."""

    def __init__(self, average: str = "binary", positive: int = 1) -> None:
        super().__init__()
        self.average = average
        self.positive = positive

    def compute(self) -> float:
        """Between 0 and 1; 0 for a class that is neither given nor there, as scikit-learn has it."""
        table = self.table()
        if not table.sum():
            return math.nan
        hits, given, there = np.diag(table), table.sum(0), table.sum(1)
        if self.average == "micro":
            return float(hits.sum() / table.sum())
        both = given + there
        each = np.divide(2.0 * hits, both, out=np.zeros_like(hits), where=both > 0)
        if self.average == "macro":
            return float(each[both > 0].mean())
        return float(each[self.positive]) if self.positive < len(each) else 0.0


@metric("matthews")
class Matthews(_Classes):
    """Matthews correlation of two or more classes."""

    def compute(self) -> float:
        """Between -1 and 1; 0 where one side is constant, as is the custom."""
        table = self.table()
        total = table.sum()
        if not total:
            return math.nan
        given, there = table.sum(0), table.sum(1)
        covariance = np.trace(table) * total - given @ there
        spread = (total**2 - given @ given) * (total**2 - there @ there)
        return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation of two series; NaN where one is constant or shorter than two."""
    if not (_varies(x) and _varies(y)):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return float(np.clip((x @ y) / spread, -1.0, 1.0)) if spread > 0 else math.nan


def _varies(x: np.ndarray) -> bool:
    """Whether two of the numbers differ; around a mean that is rounded, equal ones would."""
    return len(x) > 1 and bool(x.min() != x.max())


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    order = np.argsort(x, kind="stable")
    ordered = x[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    ends = np.concatenate((starts[1:], [len(x)]))
    shared = np.repeat((starts + 1 + ends) / 2.0, ends - starts)
    result = np.empty(len(x))
    result[order] = shared
    return result


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of two series; NaN where one is constant or shorter than two."""
    return pearson(ranks(x), ranks(y)) if len(x) > 1 else math.nan


class _Series:
    """Two series of numbers over the set."""

    def __init__(self) -> None:
        self.first: list[np.ndarray] = []
        self.second: list[np.ndarray] = []

    def update(self, *, student: Tensor, labels: Tensor, valid: Tensor | None = None) -> None:
        """Numbers [B] or [B, 1], and labels [B]."""
        student = student.squeeze(-1) if student.ndim == 2 else student
        counted = _chosen(labels.shape, valid, labels.device)
        self.first.append(student.detach()[counted].double().cpu().numpy())
        self.second.append(labels.detach()[counted].double().cpu().numpy())

    def series(self) -> tuple[np.ndarray, np.ndarray]:
        """Both series, whole."""
        if not self.first:
            return np.zeros(0), np.zeros(0)
        return np.concatenate(self.first), np.concatenate(self.second)


@metric("pearson")
class Pearson(_Series):
    """Linear correlation."""

    def compute(self) -> float:
        """Between -1 and 1."""
        return pearson(*self.series())


@metric("spearman")
class Spearman(_Series):
    """Rank correlation."""

    def compute(self) -> float:
        """Between -1 and 1."""
        return spearman(*self.series())


@metric("r2")
class R2(_Series):
    """Share of the labels' variance that the numbers explain."""

    def compute(self) -> float:
        """At most 1."""
        x, y = self.series()
        total = float(((y - y.mean()) ** 2).sum()) if _varies(y) else 0.0
        return 1.0 - float(((y - x) ** 2).sum()) / total if total > 0 else math.nan


@metric("similarity_spearman")
class SimilaritySpearman:
    """Rank correlation of the cosine similarities of all pairs of texts in two spaces.

    It keeps one vector a text and side; `compute` takes time and memory of the order of the number of pairs.
    """

    def __init__(self) -> None:
        self.student: list[Tensor] = []
        self.teacher: list[Tensor] = []

    def update(self, *, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> None:
        """Vectors [B, H] and [B, K]."""
        counted = _chosen(student.shape[:1], valid, student.device)
        for kept, x in ((self.student, student), (self.teacher, teacher)):
            kept.append(full(x.detach()[counted]).cpu())

    def compute(self) -> float:
        """Between -1 and 1; it needs three texts."""
        if sum(len(x) for x in self.student) < 3:
            return math.nan
        return spearman(*(_similarities(torch.cat(kept)) for kept in (self.student, self.teacher)))


def _similarities(x: Tensor) -> np.ndarray:
    """The cosine similarities of all pairs i < j of rows."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1).numpy()
    return (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
