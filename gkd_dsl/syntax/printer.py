"""Canonical text of a tree: what it prints parses to the same tree, places aside."""

from __future__ import annotations

from typing import Any

from gkd_dsl.syntax import ast
from gkd_dsl.syntax.build import escape

_LEVELS = {
    "or": 1, "and": 2, "&": 3, "==": 5, "!=": 5, "<": 5, "<=": 5, ">": 5, ">=": 5, "+": 8, "-": 8, "*": 9, "/": 9,
    "%": 9,
}  # fmt: skip
_NOT, _COMPARISON, _PAIR, _PIPE, _NEGATIVE, _POSTFIX = 4, 5, 6, 7, 10, 11
_SIGNS = {"percent": "%", "steps": " steps", "epochs": " epochs", "tokens": " tokens"}


def print_file(file: ast.File) -> str:
    """The text of a file: its header, one declaration a line, blocks indented by two blanks. Comments are left out."""
    lines = [f"gkd {file.header.version}"] if file.header is not None else []
    last: type | None = None
    for item in file.items:
        block = _has_block(item)
        if last is not type(item) or block:
            lines.append("")
        lines.extend(statement(item))
        last = type(item)
    return "\n".join(lines).lstrip("\n") + "\n"


def print_expression(expr: ast.Expr) -> str:
    """The text of an expression, with the parentheses it needs and no others."""
    return _expression(expr, 0)


def print_signature(signature: ast.Signature) -> str:
    """The text of a signature."""
    args = ", ".join(_signature_arg(arg) for arg in signature.args)
    where = " where " + ", ".join(_expression(expr, 0) for expr in signature.where) if signature.where else ""
    return f"{signature.name.text}({args}) -> {print_type(signature.result)}{where}"


def print_type(type_: ast.TypeExpr) -> str:
    """`Float[B, L, s.H]`."""
    if type_.dims is None:
        return type_.name.text
    return f"{type_.name.text}[{', '.join(dim.text for dim in type_.dims)}]"


def _signature_arg(arg: ast.SignatureArg) -> str:
    teacher = f" <- {arg.teacher.name.text}: {print_type(arg.teacher.type)}" if arg.teacher is not None else ""
    return f"{arg.name.text}: {print_type(arg.type)}{teacher}{_default(arg.default, arg.within)}"


# --- expressions ---


def _expression(expr: ast.Expr, level: int) -> str:
    text, own = _at_level(expr)
    return f"({text})" if own < level else text


def _at_level(expr: ast.Expr) -> tuple[str, int]:
    """The text of an expression and how tight it binds."""
    match expr:
        case ast.Name():
            return expr.id, _POSTFIX
        case ast.Number():
            return _number(expr.value), _POSTFIX
        case ast.Duration():
            return f"{_plain(expr.value)}{_SIGNS[expr.unit]}", _POSTFIX
        case ast.String():
            return f'"{escape(expr.value)}"', _POSTFIX
        case ast.Bool():
            return "true" if expr.value else "false", _POSTFIX
        case ast.List():
            return f"[{', '.join(_expression(item, 1) for item in expr.items)}]", _POSTFIX
        case ast.Attr():
            return f"{_expression(expr.base, _POSTFIX)}.{expr.name.text}", _POSTFIX
        case ast.Index():
            return f"{_expression(expr.base, _POSTFIX)}[{', '.join(_expression(a, 0) for a in expr.args)}]", _POSTFIX
        case ast.Call():
            return f"{_expression(expr.func, _POSTFIX)}({_args(expr.args)})", _POSTFIX
        case ast.Unary(op="-"):
            return f"-{_expression(expr.value, _NEGATIVE)}", _NEGATIVE
        case ast.Unary():
            return f"not {_expression(expr.value, _NOT)}", _NOT
        case ast.Binary():
            own = _LEVELS[expr.op]
            left = _expression(expr.left, own + 1 if own == _COMPARISON else own)
            return f"{left} {expr.op} {_expression(expr.right, own + 1)}", own
        case ast.Pair():
            return f"{_expression(expr.left, _PIPE)} <- {_expression(expr.right, _PIPE)}", _PAIR
        case ast.Pipe():
            return f"{_expression(expr.value, _PIPE)} |> {_expression(expr.block, _PIPE + 1)}", _PIPE
        case ast.Range():
            sign = "..=" if expr.inclusive else "..<"
            return f"{_expression(expr.lo, 1)} {sign} {_expression(expr.hi, 1)}", 0
        case ast.Arrow():
            return f"{_expression(expr.left, 1)} -> {_expression(expr.right, 1)}", 0
        case ast.Comprehension():
            return f"{_expression(expr.element, 1)} {_over(expr.binders, expr.iterable)}", 0
        case ast.Missing():
            return "missing", _POSTFIX
    raise AssertionError(expr)


def _number(value: int | float) -> str:
    if isinstance(value, int):
        return str(value)
    text = repr(value)
    return text if "." in text or "e" in text else text + ".0"


