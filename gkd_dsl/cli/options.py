"""Options and endings that the commands share."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from gkd_dsl.diagnostics import Diagnostics
from gkd_dsl.diagnostics.render import render_text
from gkd_dsl.meaning.check import Checked, check_path

FAULT, USAGE = 1, 2

Spec = Annotated[str, typer.Argument(metavar="SPEC", help="a .gkd file")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="set a declared parameter (may be repeated)")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
Online = Annotated[
    bool, typer.Option("--online", help="fetch configs that are not in the local cache from the model hub")
]
Trust = Annotated[bool, typer.Option("--trust", help="run the Python files that the spec imports while checking")]


def fail(message: str, code: int = FAULT) -> NoReturn:
    """End with a message on standard error."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def overrides(sets: list[str] | None) -> dict[str, str]:
    """`["T=2.0"]` as `{"T": "2.0"}`; a malformed one is a usage error."""
    found: dict[str, str] = {}
    for text in sets or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            fail(f"--set takes NAME=VALUE, not {text!r}", USAGE)
        if name.strip() in found:
            fail(f"--set gives {name.strip()!r} twice", USAGE)
        found[name.strip()] = value.strip()
    return found


def colored() -> bool:
    """Whether standard output is a terminal that shows colours."""
    import os

    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def checked(spec: str, sets: list[str] | None = None, *, online: bool = False, trust: bool = False) -> Checked:
    """Check a file; one that cannot be read ends the command."""
    try:
        return check_path(spec, params=overrides(sets), offline=not online, trust=trust)
    except FileNotFoundError:
        fail(_missing(spec))
    except IsADirectoryError:
        fail(f"{spec} is a folder, not a .gkd file")
    except UnicodeDecodeError as error:
        fail(f"{spec} is not UTF-8 text (byte {error.start})")
    except OSError as error:
        fail(f"{spec} cannot be read: {error.strerror or error}")


def _missing(spec: str) -> str:
    from pathlib import Path

    from gkd_dsl.diagnostics.suggest import did_you_mean

    folder = Path(spec).parent
    names = [path.name for path in folder.glob("*.gkd")] if folder.is_dir() else []
    near = did_you_mean(Path(spec).name, names)
    hint = f"; did you mean {folder / near[0]}?" if near else ""
    return f"there is no file {spec}{hint}"


def show(diagnostics: Diagnostics, *, err: bool = True) -> None:
    """Print findings as text, coloured on a terminal."""
    if len(diagnostics):
        typer.echo(render_text(diagnostics, color=colored()), err=err)


def require_ok(result: Checked) -> None:
    """Print what was found and end the command if any of it is an error."""
    show(result.diagnostics)
    if not result.ok:
        raise typer.Exit(FAULT)
