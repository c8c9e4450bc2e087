"""`gkd run`, `gkd eval` and `gkd export`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gkd_dsl.cli.options import FAULT, USAGE, Json, Sets, Spec, checked, colored, fail, overrides, require_ok
from gkd_dsl.diagnostics import SpecError
from gkd_dsl.diagnostics.render import render_text

if TYPE_CHECKING:
    from gkd_dsl.meaning.check import Checked
    from gkd_dsl.runtime.session import Outcome

STOPPED = 130
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]


@contextmanager
def in_words(kept: str = "") -> Iterator[None]:
    """End with what went wrong in words; a traceback would be a fault of ours. `kept` is said of an interruption."""
    from gkd_dsl.models.errors import ModelError
    from gkd_dsl.runtime.data import DataError
    from gkd_dsl.runtime.errors import RunError, Stopped
    from gkd_dsl.runtime.export import ExportError

    try:
        yield
    except SpecError as error:
        typer.echo(render_text(error.diagnostics, color=colored()), err=True)
        raise typer.Exit(FAULT) from error
    except RunError as error:
        hint = f"\n   = {error.hint}" if error.hint else ""
        typer.echo(f"error[{error.code}]: {error.message}{hint}", err=True)
        raise typer.Exit(FAULT) from error
    except (DataError, ExportError, ModelError) as error:
        hint = f"\n   = {error.hint}" if error.hint else ""
        text = getattr(error, "message", None) or getattr(error, "reason", None) or str(error)
        typer.echo(f"error: {text}{hint}", err=True)
        raise typer.Exit(FAULT) from error
    except Stopped as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(STOPPED) from stopped
    except KeyboardInterrupt as error:
        typer.echo(f"interrupted; {kept}" if kept else "interrupted", err=True)
        raise typer.Exit(STOPPED) from error


def run(
    spec: Spec,
    set_: Sets = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the run folder; else runs/NAME")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the newest run of this spec, or the one in --out")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="never ask the model hub")] = False,
    processes: Annotated[
        int, typer.Option("--processes", min=1, max=1024, help="share every micro-batch out over N processes")
    ] = 1,
    json: Json = False,
) -> None:
    """Check a spec, run its stages, export the student."""
    import os

    ranked = os.environ.get("WORLD_SIZE") not in (None, "1")
    main = not ranked or os.environ.get("RANK") == "0"

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    params = overrides(set_)
    name = Path(spec).stem
    if resume and not params:
        params = _params_of(name, out)
    result = checked(spec, [f"{key}={value}" for key, value in params.items()], online=not offline)
    require_ok(result)
    if processes > 1:
        if ranked:
            fail("this process is one of several already: leave out `--processes`", USAGE)
        _launch(spec, params, processes, out=out, resume=resume, offline=offline, json=json)
    with in_words("the last checkpoint, where there is one, is whole: go on with `--resume`"):
        from rich.console import Console

        from gkd_dsl.runtime.progress import Progress
        from gkd_dsl.runtime.session import run_spec

        for path in result.python:
            typer.echo(f"runs the code of {path}", err=True)
        outcome = run_spec(
            result, name=name, params=params, out=out, resume=resume, listeners=[Progress(Console(stderr=True))]
        )
    if main:
        _report(result, outcome, json=json)


def _launch(
    spec: str, params: dict[str, str], processes: int, *, out: Path | None, resume: bool, offline: bool, json: bool
) -> NoReturn:
    """Run in several processes, and end as they end."""
    from gkd_dsl.cli.launch import arguments_of, launch

    words = arguments_of(spec, params, out=out, resume=resume, offline=offline, json=json)
    code, told = launch(words, processes)
    if told:
        typer.echo(f"error: {told}", err=True)
    raise typer.Exit(code)


def _params_of(name: str, out: Path | None) -> dict[str, str]:
    """The parameters that the run to go on with was started with."""
    with in_words():
        from gkd_dsl.runtime.session import about, newest

        return about(out if out is not None else newest(name)).get("params", {})


def _report(result: Checked, outcome: Outcome, *, json: bool) -> None:
    if json:
        import json as json_

        report = {
            "folder": str(outcome.folder),
            "exports": {name: str(path) for name, path in outcome.exports.items()},
            "metrics": {stage: dict(found) for stage, found in outcome.metrics.items()},
            "before": {stage: dict(found) for stage, found in outcome.before.items()},
            "comparison": outcome.comparison.to_json() if outcome.comparison is not None else None,
        }
        typer.echo(json_.dumps(report, indent=2))
        return
    from rich.console import Console

    console = Console()
    if outcome.comparison is not None:
        console.print(outcome.comparison.table())
    elif outcome.metrics:
        for stage, found in outcome.metrics.items():
            for name, value in found.items():
                typer.echo(f"{stage}: {name} = {value:.4f}")
    typer.echo(f"run      {outcome.folder}")
    for name, path in outcome.exports.items():
        typer.echo(f"{name:8} {path}")
        typer.echo(f"to use   {_use(result, name, path)}")


def _use(result: Checked, name: str, path: Path) -> str:
    """What loads an export in Python; an adapter is put on its base, as the model card says."""
    held = result.models[name].info.build.lora
    if held is not None and held.export == "adapter":
        return f'peft.PeftModel.from_pretrained(base, "{path}"), with the base of {path}/README.md'
    return f'{_loads(result, name)}.from_pretrained("{path}")'


def _loads(result: Checked, name: str) -> str:
    """The transformers class that loads a model."""
    classes = {
        "encoder": "AutoModel",
        "classification": "AutoModelForSequenceClassification",
        "masked_lm": "AutoModelForMaskedLM",
        "causal_lm": "AutoModelForCausalLM",
    }
    return f"transformers.{classes[result.models[name].info.task]}"


def _opened(folder: Path) -> tuple[Checked, Path]:
    """The spec of a run folder, checked with the parameters of the run."""
    with in_words():
        from gkd_dsl.runtime.session import about

        found = about(folder)
    result = checked(found["spec"], [f"{key}={value}" for key, value in found["params"].items()])
    require_ok(result)
    return result, folder


def evaluate(
    folder: Run,
    checkpoint: Annotated[str, typer.Option(help="`last` or `best`")] = "last",
    json: Json = False,
) -> None:
    """Evaluate every metric of a run over its held-out set, from a checkpoint."""
    result, folder = _opened(folder)
    with in_words():
        from gkd_dsl.runtime.reopen import evaluate_run

        found = evaluate_run(result, folder, checkpoint)
    if json:
        import json as json_

        typer.echo(json_.dumps(found, indent=2))
        return
    for stage, metrics in found.items():
        for name, value in metrics.items():
            typer.echo(f"{stage}: {name} = {value:.4f}")


def export(
    folder: Run,
    to: Annotated[Path, typer.Option("--to", help="where to write the model")],
    model: Annotated[str | None, typer.Option(help="which model; else the student")] = None,
    checkpoint: Annotated[str, typer.Option(help="`last` or `best`")] = "last",
) -> None:
    """Write a model of a run as transformers loads it, from a checkpoint."""
    result, folder = _opened(folder)
    if model is not None and model not in result.models:
        fail(f"the spec has no model {model}; its models: {', '.join(result.models)}")
    with in_words("nothing was exported"):
        from gkd_dsl.runtime.reopen import export_run

        path, name = export_run(result, folder, checkpoint, to, model)
    typer.echo(f"{name:8} {path}")
    typer.echo(f"to use   {_use(result, name, path)}")
