"""`gkd graph`."""

from __future__ import annotations

import os
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gkd_dsl.cli.options import Online, Sets, Spec, checked, fail, require_ok


class Format(StrEnum):
    """How a graph is drawn."""

    MERMAID = "mermaid"
    DOT = "dot"
    SVG = "svg"
    JSON = "json"


def graph(
    spec: Spec,
    format: Annotated[Format, typer.Option(help="how to draw it")] = Format.MERMAID,
    stage: Annotated[str | None, typer.Option(help="one stage only")] = None,
    after: Annotated[str | None, typer.Option(help="the graph after a pass (see `gkd graph --help`)")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write to a file")] = None,
    set_: Sets = None,
    online: Online = False,
) -> None:
    """Draw the graph of a spec: models, taps, losses, stages. Families of equal nodes collapse."""
    result = checked(spec, set_, online=online)
    require_ok(result)
    from gkd_dsl.graph.draw import draw
    from gkd_dsl.graph.passes import PASSES, run_passes

    if stage is not None and stage not in [node.name for node in result.stages]:
        fail(f"{spec} has no stage {stage}; its stages: {', '.join(node.name for node in result.stages)}")
    if after is not None and after not in PASSES:
        fail(f"there is no pass {after}; passes: {', '.join(PASSES)}")
    found = run_passes(result.graph, until=after) if after is not None else result.graph
    text = draw(found, format.value, stage=stage)
    if output is None:
        typer.echo(text)
        return
    # Beside its place and then there: a full disk leaves an earlier drawing as it was.
    work = output.with_name(f".{output.name}.{os.getpid()}") if output.is_file() or not output.exists() else output
    try:
        work.write_text(text, encoding="utf-8")
        if work != output:
            os.replace(work, output)
    except OSError as error:
        if work != output:
            with suppress(OSError):
                work.unlink()
        fail(f"{output} cannot be written: {error.strerror or error}")
    typer.echo(f"wrote {output}")
