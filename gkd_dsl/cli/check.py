"""`gkd check`."""

from __future__ import annotations

import typer

from gkd_dsl.cli.options import FAULT, Json, Online, Sets, Spec, Trust, checked, show
from gkd_dsl.diagnostics.render import render_json


def check(spec: Spec, set_: Sets = None, json: Json = False, online: Online = False, trust: Trust = False) -> None:
    """Check a spec: names, shapes, units, vocabulary. Loads no weights."""
    result = checked(spec, set_, online=online, trust=trust)
    for diagnostic in result.later:
        result.diagnostics.add(diagnostic)
    if json:
        typer.echo(render_json(result.diagnostics))
    else:
        show(result.diagnostics, err=False)
        if result.ok:
            stages = ", ".join(stage.name for stage in result.stages)
            parts = [f"{len(result.models)} models" if len(result.models) != 1 else "1 model"]
            parts.append(f"stages: {stages}" if stages else "methods only")
            if result.unset:
                parts.append(f"to be set: {', '.join(result.unset)}")
            typer.echo(f"{spec}: ok ({'; '.join(parts)})")
    if not result.ok:
        raise typer.Exit(FAULT)
