"""`gkd taps`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from gkd_dsl.cli.options import Json, Online, Sets, Spec, checked, fail, show


def taps(
    spec: Spec,
    model: Annotated[str, typer.Argument(help="the name of a model in the spec")],
    set_: Sets = None,
    json: Json = False,
    online: Online = False,
) -> None:
    """List every tap of a model: its path, shape and place."""
    from gkd_dsl.diagnostics.suggest import did_you_mean
    from gkd_dsl.models.resolve import list_taps

    result = checked(spec, set_, online=online)
    found = result.models.get(model)
    if found is None:
        show(result.diagnostics)
        near = did_you_mean(model, list(result.models))
        known = f"; its models: {', '.join(result.models)}" if result.models else ""
        fail(f"{spec} has no model {model} that could be read" + (f"; did you mean {near[0]}?" if near else known))
    rows = list_taps(found.info, model)
    if json:
        import json as json_

        typer.echo(json_.dumps([asdict(row) for row in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    info = found.info
    sizes = ", ".join(f"{name} = {size}" for name, size in info.sizes)
    console = Console()
    console.print(f"{model}: {info.architecture} at {info.location} ({sizes})", highlight=False, markup=False)
    table = Table("tap", "shape", "where", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(f"{model}.{row.path}", row.type, row.hook if row.available else f"not here: {row.why}",
                      style=None if row.available else "dim")  # fmt: skip
    console.print(table)
