"""The stages of a method written out in a spec that uses it, where that means the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gkd_dsl.graph.passes import compile_plan
from gkd_dsl.graph.plan import StagePlan
from gkd_dsl.library import method_text, nodes_of
from gkd_dsl.meaning.check import Checked
from gkd_dsl.syntax import ast, parse
from gkd_dsl.text import Source

_SIMPLE = (ast.Minimize, ast.Setting, ast.Train, ast.Freeze)
_DECLARED = (
    ast.LossDecl, ast.Let, ast.MaskDecl, ast.ProjectDecl, ast.MetricDecl, ast.Pass, ast.Counter, ast.Policy,
)  # fmt: skip


def written_out(name: str, bound: Mapping[str, Sequence[str]], ends: Sequence[str]) -> list[str] | None:
    """The stages of a method over its use as `m`, with `ends` in the last of them.

    None where a stage is more than what it minimises, what it trains and its settings.
    """
    file, _ = parse(Source(name, method_text(name)))
    method = next(item for item in file.items if isinstance(item, ast.MethodDecl) and item.name.text == name)
    stages = [stmt for stmt in method.body if isinstance(stmt, ast.Stage)]
    words = _words(method, bound) | {param: param for param in readers(name)[1]}
    lines: list[str] = []
    for place, stage in enumerate(stages):
        length = _length(method, stage)
        if stage.each is not None or length is None:
            return None
        body = []
        for stmt in stage.body:
            text = _renamed(stmt, words) if isinstance(stmt, _SIMPLE) else None
            if text is None:
                return None
            body.append(text)
        if place == len(stages) - 1:
            body += ends
        lines += [
            "",
            f"stage {stage.name.text} for {length} {{",
            *(f"  {line}" for line in body),
            "}",
        ]
    return lines[1:] if lines else None


def _length(method: ast.MethodDecl, stage: ast.Stage) -> str | None:
    """How long a stage lasts, as written there or as the default of the parameter that says so."""
    if not isinstance(stage.duration, ast.Name):
        return stage.duration.span.text if stage.duration is not None else None
    named = stage.duration.id
    return next((f.default.span.text for f in method.formals if f.name.text == named and f.default is not None), None)


def readers(name: str) -> tuple[set[str], set[str]]:
    """The parameters of a method that nothing but its stages reads, and those that its stages read among others.

    Written out, the first stand in the stages; the others have to become parameters of the spec.
    """
    file, _ = parse(Source(name, method_text(name)))
    method = next(item for item in file.items if isinstance(item, ast.MethodDecl) and item.name.text == name)
    inside, outside = (
        {
            node.id
            for stmt in method.body
            if isinstance(stmt, ast.Stage) is staged
            for node in nodes_of(stmt)
            if isinstance(node, ast.Name)
        }
        for staged in (True, False)
    )
    values = {formal.name.text for formal in method.formals if formal.role is None}
    return values & (inside - outside), values & inside & outside


def _words(method: ast.MethodDecl, bound: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """What each name of the method is called outside of it; None for what has no name there."""
    words: dict[str, str | None] = {"total": "m"}
    for formal in method.formals:
        name = formal.name.text
        if formal.role is not None:
            words[name] = bound[name][0] if len(bound[name]) == 1 else None
        else:
            words[name] = _inside(formal.default)
    for stmt in method.body:
        if isinstance(stmt, _DECLARED):
            words[stmt.name.text] = f"m.{stmt.name.text}"
    return words


def _inside(default: ast.Expr | None) -> str | None:
    """A default as it may stand inside an expression."""
    if default is None:
        return None
    plain = isinstance(default, ast.Number | ast.Bool | ast.String | ast.Name)
    return default.span.text if plain else f"({default.span.text})"


def _renamed(stmt: ast.Node, words: Mapping[str, str | None]) -> str | None:
    """The text of a statement with the names of the method replaced; None where one has no name outside."""
    text, start = stmt.span.text, stmt.span.start
    for node in sorted(nodes_of(stmt), key=lambda node: -node.span.start):
        if isinstance(node, ast.Comprehension):
            return None
        if not isinstance(node, ast.Name) or node.id not in words:
            continue
        word = words[node.id]
        if word is None:
            return None
        first, last = node.span.start - start, node.span.end - start
        text = f"{text[:first]}{word}{text[last:]}"
    return " ".join(text.split())


def same_stages(wanted: Checked, found: Checked) -> bool:
    """Whether two specs train the same: equal stages but for their names."""
    one, two = (compile_plan(checked.graph).stages for checked in (wanted, found))
    return len(one) == len(two) and all(_bare(a) == _bare(b) for a, b in zip(one, two, strict=True))


def _bare(plan: StagePlan) -> StagePlan:
    stage = replace(plan.stage, key="", name="")
    return replace(plan, name="", stage=stage)
