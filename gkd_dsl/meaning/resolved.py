"""The resolved spec: its text with every value in place, and where each came from."""

from __future__ import annotations

from dataclasses import fields, replace

from gkd_dsl import schedules
from gkd_dsl.graph.nodes import StageNode
from gkd_dsl.meaning.check import Checked
from gkd_dsl.syntax import ast, parse_expression
from gkd_dsl.syntax.printer import print_file

_STAGE = ("batch_size", "accumulate", "max_length", "seed", "checkpoint_every")


def resolved_text(checked: Checked) -> str:
    """The spec as it runs: a parameter's default is its value, and comments list all values with their origin.

    The text checks as the original does when it stands in the original's folder.
    """
    file = checked.file
    items = tuple(_with_value(checked, item) if isinstance(item, ast.Param) else item for item in file.items)
    body = print_file(replace(file, items=items))
    lines = ["", "# values"]
    width = max((len(name) for name in checked.params), default=0)
    for name, param in sorted(checked.params.items()):
        lines.append(f"#   {name:{width}} = {literal(param.value)}  ({param.origin})")
    for stage in checked.stages:
        lines += ["#", f"# stage {stage.name} for {stage.duration}", *(f"#   {line}" for line in stage_lines(stage))]
    return body.rstrip("\n") + "\n" + "\n".join(lines) + "\n"


def stage_lines(stage: StageNode) -> list[str]:
    """The settings of a stage, one a line, defaults included."""
    defaults = {field.name: field.default for field in fields(StageNode)}
    lines = [f"source = {stage.source.name if stage.source else 'none'}"]
    for name in _STAGE:
        value = getattr(stage, name)
        origin = "default" if value == defaults[name] else "spec"
        lines.append(f"{name} = {literal(value)}  ({origin})")
    optim = stage.optim
    parts = [f"{f.name} = {literal(getattr(optim, f.name))}" for f in fields(optim) if f.name != "name"]
    lines.append(f"optim = {optim.name}({', '.join(parts)})")
    trained = [f"{t.name}.{t.part}" if t.part else t.name for t in stage.trains]
    lines.append(f"train {', '.join(trained)}")
    return lines


def literal(value: object) -> str:
    """A value as it is written in a spec."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(literal(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, schedules.Span):
        amount = int(value.amount) if value.amount == int(value.amount) else value.amount
        return f"{amount}%" if value.unit == "percent" else f"{amount} {value.unit}"
    return str(value)


def _with_value(checked: Checked, item: ast.Param) -> ast.Param:
    found = checked.params.get(item.name.text)
    if found is None or found.origin == "default":
        return item
    return replace(item, default=parse_expression(literal(found.value), item.name.text))
