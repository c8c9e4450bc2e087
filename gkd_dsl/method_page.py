"""The library and its methods as text of a given width: what `gkd methods` prints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from gkd_dsl.cost import stage_costs
from gkd_dsl.fitting import fitting
from gkd_dsl.library import MethodInfo
from gkd_dsl.meaning.imports import library_folder

NARROW = 100
_LEAST_DOC = 28


def listing(found: Sequence[MethodInfo], width: int) -> str:
    """The methods in a table; below 100 columns each has a second line with its taps."""
    rows = [(info.name, info.short_venue, _count(info), ", ".join(info.stage_names)) for info in found]
    heads = ("method", "venue", "teachers", "stages")
    sizes = [max(len(row[place]) for row in (heads, *rows)) for place in range(len(heads))]
    left = width - sum(sizes[:3]) - 6
    if width < NARROW:
        lines = ["  ".join(f"{word:{size}}" for word, size in zip(heads, sizes, strict=True)).rstrip()]
        for row, info in zip(rows, found, strict=True):
            stages = wrap(row[3], max(left, 10)) or [""]
            lines.append(
                "  ".join((*(f"{word:{size}}" for word, size in zip(row[:3], sizes, strict=False)), stages[0]))
            )
            lines += [" " * (width - left) + more for more in stages[1:]]
            lines += wrap(info.taps, width, initial_indent="    ", subsequent_indent="    ")
        return "\n".join(line.rstrip() for line in lines)
    sizes[3] = min(sizes[3], max(left // 2, 10))
    rest = left - sizes[3] - 2
    lines = ["  ".join((*(f"{word:{size}}" for word, size in zip(heads, sizes, strict=True)), "taps"))]
    for row, info in zip(rows, found, strict=True):
        stages, taps = wrap(row[3], sizes[3]) or [""], wrap(info.taps, rest) or [""]
        for place in range(max(len(stages), len(taps))):
            head = row[:3] if place == 0 else ("", "", "")
            cells = (*head, stages[place] if place < len(stages) else "")
            text = "  ".join(f"{word:{size}}" for word, size in zip(cells, sizes, strict=True))
            lines.append(f"{text}  {taps[place] if place < len(taps) else ''}".rstrip())
    return "\n".join(lines)


def _count(info: MethodInfo) -> str:
    """How many teachers it takes, in a word."""
    return "several" if info.several else str(sum(role == "teacher" for role, _ in info.roles))


def page(info: MethodInfo, width: int) -> str:
    """One method: paper, equation, parameters, cost, families, and a spec to copy."""
    head = f"{info.name}: {info.title}"
    lines = [head, "=" * len(head), "", *wrap(info.paper, width), *wrap(info.reference, width), ""]
    models = ", ".join(f"{role} {name}{' (or several)' if name in info.several else ''}" for role, name in info.roles)
    facts = [
        ("minimises", info.equation), ("losses", ", ".join(info.losses)), ("taps", info.taps),
        ("stages", info.stages), ("models", models), ("needs", info.needs), ("families", families_of(info.name)),
        ("with it", f"{', '.join(info.beside)}, in the same file" if info.beside else ""),
    ]  # fmt: skip
    for word, text in facts:
        if text:
            lines += wrap(text, width, initial_indent=f"{word:11}", subsequent_indent=" " * 11)
    lines.append("")
    for part in info.remarks.split("\n\n") if info.remarks else []:
        written = part.splitlines()
        code = all(line.startswith("    ") for line in written)
        lines += [*(written if code else wrap(part, width)), ""]
    lines += ["parameters", *_parameters(info, width), ""]
    found = fitting(info.name)
    if found.fits:
        lines += [*wrap(f"a step of each stage, for {found.words}", width), *cost_lines(info, width), ""]
    lines += ["to use it", "", *(f"  {line}" if line else "" for line in found.text.splitlines())]
    return "\n".join(lines)


def cost_lines(info: MethodInfo, width: int) -> list[str]:
    """The stages with their forwards, the taps of each, and what trains beside the student."""
    lines = []
    for title, cost in stage_costs(info.name):
        lines += wrap(f"{title}: {cost.words}", width, initial_indent="  ", subsequent_indent="    ")
        for forward in cost.forwards:
            lines += wrap(str(forward), width, initial_indent="    ", subsequent_indent="      ")
        lines += [f"    trains beside the student: {part}" for part in cost.grouped] if cost.student else [
            f"    trains: {part}" for part in cost.grouped
        ]  # fmt: skip
    return lines


def _parameters(info: MethodInfo, width: int) -> list[str]:
    """Name, type, default, range and meaning in columns; the meaning goes below where no room is left for it."""
    if not info.params:
        return ["  none"]
    rows = [(param.name, param.type, param.default, param.within) for param in info.params]
    sizes = [max(len(row[place]) for row in rows) for place in range(4)]
    left = width - sum(sizes) - 2 * 5
    lines = []
    for row, param in zip(rows, info.params, strict=True):
        text = "  " + "  ".join(f"{word:{size}}" for word, size in zip(row, sizes, strict=True))
        if left >= _LEAST_DOC:
            said = wrap(param.doc, left) or [""]
            lines.append(f"{text}  {said[0]}".rstrip())
            lines += [" " * (width - left) + more for more in said[1:]]
        else:
            lines.append(text.rstrip())
            lines += wrap(param.doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def families_of(name: str) -> str:
    """The families that a method runs on, from the table of the docs; nothing where that is not there."""
    row = families_row(name)
    return ", ".join(f"{family}: {answer}" for family, answer in row.items())


def families_row(name: str, table: Path | None = None) -> dict[str, str]:
    """The row of a method in `docs/methods/families.md`: family -> "yes" or the code of the refusal."""
    path = table or library_folder().parent / "docs" / "methods" / "families.md"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    for row in rows[1:]:
        if re.sub(r"\[`?(\w+)`?\]\(.*\)", r"\1", row[0]) == name:
            return {head: cell for head, cell in zip(rows[0][1:], row[1:], strict=False) if head != "models"}
    return {}
