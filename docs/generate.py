"""Write the reference pages from the tables of the code: `python docs/generate.py`, or those of a folder below `docs/`.

A block of text below a comment `<!-- output of: gkd ... -->`, in any page, is written anew from that command, run
in the folder of the project; the page of benchmarks ends with the tables of `benchmarks/results/`. Every page is a
function of the code and those tables: no date, no path of this machine. The pages are committed, and a test fails
when they are stale.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo

from gkd_dsl import library
from gkd_dsl.cli.main import COMMANDS
from gkd_dsl.diagnostics import catalogue
from gkd_dsl.models.describe import describe
from gkd_dsl.models.families import FAMILIES, Family
from gkd_dsl.models.info import ModelInfo
from gkd_dsl.models.resolve import list_taps
from gkd_dsl.ops import registry
from gkd_dsl.ops.spec import OpSpec
from gkd_dsl.sources import COMMON, SOURCES, SourceArg

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))
pages_methods = importlib.import_module("pages_methods")
pages_large_models = importlib.import_module("pages_large_models")
sys.path.remove(str(DOCS))

_RESULTS = "<!-- results -->"
_SHOWN = re.compile(r"(<!-- output of: (gkd [^\n]*?) -->\n```\w+\n).*?(^```$)", re.M | re.S)

_KINDS = {
    "loss": (
        "Losses",
        "A loss gives one value for each position; the step averages over the positions that count "
        "([masks and denominators](../language/masks.md)). `<-` marks the pair that is compared. "
        "Softmax, logarithms and norms are computed in fp32.",
    ),
    "tensor": (
        "Tensors",
        "From tensors to tensors. Arithmetic may also be written with signs: `a + b`, `a * b`, `-a`, `a < b`.",
    ),
    "mask": (
        "Masks",
        "From batch columns to true or false for each position. They are written with signs: "
        "`a == b`, `a != b`, `a and b` (or `a & b`), `a or b`, `not a`. "
        "`valid_tokens` and `next_token` are put in by the checker, and can be called too.",
    ),
    "metric": (
        "Metrics",
        "Measured over a whole held-out set, never trained ([metrics](../language/metrics.md)). "
        "A loss is also a metric: `metric m = kl(...)` is its `mean_loss`.",
    ),
}
_GROUPS = {
    "E01": "Syntax",
    "E02": "Names and kinds",
    "E03": "Types, sizes and vocabulary",
    "E04": "Stages, units, parameters and objective",
    "E05": "Files: models, data, imports",
    "E06": "Not in this version",
    "W07": "Warnings",
    "E08": "While running",
}
_TASKS = {
    "encoder": "no head",
    "classification": "classes",
    "masked_lm": "masked tokens",
    "causal_lm": "next token",
}


def pages() -> dict[str, str]:
    """Every generated page by its path below `docs/`."""
    found = {
        "reference/diagnostics.md": diagnostics(),
        "reference/operators.md": operators(),
        "reference/taps.md": taps(),
        "reference/sources.md": sources(),
        "reference/methods.md": methods(),
        "reference/cli.md": command_line(),
    }
    found.update(pages_methods.pages())
    found.update(pages_large_models.pages())
    found["images/sentence_encoder.svg"] = _output("gkd graph examples/sentence_encoder.gkd --format svg")
    found["benchmarks.md"] = benchmarks((DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    found.update(shown(found))
    return {path: text.rstrip("\n") + "\n" for path, text in found.items()}


def benchmarks(page: str) -> str:
    """The page with every table of `benchmarks/results/` behind its line `<!-- results -->`, smoke runs left out."""
    lines = [page.partition(_RESULTS)[0] + _RESULTS, ""]
    for path in sorted((DOCS.parent / "benchmarks" / "results").glob("*.md")):
        if path.stem.endswith("-quick"):
            continue
        fenced = False
        for line in path.read_text(encoding="utf-8").splitlines():
            fenced = fenced != line.startswith("```")
            lines.append(f"#{line}" if line.startswith("#") and not fenced else line.rstrip())
            if line.rstrip() != line and not fenced:
                lines[-1] += "  "
        lines.append("")
    return "\n".join(lines)


def shown(generated: Iterable[str]) -> dict[str, str]:
    """The hand-written pages that show the output of a command, with that output as it is today."""
    found = {}
    for page in sorted(DOCS.rglob("*.md")):
        path, text = page.relative_to(DOCS).as_posix(), page.read_text(encoding="utf-8")
        if path not in generated and _SHOWN.search(text):
            found[path] = _SHOWN.sub(lambda match: f"{match[1]}{_output(match[2])}{match[3]}", text)
    return found


@cache
def _output(command: str) -> str:
    """What a command prints, 100 columns wide, without spaces at the ends of lines."""
    words = shlex.split(command)[1:]
    code = "import sys; from gkd_dsl.cli.main import main; main(sys.argv[1:])"
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=DOCS.parent, env={**os.environ, **plain}, capture_output=True
    )
    if result.returncode:
        raise RuntimeError(f"{command} ended with {result.returncode}: {result.stderr.decode()}")
    lines = [line.rstrip() for line in result.stdout.decode().strip("\n").splitlines()]
    return "\n".join(lines) + "\n"


def diagnostics() -> str:
    """All codes with their pages, as `gkd explain` prints them."""
    codes = catalogue.codes()
    lines = [
        "# Diagnostics",
        "",
        f"Everything that a check or a run can say, {len(codes)} codes. `gkd explain E0301` prints one page. "
        "A code that starts with E ends the check with exit code 1; one with W does not. "
        "The examples are parts of a spec: the first is wrong, the last is right.",
        "",
    ]
    for group, title in _GROUPS.items():
        inside = [code for code in codes if code.startswith(group)]
        if not inside:
            continue
        lines += [f"## {title}", "", "| code | |", "| --- | --- |"]
        lines += [f"| [{code}](#{code.lower()}) | {_cell(codes[code])} |" for code in inside]
        lines.append("")
        for code in inside:
            lines += [f"### {code}: {codes[code]} {{ #{code.lower()} }}", "", *_page_of(code), ""]
    return "\n".join(lines)


def _page_of(code: str) -> list[str]:
    """The body of a diagnostic's page, its headings made into bold words."""
    body = catalogue.explain(code).strip().splitlines()[1:]
    fenced = False
    lines: list[str] = []
    for line in body:
        fenced = fenced != line.startswith("```")
        lines.append(f"**{line.removeprefix('## ')}**" if line.startswith("## ") and not fenced else line)
    return "\n".join(lines).strip("\n").split("\n")


