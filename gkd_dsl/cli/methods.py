"""`gkd methods`."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from gkd_dsl.cli.options import USAGE, Json, fail

_MOST = 110


def methods(
    name: Annotated[
        str | None, typer.Argument(help="one method: its paper, equation, parameters, cost, and a spec to copy")
    ] = None,
    json: Json = False,
    source: Annotated[bool, typer.Option("--source", help="print the method's file")] = False,
    taps: Annotated[
        str | None, typer.Option("--taps", metavar="WORD", help="list those that tap this, such as attention")
    ] = None,
    teachers: Annotated[
        str | None, typer.Option("--teachers", metavar="COUNT", help="list those with one teacher, or several")
    ] = None,
    find: Annotated[
        str | None, typer.Option("--find", metavar="WORD", help="list those whose header has this word")
    ] = None,
) -> None:
    """List the method library, or show one method."""
    filtered = {"--taps": taps, "--teachers": teachers, "--find": find}
    given = [f"{option} {value}" for option, value in filtered.items() if value is not None]
    if name is None:
        if source:
            fail("--source prints the file of one method: gkd methods NAME --source", USAGE)
        _list(taps, teachers, find, given, json)
        return
    if given:
        fail(f"{given[0].split()[0]} filters the list, and {name} is one method", USAGE)
    from gkd_dsl.library import describe, method_text, names

    if name not in names():
        unknown(name)
    if source:
        typer.echo(method_text(name), nl=False)
        return
    info = describe(name)
    if not json:
        from gkd_dsl.method_page import page

        typer.echo(page(info, _width()))
        return
    from dataclasses import asdict

    from gkd_dsl.cost import costs
    from gkd_dsl.fitting import fitting
    from gkd_dsl.method_page import families_row

    found = fitting(name)
    more = {
        "families": families_row(name),
        "specimens": found.words,
        "costs": [{**asdict(cost), "extra_forwards": cost.extra} for cost in costs(name)],
        "example": found.text,
    }
    typer.echo(_json({**info.as_dict(), **more}))


def _list(taps: str | None, teachers: str | None, find: str | None, given: list[str], json: bool) -> None:
    from gkd_dsl.library import chosen, library

    found = chosen(library(), taps, teachers, find)
    if json:
        typer.echo(_json([each.as_dict() for each in found]))
        return
    if not found:
        fail(f"no method fits {' and '.join(given)}; gkd methods lists all")
    from gkd_dsl.method_page import listing

    typer.echo(listing(found, _width(120)))
    typer.echo("\ngkd methods NAME shows one with its equation, parameters and cost")
    typer.echo("gkd init --method NAME --teacher DIR writes a spec that uses it")


def unknown(name: str) -> NoReturn:
    """End the command: the library has no method of this name."""
    from gkd_dsl.diagnostics.suggest import did_you_mean
    from gkd_dsl.library import names

    near = did_you_mean(name, names())
    fail(f"the library has no method {name}; " + (f"did you mean {near[0]}?" if near else "gkd methods lists them"))


def _width(most: int = _MOST) -> int:
    """The columns of the terminal, no more than are pleasant to read."""
    from shutil import get_terminal_size

    return max(50, min(get_terminal_size((80, 24)).columns, most))


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=2, ensure_ascii=False)