def _plain(value: float) -> str:
    """A duration's amount: whole where it is whole."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _args(args: tuple[ast.Arg, ...]) -> str:
    return ", ".join(f"{arg.name.text} = {_expression(arg.value, 0)}" if arg.name else _expression(arg.value, 0)
                     for arg in args)  # fmt: skip


def _over(binders: tuple[ast.Ident, ...], iterable: ast.Expr) -> str:
    names = ", ".join(binder.text for binder in binders)
    return f"for {f'({names})' if len(binders) > 1 else names} in {_expression(iterable, 0)}"


# --- statements ---


def _has_block(item: Any) -> bool:
    return isinstance(item, ast.MethodDecl | ast.Stage | ast.Runtime | ast.Policy) or bool(getattr(item, "body", ()))


def _names(idents: tuple[ast.Ident, ...]) -> str:
    return ", ".join(ident.text for ident in idents)


def _indices(idents: tuple[ast.Ident, ...]) -> str:
    return f"[{_names(idents)}]" if idents else ""


def _default(default: ast.Expr | None, within: ast.Range | None) -> str:
    text = f" = {_expression(default, 1)}" if default is not None else ""
    return text + (f" in {_expression(within, 0)}" if within is not None else "")


def _doc(doc: str | None) -> str:
    return f' "{escape(doc)}"' if doc is not None else ""


def _formal(formal: ast.Formal) -> str:
    if formal.role is not None or formal.type is None:
        return f"{formal.role} {formal.name.text}"
    tail = _default(formal.default, formal.within) + _doc(formal.doc)
    return f"{formal.name.text}: {print_type(formal.type)}{tail}"


def _block(head: str, body: tuple[Any, ...]) -> list[str]:
    if not body:
        return [head + " {}"]
    return [head + " {", *("  " + line for node in body for line in statement(node)), "}"]


def statement(node: Any) -> list[str]:
    """The lines of a declaration or a statement."""
    e = print_expression
    match node:
        case ast.ImportAs():
            return [f'import "{escape(node.path.value)}" as {node.alias.text}']
        case ast.ImportUse():
            return [f'import "{escape(node.path.value)}" use {_names(node.names)}']
        case ast.ImportPython():
            return [f'import python "{escape(node.path.value)}" as {node.alias.text}']
        case ast.Param():
            tail = _default(node.default, node.within) + _doc(node.doc)
            return [f"param {node.name.text}: {print_type(node.type)}{tail}"]
        case ast.DimDecl():
            return [f"dim {_names(node.names)}"]
        case ast.ModelDecl():
            head = f"{node.role} {node.name.text} = {e(node.value)}"
            return _block(head, node.body) if node.body else [head]
        case ast.Let() | ast.ProjectDecl():
            keyword = "let" if isinstance(node, ast.Let) else "project"
            return [f"{keyword} {node.name.text}{_indices(node.indices)} = {e(node.value)}"]
        case ast.DataDecl() | ast.MaskDecl() | ast.MetricDecl():
            keyword = {ast.DataDecl: "data", ast.MaskDecl: "mask"}.get(type(node), "metric")
            return [f"{keyword} {node.name.text} = {e(node.value)}"]
        case ast.LossDecl():
            formals = f"({', '.join(map(_formal, node.formals))})" if node.formals is not None else ""
            return [f"loss {node.name.text}{_indices(node.indices)}{formals} = {e(node.value)}"]
        case ast.MethodDecl():
            head = f"method {node.name.text}({', '.join(map(_formal, node.formals))}){_doc(node.doc)}"
            return _block(head, node.body)
        case ast.Use():
            return [f"use {e(node.target)}({_args(node.args)}) as {node.alias.text}"]
        case ast.Run():
            return [f"run {node.name.text}"]
        case ast.Stage():
            return _block(_stage_head(node), node.body)
        case ast.Pass():
            head = f"pass {node.name.text} = {e(node.value)}"
            return _block(head, node.body) if node.body else [head]
        case ast.Counter():
            head = f"counter {node.name.text} from {e(node.start)} to {e(node.stop)}"
            return [f"{head} advance when {e(node.when)}"]
        case ast.Policy():
            return _block(f"policy {node.name.text} = {e(node.value)}", node.body)
        case ast.Runtime():
            return _block("runtime", node.body)
        case ast.Placement():
            return _block(f"{node.role} {node.name.text}", node.body)
        case ast.Setting():
            return [f"{node.name.text} = {e(node.value)}"]
        case ast.Train() | ast.Freeze():
            return [f"{'train' if isinstance(node, ast.Train) else 'freeze'} {', '.join(map(e, node.targets))}"]
        case ast.Minimize():
            return [f"minimize {e(node.value)}"]
        case ast.Total():
            return [f"total = {e(node.value)}"]
        case ast.Evaluate():
            every = f" every {e(node.every)}" if node.every is not None else ""
            return [f"evaluate {', '.join(map(e, node.metrics))}{every}"]
        case ast.KeepBest():
            return [f"keep best by {node.metric.text}"]
        case ast.Replace():
            when = f" when {e(node.when)}" if node.when is not None else ""
            return [f"replace {e(node.target)} with {e(node.source)}{_changed(node.over)}{when}"]
        case ast.Swap():
            at = f" at {e(node.at)}" if node.at is not None else ""
            when = f" when {e(node.when)}" if node.when is not None else ""
            return [f"swap {e(node.target)} from {e(node.source)}{at}{_changed(node.over)}{when}"]
        case ast.AddTo():
            return [f"add {e(node.target)} = {e(node.value)}"]
    raise AssertionError(node)


def _changed(over: tuple[tuple[ast.Ident, ...], ast.Expr] | None) -> str:
    return f" {_over(*over)}" if over is not None else ""


def _stage_head(node: ast.Stage) -> str:
    head = f"stage {node.name.text}"
    if node.index is not None:
        head += f"[{node.index.text}]"
    if node.duration is not None:
        head += f" for {print_expression(node.duration)}"
    if node.each is not None:
        head += f" each {node.each[0].text} in {print_expression(node.each[1])}"
    return head