def operators() -> str:
    """Every operator by kind: what it computes, its signatures, its paper."""
    lines = [
        "# Operators",
        "",
        "`gkd explain kl` prints one of these. A signature says which axes must agree: two axes of one name are equal, "
        "`...` stands for any axes before the last. An argument of type `schedule` takes a number or a "
        "[schedule](../language/schedules.md). Of several signatures the first that fits is taken.",
        "",
        "An operator of your own is a Python function with such a signature: "
        "[operators in Python](../language/python.md).",
        "",
    ]
    for kind, (title, text) in _KINDS.items():
        specs = registry.specs(kind)  # type: ignore[arg-type]
        lines += [f"## {title}", "", text, "", "| operator | |", "| --- | --- |"]
        lines += [f"| [`{spec.name}`](#{_anchor(spec)}) | {_cell(spec.doc)} |" for spec in specs]
        lines.append("")
        for spec in specs:
            lines += _operator(spec)
    return "\n".join(lines)


def _anchor(spec: OpSpec) -> str:
    return f"{spec.kind}-{spec.name.replace('_', '-')}"


def _operator(spec: OpSpec) -> list[str]:
    lines = [f"### `{spec.name}` {{ #{_anchor(spec)} }}", "", spec.doc, ""]
    lines += ["```text", *(text.replace(f"{spec.name}_(", f"{spec.name}(") for text in spec.signatures), "```", ""]
    facts = [("computes", f"`{spec.formula}`" if spec.formula else "")]
    facts.append(("a position is", spec.positions))
    facts.append(("a causal model's logits", "position i is compared with token i + 1" if spec.next_token else ""))
    if spec.kind == "metric":
        facts.append(("better", "greater" if spec.greater_is_better else "smaller"))
    facts.append(("paper", spec.source))
    lines += [f"- {name}: {value}" for name, value in facts if value]
    lines.append("")
    return lines


