"""`gkd explain`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from gkd_dsl.cli.options import Json, Online, Sets, checked, fail, require_ok


def explain(
    what: Annotated[
        str, typer.Argument(metavar="SPEC|CODE|OPERATOR", help="a .gkd file, a code such as E0301, or an operator")
    ],
    set_: Sets = None,
    json: Json = False,
    online: Online = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="print the spec with every value in place")] = False,
    steps: Annotated[int, typer.Option(help="length of a stage in steps, to show schedules over", min=1)] = 1000,
    batch: Annotated[int | None, typer.Option(help="texts in a batch, for memory", min=1)] = None,
    length: Annotated[int, typer.Option(help="tokens in a text, for memory", min=1)] = 128,
) -> None:
    """Explain a spec (objective, layer map, shapes, masks, forwards), an error code, or an operator."""
    if re.fullmatch(r"[EWew]\d{4}", what):
        _code(what.upper())
        return
    if not what.endswith(".gkd") and re.fullmatch(r"\w+", what):
        _operator(what)
        return
    result = checked(what, set_, online=online)
    require_ok(result)
    if resolved:
        from gkd_dsl.meaning.resolved import resolved_text

        typer.echo(resolved_text(result), nl=False)
        return
    if not result.stages:
        fail(f"{what} holds methods only; `gkd methods` shows those of the library")
    from gkd_dsl.graph.explain import explain as explain_graph
    from gkd_dsl.graph.explain import render

    explanation = explain_graph(result.graph, total_steps=steps, batch=batch, length=length, runtime=result.runtime)
    if json:
        import json as json_

        typer.echo(json_.dumps(explanation.as_dict(), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    render(explanation, Console())


def _code(code: str) -> None:
    from gkd_dsl.diagnostics.catalogue import explain as page

    try:
        typer.echo(page(code))
    except LookupError as error:
        fail(str(error))


def _operator(name: str) -> None:
    from gkd_dsl.diagnostics.suggest import did_you_mean
    from gkd_dsl.ops import registry

    if name == "operators":
        width = max(len(found) for found in registry.names())
        for spec in registry.specs():
            typer.echo(f"{spec.name:{width}}  {spec.kind:6}  {spec.doc}")
        return
    spec_ = registry.lookup(name)
    if spec_ is None:
        near = did_you_mean(name, registry.names())
        fail(
            f"there is no operator {name}"
            + (f"; did you mean {near[0]}?" if near else "; `gkd explain operators` lists them")
        )
    typer.echo(f"{spec_.name}: {spec_.doc}")
    typer.echo(f"  {spec_.formula}")
    for signature in spec_.signatures:
        typer.echo(f"  {signature}")
    if spec_.positions:
        typer.echo(f"  a position is {spec_.positions}")
    if spec_.source:
        typer.echo(f"  {spec_.source}")
