"""`gkd methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from gkd_dsl.cli.options import Json, fail


def methods(
    name: Annotated[
        str | None, typer.Argument(help="one method: its paper, equation, parameters, and a spec to copy")
    ] = None,
    json: Json = False,
    source: Annotated[bool, typer.Option("--source", help="print the method's file")] = False,
) -> None:
    """List the method library, or show one method."""
    from gkd_dsl.library import MethodInfo, describe, library, method_text, names

    if name is None:
        found = library()
        if json:
            typer.echo(_json([each.as_dict() for each in found]))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("method", "title", "paper", "stages", "taps", box=None, pad_edge=False, header_style="bold")
        for each in found:
            table.add_row(each.name, each.title, f"{each.venue}, arXiv {each.arxiv}", each.stages, each.taps)
        Console().print(table)
        typer.echo("\ngkd methods NAME shows one with its equation and parameters")
        return
    if name not in names():
        from gkd_dsl.diagnostics.suggest import did_you_mean

        near = did_you_mean(name, names())
        fail(f"the library has no method {name}" + (f"; did you mean {near[0]}?" if near else ""))
    if source:
        typer.echo(method_text(name), nl=False)
        return
    info: MethodInfo = describe(name)
    typer.echo(_json(info.as_dict()) if json else info.page())


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=2, ensure_ascii=False)