def taps() -> str:
    """The taps of every family: the shape of each, and the module that gives it."""
    lines = [
        "# Taps by family",
        "",
        "What `gkd taps SPEC MODEL` lists, for each family that has a table. Paths and shapes are explained in "
        "[taps](../language/taps.md). Sizes come from the config field that is named; the module is where the hook is "
        "put, relative to the base model, with `i` for the block.",
        "",
        f"Families: {', '.join(f'[{family.name}](#{family.name})' for family in FAMILIES.values())}. "
        'A model of any other type has `logits`, `weight("...")` and `module("...")`.',
        "",
    ]
    with tempfile.TemporaryDirectory() as place:
        for family in FAMILIES.values():
            lines += _family(family, Path(place))
    return "\n".join(lines)


def _family(family: Family, place: Path) -> list[str]:
    infos = {task: _described(family, task, place) for task in family.classes}
    lines = [
        f"## {family.name} {{ #{family.name} }}",
        "",
        "| head | class | `logits` | `pooled` |",
        "| --- | --- | --- | --- |",
    ]
    for task, info in infos.items():
        rows = {row.path: row for row in list_taps(info, "m")}
        logits, pooled = rows["logits"], rows["pooled"]
        lines.append(
            f"| `{task}` ({_TASKS[task]}) | `{info.architecture}` | {_bare(logits.type) if logits.available else 'no'} "
            f"| {'yes' if pooled.available else 'no'} |"
        )
    lines += ["", "| size | config field |", "| --- | --- |"]
    for size, field in family.fields.items():
        divided = " / heads" if size == "D" and field == family.fields["H"] else ""
        lines.append(f"| `{size}` | `{field}`{divided} |")
    lines += ["", "| tap | shape | where |", "| --- | --- | --- |"]
    info = infos["encoder"]
    for row in list_taps(info, "m"):
        if row.path in ("logits", "pooled"):
            continue
        path = row.path.replace(f"[0..{info.size('N')}]", "[0..N]").replace(
            f"[0..{(info.size('N') or 0) - 1}]", "[0..N-1]"
        )
        where = row.hook if row.available else f"not here: {row.why}"
        where = where.replace(f".{(info.size('N') or 0) - 1} ", ".(N-1) ").replace(f"{info.architecture}", "the model")
        lines.append(f"| `{path}` | {_bare(row.type)} | {_cell(_heads(where, info))} |")
    lines.append("")
    return lines


def _described(family: Family, task: str, place: Path) -> ModelInfo:
    """A model of a family with the sizes of its default config."""
    folder = place / family.name / task
    folder.mkdir(parents=True)
    config = {"model_type": family.name, "architectures": [family.classes[task]]}  # type: ignore[index]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return describe(str(folder), task=task, num_labels=2 if task == "classification" else None, offline=True)  # type: ignore[arg-type]


def _heads(where: str, info: ModelInfo) -> str:
    for size in ("A", "KV"):
        where = where.replace(f", as {info.size(size)} heads", ", cut into heads")
    return where


def _bare(type_: str) -> str:
    """A shape without the numbers of one model: `[B, L, m.H = 768]` as `[B, L, H]`."""
    inside = type_.strip("[]").split(", ")
    if type_ == "its own":
        return type_
    return f"`[{', '.join(part.split(' = ')[0].removeprefix('m.') for part in inside)}]`"


def sources() -> str:
    """Every data source with its arguments."""
    lines = [
        "# Data sources",
        "",
        "`data d = csv(...)` declares one; what happens to its rows is in [data](../language/data.md). "
        "The first argument may be given by place, the others by name.",
        "",
        "## Arguments of every source { #common }",
        "",
        *_arguments(COMMON),
        "",
        "`text` takes all of these but `labels` and `threshold`.",
        "",
    ]
    common = {arg.name for arg in COMMON}
    for kind in SOURCES.values():
        own = [arg for arg in kind.args if arg.name not in common]
        lines += [
            f"## `{kind.name}`",
            "",
            kind.doc,
            "",
            *_arguments(own),
            "",
            "and [those of every source](#common).",
            "",
        ]
    return "\n".join(lines)


def _arguments(args: Iterable[SourceArg]) -> list[str]:
    lines = ["| argument | type | default | |", "| --- | --- | --- | --- |"]
    for arg in args:
        text = str(arg)
        default = "required" if arg.required else f"`{text.partition(' = ')[2]}`"
        doc = arg.doc + (f": {', '.join(f'`{choice}`' for choice in arg.choices)}" if arg.choices else "")
        lines.append(f"| `{arg.name}` | {arg.type.replace('_', ' ')} | {default} | {_cell(doc)} |")
    return lines


