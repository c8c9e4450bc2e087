"""The pages of the method library: one for each method from its file, plan, tests and tables, and the index."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from gkd_dsl import library
from gkd_dsl.cost import stage_costs
from gkd_dsl.fitting import fitting
from gkd_dsl.graph.draw import draw
from gkd_dsl.method_page import families_row

DOCS = Path(__file__).resolve().parent
TESTS = DOCS.parent / "tests" / "stdlib_methods"
RESULTS = DOCS.parent / "benchmarks" / "results" / "methods.md"


def pages() -> dict[str, str]:
    """Every page and picture of the methods by its path below `docs/`."""
    found = {"methods/index.md": index()}
    for info in library.library():
        found[f"methods/{info.name}.md"] = method(info)
        if fitting(info.name).fits:
            found[f"images/methods/{info.name}.svg"] = draw(fitting(info.name).checked.graph, "svg")
    return found


def index() -> str:
    """All methods in one table."""
    found = library.library()
    lines = [
        "# All methods",
        "",
        f"{len(found)} methods ship with the library, each a `.gkd` file. `gkd methods` prints this list, `gkd methods "
        "NAME` one of them, and `gkd init --method NAME --teacher DIR` writes a spec that uses it. How to use two at "
        "once is in [combining methods](../guides/combining-methods.md).",
        "",
        "| method | | venue | teachers | stages | taps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for info in found:
        cells = (
            f"[`{info.name}`]({info.name}.md)", info.title, _venue(info), info.teachers, info.stages, info.taps,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cell(text) for text in cells)} |")
    lines += ["", "## What a step runs", ""]
    lines += [
        "Forwards, and parameters that train beside the student, of the dearest stage of each, for the models that "
        "its page names.",
        "",
        "| method | stage | forwards | with a backward | beside the student |",
        "| --- | --- | --- | --- | --- |",
    ]
    for info in found:
        stages = [cost for _, cost in stage_costs(info.name)]
        if not stages:
            continue
        cost = max(stages, key=lambda cost: (len(cost.forwards), sum(forward.blocks for forward in cost.forwards)))
        backward = sum(forward.trains for forward in cost.forwards)
        beside = sum(part.parameters or 0 for part in cost.beside)
        cells = (f"[`{info.name}`]({info.name}.md)", f"`{cost.stage}`", str(len(cost.forwards)), str(backward),
                 f"{beside:,}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def method(info: library.MethodInfo) -> str:
    """One method: paper, equation, parameters, cost, graph, families, results, tests, and its file."""
    lines = [f"# {info.title}", "", f"{info.paper.rstrip('.')}. {_venue(info)}.", ""]
    lines += ["```text", info.equation, "```", "", info.remarks, ""]
    models = ", ".join(
        f"{role} `{name}`{' (one or several)' if name in info.several else ''}" for role, name in info.roles
    )
    total = ", `total`" if info.total else ""
    lines += [
        f"- models: {models}",
        f"- losses: {', '.join(f'`{name}`' for name in info.losses)}{total}",
        f"- stages: {', '.join(f'`{name}`' for name in info.stage_names)}",
        f"- compares: {info.taps}",
        f"- needs: {info.needs}",
        *([f"- in the same file: {', '.join(f'`{name}`' for name in info.beside)}"] if info.beside else []),
        "",
    ]
    if info.params:
        lines += ["| parameter | type | default | range | |", "| --- | --- | --- | --- | --- |"]
    for param in info.params:
        within = f"`{param.within}`" if param.within else ""
        lines.append(f"| `{param.name}` | {param.type} | `{param.default}` | {within} | {cell(param.doc)} |")
    lines += [*_use(info), *_cost(info), *_families(info), *_results(info), *_tested(info)]
    lines += ["", "## The file", "", "```gkd", library.method_text(info.name).rstrip(), "```"]
    return "\n".join(lines)


def _venue(info: library.MethodInfo) -> str:
    arxiv = f"[arXiv {info.arxiv}](https://arxiv.org/abs/{info.arxiv})" if info.arxiv else ""
    return ", ".join(part for part in (info.venue, arxiv) if part)


def _use(info: library.MethodInfo) -> list[str]:
    lines = ["", "## To use it", "", "```gkd", fitting(info.name).text.rstrip(), "```", ""]
    alone = "`run m` runs the stages of the paper."
    plain = [name for name in info.losses if name not in info.indexed]
    if info.total:
        alone += " To weight the losses in a stage of your own, leave `run m` out and minimise `m` (its total)"
        alone += f" or one of its losses, such as `m.{plain[0]}`." if plain else "."
    teachers = "--teacher DIR " * (2 if info.several or [r for r, _ in info.roles].count("teacher") > 1 else 1)
    written = f"gkd init --method {info.name} {teachers}--student DIR --data FILE"
    return [*lines, alone, "", f"`{written}` writes a longer one for models and rows of your own."]


def _cost(info: library.MethodInfo) -> list[str]:
    found = fitting(info.name)
    if not found.fits:
        return []
    lines = ["", "## Cost", "", f"A step of each stage, for {found.words}:", ""]
    lines += ["| stage | forward | of | runs | taps |", "| --- | --- | --- | --- | --- |"]
    beside = []
    for title, cost in stage_costs(info.name):
        for forward in cost.forwards:
            run = "whole" if forward.blocks == forward.of else f"{forward.blocks} of {forward.of} blocks"
            way = ", ".join(("with a backward" if forward.trains else "forward only", *forward.changes))
            taps = ", ".join(f"`{path}`" for path in forward.paths)
            cells = (title, f"`{forward.name}`", f"`{forward.model}`", f"{run}, {way}", taps)
            lines.append(f"| {' | '.join(cells)} |")
        what = "beside the student " if cost.student else ""
        beside += [
            f"- {title}: {what}trains {part.kind} `{part.name}`{_size(part.parameters)}" for part in cost.grouped
        ]
    if beside:
        lines += ["", *beside]
    return [*lines, "", f"![The graph of {info.name}](../images/methods/{info.name}.svg)"]


def _size(parameters: int | None) -> str:
    return "" if parameters is None else f", {parameters:,} parameters"


def _families(info: library.MethodInfo) -> list[str]:
    row = families_row(info.name)
    if not row:
        return []
    lines = [
        "",
        "## Families",
        "",
        f"| {' | '.join(row)} |",
        f"|{' --- |' * len(row)}",
        f"| {' | '.join(row.values())} |",
    ]
    return [*lines, "", "What a code says is in [the table of all methods](families.md)."]


def _results(info: library.MethodInfo) -> list[str]:
    """The rows of the table of results that begin with the method's name."""
    if not RESULTS.is_file():
        return []
    lines = [line for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    kept, heads = [], 0
    for place, line in enumerate(lines):
        if place + 1 < len(lines) and re.fullmatch(r"\|[\s:|-]+\|", lines[place + 1]):
            head = lines[place : place + 2]
        elif re.sub(r"\W", "", line.split("|")[1]) == info.name:
            kept += [*([""] if heads else []), *head, line]
            heads += 1
    if not kept:
        return []
    return ["", "## Measured", "", *kept, "", "How, and beside what, is in [benchmarks](../benchmarks.md)."]


def _tested(info: library.MethodInfo) -> list[str]:
    """What the tests of a method say: their docstrings, or their names in words."""
    path = TESTS / f"test_{info.name}.py"
    if not path.is_file():
        return []
    said = dict.fromkeys(
        _sentence(ast.get_docstring(node)) or node.name.removeprefix("test_").replace("_", " ")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )
    where = f"`tests/stdlib_methods/{path.name}` checks that"
    lines = ["", "## What is tested", "", where, "", *(f"- {cell(line)}" for line in said), ""]
    return [
        *lines,
        "`tests/methods/` checks for every method that padding changes nothing, that parts of a batch add up, that "
        "gradients are those of finite differences, that it steps in bf16, and that a run which is killed goes on "
        "as if it had not been.",
    ]


def _sentence(docstring: str | None) -> str:
    """The first sentence of a docstring."""
    return re.split(r"[.:;](?:\s|$)", " ".join((docstring or "").split()))[0]


def navigation(config: str) -> str:
    """The text of `mkdocs.yml` with a line for each page of a method."""
    head, mark, rest = config.partition("      - Method pages:\n")
    if not mark:
        raise ValueError("mkdocs.yml has no `- Method pages:` in its nav")
    indent = " " * 10
    tail = rest.splitlines(keepends=True)
    while tail and tail[0].startswith(indent):
        tail.pop(0)
    written = ["index", *(["families"] if (DOCS / "methods" / "families.md").is_file() else []), *library.names()]
    return head + mark + "".join(f"{indent}- methods/{name}.md\n" for name in written) + "".join(tail)


def cell(text: str) -> str:
    """A text as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
