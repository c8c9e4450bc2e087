"""An explanation as text: headings and tables, readable at a width of 100."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gkd_dsl.graph.explain import Explanation, LossRow, MapRow, StageExplanation, WeightRow
from gkd_dsl.graph.explain_words import number


def render(explanation: Explanation, console: Console) -> None:
    """Print an explanation."""
    _heading(console, "models")
    _table(
        console,
        ("", "role", "from", "sizes", "use"),
        [(m.name, m.role, m.location, m.sizes, m.use) for m in explanation.models],
    )
    for stage in explanation.stages:
        console.print()
        console.print(Text(f"stage {stage.name} for {stage.duration}", style="bold underline"))
        _stage(stage, console)


def _stage(stage: StageExplanation, console: Console) -> None:
    _heading(console, "objective")
    _lines(console, [f"minimize {stage.objective}"])
    _lines(console, [f"  {row.name} = {row.text}" + ("" if row.computed else _ZERO) for row in stage.losses])
    moving = any(not row.constant for row in stage.weights)
    _heading(console, f"weights over {stage.steps} steps" if moving else "weights")
    _weights(console, stage)
    if stage.layer_map:
        _heading(console, "layer map")
        _map(console, stage.layer_map)
    _heading(console, "what counts")
    _counts(console, stage.losses)
    _heading(console, "forwards of a step")
    _table(
        console,
        ("", "gradient", "runs", "taps", "hooks"),
        [(f.name, "yes" if f.gradient else "no", f.extent, ", ".join(f.taps), str(f.hooks)) for f in stage.forwards],
    )
    passes = [(f.name, f"a pass of {f.model}", f.changes) for f in stage.forwards if f.name != f.model]
    if passes:
        _heading(console, "passes")
        for name, model, changes in passes:
            _lines(console, [f"{name}: {model}", *(f"  {change}" for change in changes)])
    shared = list(stage.shared)
    shared += [f"{', '.join(group)} read the same logits" for group in stage.same_logits if len(group) > 1]
    shared += [
        f"{', '.join(row.losses)}: run with the head of {' and '.join(row.models)}, logits are never whole"
        for row in stage.fused
    ]
    if shared:
        _heading(console, "shared")
        _lines(console, shared)
    _heading(console, "training")
    facts = [
        ("trains", ", ".join(stage.trains)),
        ("optim", stage.optim),
        ("data", stage.source),
        (
            "batch",
            f"{stage.batch} texts" + (f" in each of {stage.accumulate} micro-batches" if stage.accumulate > 1 else ""),
        ),
        ("columns", ", ".join(stage.columns)),
    ]
    if stage.metrics:
        facts.append(("evaluates", ", ".join(stage.metrics)))
    for policy in stage.policies:
        layers = f"{policy.hidden} hidden units, " if policy.hidden else ""
        facts.append(
            (
                f"policy {policy.name}",
                f"{policy.actions} actions, each on {policy.features} features, {layers}reward {policy.reward} of the "
                f"next step; {policy.optim}",
            )
        )
    for counter in stage.counters:
        facts.append((f"counter {counter.name}", f"from {counter.start} to {counter.stop}, up when {counter.when}"))
    size = _bytes(stage.live_bytes)
    facts.append(("memory", f"{size} of taps and results at most, in fp32, for {stage.batch} x {stage.length} tokens"))
    _table(console, (), facts)


_ZERO = "    (weight 0: not computed)"


def _weights(console: Console, stage: StageExplanation) -> None:
    moving = any(not row.constant for row in stage.weights)
    head = ("", "weight", *((f"step {step}" if place == 0 else str(step)) for place, step in enumerate(stage.points)))
    rows = [_weight(row, len(stage.points) if moving else 0) for row in stage.weights]
    _table(console, head if moving else head[:2], rows, right=range(2, len(head)))


def _weight(row: WeightRow, columns: int) -> tuple[str, ...]:
    values = [number(round(value, 6)) for value in row.values] or ["" if row.constant else "?"] * columns
    return (row.name, row.schedule, *values)


def _map(console: Console, rows: Sequence[MapRow]) -> None:
    body = []
    previous = None
    for row in rows:
        same = previous == (row.loss, row.op)
        previous = (row.loss, row.op)
        student = row.student + (f" |> {row.student_through}" if row.student_through else "")
        teacher = row.teacher + (f" |> {row.teacher_through}" if row.teacher_through else "")
        shapes = " / ".join(dict.fromkeys((row.student_shape, row.teacher_shape)))
        body.append(("" if same else row.loss, "" if same else row.op, student, teacher, shapes))
    _table(console, ("loss", "operator", "student", "<- teacher", "shape"), body)


def _counts(console: Console, losses: Iterable[LossRow]) -> None:
    body = []
    for loss in losses:
        for place, term in enumerate(loss.terms):
            op = f"{term.times} x {term.op}" if term.times > 1 else term.op
            body.append((loss.name if place == 0 else "", op, term.shape, term.counts, term.denominator))
    _table(console, ("loss", "operator", "values", "counted", "divided by"), body)


def _table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> None:
    table = Table(
        box=box.SIMPLE_HEAD if head else None,
        show_header=bool(head),
        show_edge=False,
        pad_edge=False,
        header_style="dim",
        safe_box=True,
    )
    for place in range(len(head) or 2):
        table.add_column(
            Text(head[place]) if head else "",
            justify="right" if place in set(right) else "left",
            overflow="fold",
            style="bold" if place == 0 else "",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _lines(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        indent = 2 + len(line) - len(line.lstrip())
        console.print(Padding(Text(line.lstrip()), (0, 0, 0, indent), expand=False))


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
