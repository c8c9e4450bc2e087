"""The progress of a run on a terminal: every loss, the rate, the speed, the time left; plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gkd_dsl.runtime.records import EvaluateRecord, StageRecord, StepRecord

_LINES_A_STAGE = 10
_REFRESH_SECONDS = 0.1


class Progress:
    """Shows records as they come: live on a terminal, else about ten lines a stage (or one every `every` steps)."""

    def __init__(self, console: Console | None = None, *, every: int | None = None) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self._every = every
        self._live: Live | None = None
        self._stage: StageRecord | None = None
        self._first: dict[str, float] = {}
        self._record: StepRecord | None = None
        self._metrics: dict[str, float] = {}
        self._started = self._shown = 0.0

    def on_stage(self, record: StageRecord) -> None:
        """Begin the display of a stage."""
        self._end()
        self._stage, self._record, self._first, self._metrics = record, None, {}, {}
        self._started = time.monotonic()
        self.console.print(_heading(record), highlight=False)
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def on_step(self, record: StepRecord) -> None:
        """Show a step."""
        self._record = record
        for name, value in record.terms.items():
            self._first.setdefault(name, value)
        if record.skipped:
            text = f"  {record.stage} {record.step}/{record.total_steps}  skipped: the gradients are beyond fp16"
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)
        if self._live is None:
            every = self._every or max(1, record.total_steps // _LINES_A_STAGE)
            if record.step % every == 0 or record.step in (1, record.total_steps):
                self.console.print(self._line(record), highlight=False, soft_wrap=True, markup=False)
            return
        now = time.monotonic()
        if now - self._shown >= _REFRESH_SECONDS or record.step >= record.total_steps:
            self._shown = now
            self._live.update(self._display(), refresh=True)

    def on_evaluate(self, record: EvaluateRecord) -> None:
        """Show an evaluation."""
        self._metrics.update(record.metrics)
        best = "  (best so far)" if record.best else ""
        text = "  ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
        self.console.print(f"  step {record.step}: {text}{best}", highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Take the display down."""
        self._end()

    def _end(self) -> None:
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        if self._record is not None:
            self.console.print(self._line(self._record), highlight=False, soft_wrap=True, markup=False)

    def _left(self, record: StepRecord) -> str:
        done = record.step - (self._stage.step if self._stage is not None else 0)
        if done < 1:
            return "?"
        seconds = (time.monotonic() - self._started) / done * max(0, record.total_steps - record.step)
        return duration(seconds)

    def _line(self, record: StepRecord) -> str:
        terms = "  ".join(f"{name} {value:.4g}" for name, value in record.terms.items())
        counters = "".join(f"  {text}" for text in self._counted(record))
        return (
            f"  {record.stage} {record.step}/{record.total_steps}  loss {record.loss:.4g}  {terms}{counters}"
            f"  lr {record.lr:.2g}  {record.tokens_per_second:,.0f} tokens/s  {self._left(record)} left"
        )

    def _counted(self, record: StepRecord) -> list[str]:
        """`k = 3/6` for each counter."""
        stops = self._stage.counters if self._stage is not None else {}
        return [f"{name} = {value}/{stops.get(name, value)}" for name, value in record.counters.items()]

    def _display(self) -> RenderableType:
        record = self._record
        if record is None:
            return Text("")
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=record.total_steps, completed=min(record.step, record.total_steps), width=30),
            f"step {record.step}/{record.total_steps}",
            f"epoch {record.epoch:.2f}",
            f"lr {record.lr:.2g}",
            f"{record.tokens_per_second:,.0f} tokens/s",
            f"{self._left(record)} left",
            *self._counted(record),
        )
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column("loss")
        for column in ("value", "weight", "weighted", "at the start"):
            table.add_column(column, justify="right")
        for name, value in record.terms.items():
            weight = record.weights[name]
            table.add_row(name, f"{value:.4g}", f"{weight:.4g}", f"{weight * value:.4g}", f"{self._first[name]:.4g}")
        table.add_row("objective", "", "", f"{record.loss:.4g}", "", style="bold")
        for name, value in self._metrics.items():
            table.add_row(name, f"{value:.4f}", "", "", "", style="cyan")
        return Group(bar, table)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _heading(record: StageRecord) -> Text:
    text = Text(f"stage {record.stage}", style="bold")
    number = f" ({record.order + 1} of {record.stages})" if record.stages > 1 else ""
    steps = f"{record.total_steps} steps" if not record.step else f"steps {record.step + 1} to {record.total_steps}"
    text.append(f"{number}: {steps}, {record.parameters:,} parameters trained", style="not bold")
    return text
