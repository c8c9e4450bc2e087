"""From Lark's tree to the syntax tree: expressions, types and signatures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, cast

from lark import Token, Tree

from gkd_dsl.diagnostics import Diagnostics, Label
from gkd_dsl.syntax import ast
from gkd_dsl.text import Source, Span

DEPTH = 100
"""How deep expressions may nest."""

_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}
_DURATION = re.compile(r"([0-9_.]+(?:[eE][+-]?[0-9]+)?)[ \t]*([kMB]?)[ \t]*(%|[a-z]+)")
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
_ESCAPED = {character: f"\\{letter}" for letter, character in _ESCAPES.items()}


def escape(text: str) -> str:
    """The text as it stands between the quotes of a string."""
    return "".join(_ESCAPED.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text)


class ExpressionBuilder:
    """Makes syntax nodes of Lark trees whose positions are offsets of `source`."""

    def __init__(self, source: Source, diagnostics: Diagnostics, *, in_signature: bool = False) -> None:
        self.source = source
        self.diagnostics = diagnostics
        self.in_signature = in_signature

    # --- places ---

    def span(self, node: Any) -> Span:
        """Where a tree or a token was written."""
        if isinstance(node, Token):
            return self.between(node.start_pos or 0, node.end_pos if node.end_pos is not None else node.start_pos or 0)
        if getattr(node.meta, "empty", True):
            return self.between(0, 0)
        return self.between(node.meta.start_pos, node.meta.end_pos)

    def outer(self, node: Tree) -> Span:
        """As `span`, with the parentheses around it."""
        meta = node.meta
        start = getattr(meta, "container_start_pos", meta.start_pos)
        return self.between(start, getattr(meta, "container_end_pos", meta.end_pos))

    def between(self, start: int, end: int) -> Span:
        """The span between two offsets."""
        return Span(self.source, start, max(start, end))

    # --- small parts ---

    def ident(self, token: Token) -> ast.Ident:
        """A name at its place."""
        return ast.Ident(self.span(token), str(token))

    def names(self, tree: Tree | None) -> tuple[ast.Ident, ...]:
        """The names of a list of names."""
        return tuple(self.ident(cast(Token, token)) for token in tree.children) if tree is not None else ()

    def once(self, names: tuple[ast.Ident, ...]) -> tuple[ast.Ident, ...]:
        """Names that are bound together; one that stands twice is reported, `_` may."""
        seen: dict[str, ast.Ident] = {}
        for name in names:
            first = seen.setdefault(name.text, name)
            if first is not name and name.text not in ("_", ""):
                self.diagnostics.error(
                    "E0245",
                    f"`{name.text}` stands twice",
                    name.span,
                    "again here",
                    labels=[Label(first.span, "the first", primary=False)],
                )
        return names

    def string(self, token: Token) -> ast.String:
        """A string with its escapes read."""
        return ast.String(self.span(token), self._unescape(token))

    def text(self, token: Token | None) -> str | None:
        """The value of a string, where there is one."""
        return self._unescape(token) if token is not None else None

    def _unescape(self, token: Token) -> str:
        start = (token.start_pos or 0) + 1

        def replaced(match: re.Match[str]) -> str:
            body = match[1]
            if len(body) > 1:
                code = int(body[1:], 16)
                if code < 0x110000 and not 0xD800 <= code < 0xE000:
                    return chr(code)
            elif body in _ESCAPES:
                return _ESCAPES[body]
            self.diagnostics.error(
                "E0117",
                f"`{match[0]}` is not an escape of a string",
                self.between(start + match.start(), start + match.end()),
                'the escapes are `\\n`, `\\t`, `\\r`, `\\"`, `\\\\`, `\\u0000` and `\\U00000000`',
                notes=["write `\\\\` for a backslash, and `/` in paths on every system"],
            )
            return match[0]

        return _ESCAPE.sub(replaced, str(token)[1:-1])

    def duration(self, token: Token) -> ast.Duration:
        """The value and the unit of a duration."""
        match = _DURATION.fullmatch(str(token))
        assert match is not None
        unit = "percent" if match[3] == "%" else match[3] if match[3].endswith("s") else match[3] + "s"
        value = self._finite(float(match[1].replace("_", "")) * _SCALE[match[2]], token)
        return ast.Duration(self.span(token), value, cast(Any, unit))

    def _finite(self, value: float, token: Token) -> float:
        if math.isfinite(value):
            return value
        return float(self._too_large(token))

    def _too_large(self, token: Token) -> int:
        self.diagnostics.error(
            "E0119",
            "this number is too large",
            self.span(token),
            "an integer has at most 18 digits, a number is < 1e308",
        )
        return 0

    def _number(self, token: Token) -> ast.Number:
        text = str(token).replace("_", "")
        if token.type == "INT":
            digits = text.lstrip("0") or "0"
            return ast.Number(self.span(token), int(digits) if len(digits) <= 18 else self._too_large(token))
        return ast.Number(self.span(token), self._finite(float(text), token))

    # --- expressions ---

    def expression(self, tree: Tree) -> ast.Expr:
        """The node of an expression; one that nests too deep is reported and gives `Missing`."""
        if self._refused(tree):
            return ast.Missing(self.outer(tree))
        return self._expression(tree)

    def _refused(self, tree: Tree) -> bool:
        if not too_deep(tree):
            return False
        span = self.outer(tree)
        self.diagnostics.error(
            "E0118",
            f"this expression nests more than {DEPTH} levels deep",
            self.between(span.start, min(span.end, self._line_end(span.start))),
            "too deep",
            notes=["name parts of it with `let`; a long sum of alike terms is `sum(... for i in ...)`"],
        )
        return True

    def _line_end(self, offset: int) -> int:
        end = self.source.text.find("\n", offset)
        return len(self.source.text) if end < 0 else end

    def _expression(self, tree: Tree) -> ast.Expr:
        build: Callable[[Tree], ast.Expr] = getattr(self, f"_x_{tree.data}")
        return build(tree)

    def _x_name(self, tree: Tree) -> ast.Expr:
        return ast.Name(self.span(tree), str(tree.children[0]))

    def _x_number(self, tree: Tree) -> ast.Expr:
        return self._number(cast(Token, tree.children[0]))

    def _x_duration(self, tree: Tree) -> ast.Expr:
        return self.duration(cast(Token, tree.children[0]))

    def _x_string(self, tree: Tree) -> ast.Expr:
        return self.string(cast(Token, tree.children[0]))

    def _x_bool(self, tree: Tree) -> ast.Expr:
        return ast.Bool(self.span(tree), str(tree.children[0]) == "true")

    def _x_missing(self, tree: Tree) -> ast.Expr:
        return ast.Missing(self.span(tree))

    def _x_list(self, tree: Tree) -> ast.Expr:
        items = tuple(self._expression(cast(Tree, child)) for child in tree.children if child is not None)
        return ast.List(self.span(tree), items)

    def _x_attribute(self, tree: Tree) -> ast.Expr:
        base, name = tree.children
        return ast.Attr(self.span(tree), self._expression(cast(Tree, base)), self.ident(cast(Token, name)))

    def _x_index(self, tree: Tree) -> ast.Expr:
        base, args = cast("tuple[Tree, Tree]", tree.children)
        values = tuple(self._expression(cast(Tree, child)) for child in args.children if child is not None)
        return ast.Index(self.span(tree), self._expression(base), values)

    def _x_call(self, tree: Tree) -> ast.Expr:
        func, args = tree.children
        return ast.Call(self.span(tree), self._expression(cast(Tree, func)), self.args(cast("Tree | None", args)))

    def _x_negative(self, tree: Tree) -> ast.Expr:
        return ast.Unary(self.span(tree), "-", self._expression(cast(Tree, tree.children[-1])))

    def _x_not_(self, tree: Tree) -> ast.Expr:
        return ast.Unary(self.span(tree), "not", self._expression(cast(Tree, tree.children[-1])))

    def _x_binary(self, tree: Tree) -> ast.Expr:
        left, op, right = cast("tuple[Tree, Token, Tree]", tree.children)
        if op.type == "PERCENT" and not self.in_signature:
            self.diagnostics.error(
                "E0124",
                "`%` as an operator stands only in the `where` of a signature",
                self.span(op),
                "not here",
                notes=["a percentage is written without a space, as in `10%`"],
            )
            return ast.Missing(self.span(tree))
        return ast.Binary(
            self.span(tree), cast(Any, str(op)), self.span(op), self._expression(left), self._expression(right)
        )

    def _x_pipe(self, tree: Tree) -> ast.Expr:
        value, block = cast("tuple[Tree, Tree]", tree.children)
        return ast.Pipe(self.span(tree), self._expression(value), self._expression(block))

    def _x_pair(self, tree: Tree) -> ast.Expr:
        left, arrow, right = cast("tuple[Tree, Token, Tree]", tree.children)
        return ast.Pair(self.span(tree), self._expression(left), self._expression(right), self.span(arrow))

    def _x_arrow(self, tree: Tree) -> ast.Expr:
        left, right = cast("tuple[Tree, Tree]", tree.children)
        return ast.Arrow(self.span(tree), self._expression(left), self._expression(right))

    def _x_range_open(self, tree: Tree) -> ast.Expr:
        return self._range(tree, inclusive=False)

    def _x_range_closed(self, tree: Tree) -> ast.Expr:
        return self._range(tree, inclusive=True)

    def _range(self, tree: Tree, *, inclusive: bool) -> ast.Range:
        lo, hi = cast("tuple[Tree, Tree]", tree.children)
        return ast.Range(self.span(tree), self._expression(lo), self._expression(hi), inclusive)

    def _x_comprehension(self, tree: Tree) -> ast.Expr:
        element, binder, iterable = cast("tuple[Tree, Tree, Tree]", tree.children)
        return ast.Comprehension(
            self.span(tree), self._expression(element), self.once(self.names(binder)), self._expression(iterable)
        )

    def arguments(self, tree: Tree | None) -> tuple[ast.Arg, ...]:
        """As `args`, for arguments that are not part of an expression."""
        if tree is not None and self._refused(tree):
            return ()
        return self.args(tree)

    def args(self, tree: Tree | None) -> tuple[ast.Arg, ...]:
        """The arguments of a call; one without a name may not follow one that has it, and no name stands twice."""
        found: list[ast.Arg] = []
        named: set[str] = set()
        for child in tree.children if tree is not None else ():
            if child is None:
                continue
            child = cast(Tree, child)
            if child.data == "keyword":
                name, value = cast("tuple[Token, Tree]", child.children)
                found.append(ast.Arg(self.span(child), self.ident(name), self._expression(value)))
                if str(name) in named:
                    self.diagnostics.error("E0241", f"`{name}` is given twice", self.span(child), "a second time")
                named.add(str(name))
                continue
            arg = ast.Arg(self.outer(child), None, self._expression(child))
            if named:
                self.diagnostics.error(
                    "E0125",
                    "an argument without a name stands after one with a name",
                    arg.span,
                    "give its name, or move it to the front",
                )
            found.append(arg)
        return tuple(found)

    # --- types and signatures ---

    def type(self, tree: Tree) -> ast.TypeExpr:
        """A type as written."""
        name, dims = cast("tuple[Token, Tree | None]", tree.children)
        if dims is None:
            return ast.TypeExpr(self.span(tree), self.ident(name), None)
        return ast.TypeExpr(
            self.span(tree), self.ident(name), tuple(self._dim(cast(Tree, child)) for child in dims.children)
        )

    def _dim(self, tree: Tree) -> ast.DimExpr:
        parts = [str(child) for child in tree.children if child is not None]
        return ast.DimExpr(self.span(tree), ".".join(parts) or "...")

    def within(self, tree: Tree | None) -> ast.Range | None:
        """The range after `in`."""
        if tree is None or self._refused(tree):
            return None
        return self._range(tree, inclusive=tree.data == "range_closed")

    def optional(self, tree: Tree | None) -> ast.Expr | None:
        """The expression, where there is one."""
        return self.expression(tree) if tree is not None else None

    def signature(self, tree: Tree) -> ast.Signature:
        """`name(args) -> type where ...`."""
        name = cast(Token, tree.children[0])
        args: list[ast.SignatureArg] = []
        result: ast.TypeExpr | None = None
        where: list[ast.Expr] = []
        for child in cast("list[Tree | None]", tree.children[1:]):
            if child is None:
                continue
            if child.data == "signature_arg":
                args.append(self._signature_arg(child))
            elif child.data == "type":
                result = self.type(child)
            else:
                where.append(self.expression(child))
        assert result is not None
        return ast.Signature(self.span(tree), self.ident(name), tuple(args), result, tuple(where))

    def _signature_arg(self, tree: Tree) -> ast.SignatureArg:
        name, type_, _, other, other_type, default, within = cast("list[Any]", tree.children)
        teacher = None
        if other is not None:
            span = self.span(other).to(self.span(other_type))
            teacher = ast.SignatureArg(span, self.ident(other), self.type(other_type), None, None, None)
        return ast.SignatureArg(
            self.span(tree), self.ident(name), self.type(type_), teacher, self.optional(default), self.within(within)
        )


def too_deep(tree: Tree) -> bool:
    """Whether expressions in the tree nest deeper than `DEPTH`; without recursion."""
    pending: list[tuple[Tree, int]] = [(tree, 1)]
    while pending:
        node, depth = pending.pop()
        if depth > DEPTH:
            return True
        # Lists of arguments are no level of their own in the syntax tree.
        deeper = depth if node.data in ("args", "index_args") else depth + 1
        pending.extend((child, deeper) for child in node.children if isinstance(child, Tree))
    return False