def methods() -> str:
    """The library in one table."""
    found = library.library()
    lines = [
        "# Methods",
        "",
        f"The {len(found)} methods that ship. Each is one `.gkd` file that `gkd methods NAME --source` prints, to "
        'read, copy and change. `import "gkd:kd" use kd` brings one into a spec ([methods](../language/methods.md)).',
        "",
        "| method | | paper | compares |",
        "| --- | --- | --- | --- |",
    ]
    for info in found:
        paper = f"[{info.arxiv}](https://arxiv.org/abs/{info.arxiv}), {info.venue}" if info.arxiv else info.venue
        cells = (f"[`{info.name}`](../methods/{info.name}.md)", _cell(info.title), _cell(paper), _cell(info.taps))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def command_line() -> str:
    """Every command with its arguments and options."""
    found = {name: getattr(importlib.import_module(module), function) for name, (module, function) in COMMANDS.items()}
    lines = [
        "# Command line",
        "",
        "Exit codes: 0 fine, 1 the spec or the run is at fault, 2 usage, 130 stopped on request. "
        "`--json` prints JSON for programs. Colours appear on a terminal only, and not where `NO_COLOR` is set. "
        "`gkd --version` prints the version.",
        "",
        "| command | |",
        "| --- | --- |",
    ]
    lines += [f"| [`gkd {name}`](#gkd-{name}) | {_cell(_doc(function))} |" for name, function in found.items()]
    lines.append("")
    for name, function in found.items():
        options = _options(function)
        places = [option.shown if option.required else f"[{option.shown}]" for option in options if option.positional]
        usage = " ".join([f"gkd {name}", *places, "[OPTIONS]"])
        lines += [f"## `gkd {name}` {{ #gkd-{name} }}", "", _doc(function), "", "```text", usage, "```", ""]
        lines += ["| | |", "| --- | --- |"]
        lines += [f"| `{_cell(option.shown)}` | {_cell(option.help)} |" for option in options]
        lines.append("")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Option:
    shown: str
    help: str
    positional: bool
    required: bool


def _doc(function: Callable[..., None]) -> str:
    return " ".join((inspect.getdoc(function) or "").split())


def _options(function: Callable[..., None]) -> list[_Option]:
    """The arguments and options of a command, from its annotations."""
    hints = get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = next((base for base in _bases(hints[name]) if hasattr(base, "__metadata__")), hints[name])
        info = next(iter(getattr(kind, "__metadata__", ())), None)
        types = [base for base in _bases(kind) if isinstance(base, type)]
        positional = isinstance(info, ArgumentInfo)
        required = parameter.default is inspect.Parameter.empty
        metavar = getattr(info, "metavar", None) or name.rstrip("_").upper()
        help_ = getattr(info, "help", None) or ""
        if positional:
            found.append(_Option(metavar, help_, True, required))
            continue
        # In `Annotated` the first name of an option stands where its default used to.
        written = (getattr(info, "default", None), *(getattr(info, "param_decls", None) or ()))
        names = ", ".join(each for each in written if isinstance(each, str) and each.startswith("-"))
        names = names or f"--{name.rstrip('_').replace('_', '-')}"
        choices = next((base for base in types if issubclass(base, Enum)), None)
        if choices is not None:
            metavar = "|".join(choice.value for choice in choices)
        shown = names if bool in types else f"{names} {metavar}"
        default = getattr(parameter.default, "value", parameter.default)
        if required:
            help_ = f"{help_} (required)"
        elif default not in (None, False):
            help_ = f"{help_} (default `{default}`)"
        found.append(_Option(shown, help_, False, required))
    return found


def _bases(hint: Any) -> Iterator[Any]:
    """A type hint and everything inside it."""
    yield hint
    for inner in get_args(hint):
        yield from _bases(inner)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write(folder: Path = DOCS, only: str = "") -> list[str]:
    """Write every page whose path begins with `only`; gives the paths of those that changed."""
    changed = []
    for path, text in pages().items():
        if not path.startswith(only):
            continue
        target = folder / path
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            changed.append(path)
    config = DOCS.parent / "mkdocs.yml"
    if folder == DOCS and "methods/".startswith(only):
        config.write_text(pages_methods.navigation(config.read_text(encoding="utf-8")), encoding="utf-8")
    return changed


if __name__ == "__main__":
    for name in write(only=sys.argv[1] if len(sys.argv) > 1 else ""):
        print(f"wrote docs/{name}")
