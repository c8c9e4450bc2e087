"""Metrics as JSON lines and TensorBoard scalars."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

from gkd_dsl.runtime.checkpoint import Position
from gkd_dsl.runtime.errors import writing
from gkd_dsl.runtime.records import EvaluateRecord, StageRecord, StepRecord
from gkd_dsl.runtime.run_folder import RunFolder


class RunLog:
    """Writes the records of a run into its folder. After a resume no step appears twice."""

    def __init__(self, folder: RunFolder, resumed: Position | None = None) -> None:
        self._folder = folder
        self._file: IO[str] | None = None
        self._board: Any = None
        self._order = 0
        with writing("metrics.jsonl", folder.path):
            if resumed is not None:
                self._cut(resumed)
            self._file = folder.metrics.open("a", encoding="utf-8")

    def on_stage(self, record: StageRecord) -> None:
        """Open the stage's folder of scalars."""
        from torch.utils.tensorboard import SummaryWriter

        self._close_board()
        self._order = record.order
        place = self._folder.tensorboard / record.stage.replace("/", ".")
        with writing("TensorBoard scalars", place):
            self._board = SummaryWriter(str(place), purge_step=record.step + 1 if record.step else 0)

    def on_step(self, record: StepRecord) -> None:
        """One line; scalars of each loss raw and weighted, its weight, the rate, the norm and the speed."""
        counters = {"counters": dict(record.counters)} if record.counters else {}
        rewards = {"rewards": dict(record.rewards)} if record.rewards else {}
        skipped = {"gradient_norm": None, "skipped": True} if record.skipped else {}
        self._line(
            {
                "kind": "step",
                "stage": record.stage,
                "order": self._order,
                "step": record.step,
                "epoch": round(record.epoch, 6),
                "loss": record.loss,
                "terms": dict(record.terms),
                "weights": dict(record.weights),
                "lr": record.lr,
                "gradient_norm": record.gradient_norm,
                "tokens": record.tokens,
                "tokens_per_second": round(record.tokens_per_second, 1),
                **counters,
                **rewards,
                **skipped,
            }
        )
        scalars = {"loss": record.loss, "lr": record.lr}
        if not record.skipped:
            scalars["gradient_norm"] = record.gradient_norm
        scalars["tokens_per_second"] = record.tokens_per_second
        for name, value in record.terms.items():
            scalars[f"raw/{name}"] = value
            scalars[f"weight/{name}"] = record.weights[name]
            scalars[f"weighted/{name}"] = record.weights[name] * value
        scalars |= {f"counter/{name}": float(value) for name, value in record.counters.items()}
        scalars |= {f"reward/{name}": value for name, value in record.rewards.items()}
        self._scalars(scalars, record.step)

    def on_evaluate(self, record: EvaluateRecord) -> None:
        """One line, and a scalar for each metric."""
        self._line(
            {
                "kind": "evaluate",
                "stage": record.stage,
                "order": self._order,
                "step": record.step,
                "metrics": dict(record.metrics),
                "best": record.best,
            }
        )
        self._scalars({f"metric/{name}": value for name, value in record.metrics.items()}, record.step)

    def close(self) -> None:
        """Flush and close."""
        try:
            self._close_board()
        finally:
            if self._file is not None:
                file, self._file = self._file, None
                with writing("metrics.jsonl", self._folder.path):
                    file.close()

    def _line(self, data: dict[str, Any]) -> None:
        if self._file is None:
            return
        with writing("metrics.jsonl", self._folder.path):
            self._file.write(json.dumps(_json(data)) + "\n")
            # A killed process loses what Python holds back; the line must be there before its checkpoint is.
            self._file.flush()

    def _scalars(self, scalars: Mapping[str, float], step: int) -> None:
        if self._board is None:
            return
        with writing("TensorBoard scalars", self._folder.tensorboard):
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def _close_board(self) -> None:
        if self._board is not None:
            with writing("TensorBoard scalars", self._folder.tensorboard):
                self._board.close()
            self._board = None

    def _cut(self, position: Position) -> None:
        """Drop the lines of steps that will be made again, and a line that was not written to its end."""
        if not self._folder.metrics.exists():
            return
        kept = []
        for line, data in _records(self._folder):
            if (data["order"], data["step"]) <= (position.order, position.step):
                kept.append(line + "\n")
        work = self._folder.path / f".metrics.{os.getpid()}"
        try:
            work.write_text("".join(kept), encoding="utf-8")
            os.replace(work, self._folder.metrics)
        finally:
            work.unlink(missing_ok=True)


def evaluations(folder: RunFolder) -> Iterator[EvaluateRecord]:
    """The evaluations that a run has logged so far."""
    for _, data in _records(folder):
        if data["kind"] == "evaluate":
            found = {name: math.nan if value is None else value for name, value in data["metrics"].items()}
            yield EvaluateRecord(data["stage"], data["step"], found, data["best"])


def _records(folder: RunFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of the log with what they hold; one that is cut short, or none of ours, is left out."""
    if not folder.metrics.exists():
        return
    for line in folder.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            data = json.loads(line)
            fits = (
                data["kind"] in ("step", "evaluate")
                and isinstance(data["order"], int)
                and isinstance(data["step"], int)
            )
        except (ValueError, KeyError, TypeError):
            continue
        if fits:
            yield line, data


def _json(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
