"""`gkd cache`: a teacher's outputs stored, so that runs go without it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gkd_dsl.cli.options import Json, Sets, Spec, checked, require_ok


def cache(
    spec: Spec,
    set_: Sets = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="the folder of teachers that the runtime block places nowhere")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=0, help="how many logits of a row are stored; 0 for all")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with folders that are not complete")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="never ask the model hub")] = False,
    json: Json = False,
) -> None:
    """Run the frozen teachers of a spec once, and store the outputs that its stages read."""
    import os

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    result = checked(spec, set_, online=not offline)
    require_ok(result)
    from gkd_dsl.cli.run import STOPPED, in_words

    with in_words("the rows that are in a file by now are kept: go on with `--resume`"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from gkd_dsl.runtime.errors import Stopped
        from gkd_dsl.runtime.session import plan_of
        from gkd_dsl.runtime.teachers.fill import fill

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            tasks: dict[tuple[str, str], int] = {}

            def tell(model: str, stage: str, done: int, total: int) -> None:
                if (model, stage) not in tasks:
                    tasks[model, stage] = progress.add_task(f"{model} in {stage}", total=total)
                progress.update(tasks[model, stage], completed=done)  # type: ignore[arg-type]

            try:
                found = fill(plan_of(result), root=result.root, out=out, top_k=top_k, resume=resume, tell=tell)
            except Stopped as stopped:
                text = f"stopped in stage `{stopped.stage}` after {stopped.step} of {stopped.total} rows"
                typer.echo(f"{text}; they are stored: go on with `--resume`", err=True)
                raise typer.Exit(STOPPED) from stopped
    if json:
        import json as json_

        report = [
            {
                "model": f.model,
                "stage": f.stage,
                "folder": str(f.folder),
                "rows": f.rows,
                "bytes": f.bytes,
                "new": f.new,
            }
            for f in found
        ]
        typer.echo(json_.dumps(report, indent=2))
        return
    for item in found:
        typer.echo(f"{item.model:8} {item.folder}  {item.rows} rows, {item.bytes / 2**20:.1f} MiB, {item.new} new")
