"""`gkd doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from gkd_dsl.cli.options import FAULT, Json


def doctor(json: Json = False) -> None:
    """Say what of this machine and its packages would keep a run from working."""
    from gkd_dsl.runtime.doctor import diagnose

    findings = diagnose()
    if json:
        import json as json_

        typer.echo(json_.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mark = "ok" if finding.ok else "--"
            typer.echo(f"{mark}  {finding.name:{width}}  {finding.detail}")
            if not finding.ok and finding.fix:
                typer.echo(f"    {'':{width}}  {finding.fix}")
    if not all(finding.ok or getattr(finding, "optional", False) for finding in findings):
        raise typer.Exit(FAULT)
