"""`gkd init`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gkd_dsl.cli.options import USAGE, Online, fail, show

if TYPE_CHECKING:
    from pathlib import Path

    from gkd_dsl.scaffold import Draft


def init(
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="a method of the library, see gkd methods")],
    teacher: Annotated[
        list[str], typer.Option("--teacher", metavar="DIR", help="a model folder or hub id (again for each teacher)")
    ],
    student: Annotated[
        str | None, typer.Option("--student", metavar="DIR", help="without it: half of the first teacher's layers")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="DIR", help="a model between teacher and student, where the method has one"),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="a .csv, .tsv, .jsonl or .txt file")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="COLUMN", help="the column of texts")] = None,
    label: Annotated[str | None, typer.Option("--label", metavar="COLUMN", help="the column of labels")] = None,
    num_labels: Annotated[
        int | None, typer.Option("--num-labels", metavar="COUNT", help="classes, for a teacher that has no classifier")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="SPEC", help="the file to write, - to print it; else NAME.gkd")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
    online: Online = False,
) -> None:
    """Write a spec for a method and models of your own, checked before it is written."""
    from pathlib import Path

    from gkd_dsl.library import names
    from gkd_dsl.scaffold import Request, draft
    from gkd_dsl.scaffold_data import InitError

    if method not in names():
        from gkd_dsl.cli.methods import unknown

        unknown(method)
    if num_labels is not None and num_labels < 1:
        fail(f"--num-labels is a number of classes, not {num_labels}", USAGE)
    target = Path(f"{method}.gkd" if out in (None, "-") else str(out))
    if out != "-":
        _free(target, force)
    request = Request(
        method, tuple(teacher), student, tuple(model or ()), Path(data) if data is not None else None,
        text, label, num_labels, not online,
    )  # fmt: skip
    try:
        found = draft(request, target)
    except InitError as error:
        fail(error.message + (f"\n  {error.hint}" if error.hint else ""))
    show(found.diagnostics)
    if not found.ok:
        fail(f"these do not fit {method}, so nothing was written; gkd methods {method} says what it needs")
    if out == "-":
        typer.echo(found.text, nl=False)
        return
    _write(target, found.text, force)
    typer.echo(_said(target, found))


def _said(target: Path, found: Draft) -> str:
    """What was written, and what to do next."""
    models = [f"{model.role} {model.name} ({model.info.size('N')} layers)" for model in found.checked.models.values()]
    stages = ", ".join(stage.name for stage in found.checked.stages)
    unset = "".join(f" --set {name}=..." for name in found.checked.unset)
    lines = [f"wrote {target}: {', '.join(models)}; stages: {stages}"]
    return "\n".join([*lines, f"next: gkd explain {target}", f"      gkd run {target}{unset}"])


def _free(target: Path, force: bool) -> None:
    """End the command where the file cannot be written, before anything is read."""
    if target.is_dir():
        fail(f"--out {target} is a folder; give a file in it, such as {target / 'spec.gkd'}")
    if not target.parent.is_dir():
        fail(f"--out {target}: there is no folder {target.parent}; make it first")
    if target.exists() and not force:
        fail(f"{target} is there already, and was left as it is; write another with --out, or over it with --force")


def _write(target: Path, text: str, force: bool) -> None:
    """Write all or nothing: a temporary file beside it that takes its name; without `force` never over a file."""
    import os
    import tempfile
    from pathlib import Path

    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        fail(f"{target} cannot be written: {error.strerror or error}")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        if force:
            temporary.replace(target)
        else:
            _link(temporary, target)
    except FileExistsError:
        fail(f"{target} came to be while the spec was made, and was left as it is")
    except OSError as error:
        fail(f"{target} cannot be written: {error.strerror or error}")
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: Path) -> None:
    """Give a file a second name. Raises FileExistsError where it is taken, also by a file that came meanwhile."""
    import os

    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links.
        if target.exists():
            raise FileExistsError(target) from None
        temporary.replace(target)
