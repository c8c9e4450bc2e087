"""The `gkd` command. Each subcommand imports what it needs, so that `check` stays quick."""

from __future__ import annotations

import gc
import importlib
import sys

import typer

COMMANDS = {
    "check": ("gkd_dsl.cli.check", "check"),
    "explain": ("gkd_dsl.cli.explain", "explain"),
    "graph": ("gkd_dsl.cli.graph", "graph"),
    "taps": ("gkd_dsl.cli.taps", "taps"),
    "plan": ("gkd_dsl.cli.plan", "plan"),
    "run": ("gkd_dsl.cli.run", "run"),
    "cache": ("gkd_dsl.cli.cache", "cache"),
    "eval": ("gkd_dsl.cli.run", "evaluate"),
    "export": ("gkd_dsl.cli.run", "export"),
    "methods": ("gkd_dsl.cli.methods", "methods"),
    "init": ("gkd_dsl.cli.init", "init"),
    "doctor": ("gkd_dsl.cli.doctor", "doctor"),
}


def application(only: str | None = None) -> typer.Typer:
    """The command line; with `only`, a single subcommand is imported."""
    app = typer.Typer(
        name="gkd",
        help="Distil language models by a spec that is checked before a weight is loaded.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, (module, function) in COMMANDS.items():
        if only is None or name == only:
            app.command(name)(getattr(importlib.import_module(module), function))
    if only is not None:
        # With one command typer would drop its name; a callback keeps it.
        app.callback()(_nothing)
    return app


def _nothing() -> None:
    """Distil language models by a spec that is checked before a weight is loaded."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the process ends with 0, 1 (spec or run at fault), 2 (usage) or 130 (interrupted)."""
    try:
        _main(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        # While modules are imported, which is before a command can say what is kept.
        sys.exit(130)


def _main(words: list[str]) -> None:
    if words[:1] == ["--version"]:
        from importlib.metadata import version

        typer.echo(f"gkd-dsl {version('gkd-dsl')}")
        return
    # Importing makes many objects that live to the end: looking for cycles among them takes a sixth of a short command.
    gc.set_threshold(100_000, 50, 50)
    only = words[0] if words and words[0] in COMMANDS else None
    application(only)(args=words, prog_name="gkd")
