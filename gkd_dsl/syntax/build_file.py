"""From Lark's tree to the syntax tree: declarations, statements and blocks."""

from __future__ import annotations

from typing import Any, cast

from lark import Token, Tree

from gkd_dsl.diagnostics import Edit, Fix, Label
from gkd_dsl.syntax import ast
from gkd_dsl.syntax.build import ExpressionBuilder
from gkd_dsl.syntax.words import HOME
from gkd_dsl.text import Span


class FileBuilder(ExpressionBuilder):
    """Makes the items of a file. What the recovery left without a name is dropped: it is reported already."""

    def lines(self, trees: list[Any]) -> list[Any]:
        """The nodes of lines or statements, in order."""
        built = [getattr(self, f"_s_{tree.data}")(tree) for tree in trees if isinstance(tree, Tree)]
        return [node for node in built if node is not None and not self._nameless(node)]

    @staticmethod
    def _nameless(node: Any) -> bool:
        name = getattr(node, "name", None)
        return isinstance(name, ast.Ident) and not name.text

    def block(self, tree: Tree | None, kind: str = "") -> tuple[Any, ...]:
        """The statements of a block; those that its kind does not take are reported."""
        if tree is None:
            return ()
        for child in tree.children:
            if isinstance(child, Tree):
                self._check_place(child, kind)
        found = tuple(self.lines(tree.children))
        self._check_once(found, kind)
        return found

    def _check_once(self, statements: tuple[Any, ...], kind: str) -> None:
        """Report what a block says twice, where the later one would take the place of the first unseen."""
        seen: dict[str, Span] = {}
        for stmt in statements:
            name = stmt.name.text if isinstance(stmt, ast.Setting) and kind in ("pass", "policy") else ""
            place = stmt.name.span if name else stmt.span
            if isinstance(stmt, ast.Total):
                name, place = "total", self.between(stmt.span.start, stmt.span.start + len("total"))
            if name and name in seen:
                self.diagnostics.error(
                    "E0245",
                    f"`{name}` is set twice",
                    place,
                    "again here",
                    labels=[Label(seen[name], "the first", primary=False)],
                )
            seen.setdefault(name, place)

    def _check_place(self, tree: Tree, kind: str) -> None:
        """Report a statement that the grammar lets stand in every block and this kind of block has no use for."""
        keyword = str(tree.data).rstrip("_")
        wrong = {
            "stage": ("total", "stage"),
            "method": ("train", "freeze", "minimize", "evaluate", "keep", "setting"),
        }.get(kind, ())
        if keyword not in wrong and not (kind in ("model", "policy") and keyword != "setting"):
            return
        span = self.span(tree)
        if keyword == "setting":
            name = self.ident(cast(Token, tree.children[0]))
            self.diagnostics.error(
                "E0104",
                f"the setting `{name.text}` belongs inside a stage",
                name.span,
                f"not in a {kind}",
                notes=["`let name = ...` gives a value a name"],
            )
            return
        place = self.between(span.start, span.start + len(keyword))
        fix = None
        if keyword == "total":
            assign = self.source.text.find("=", span.start)
            fix = Fix("write `minimize`", (Edit(self.between(span.start, assign + 1), "minimize"),))
        home = HOME.get(keyword, "at the top level, in a stage or in a method")
        self.diagnostics.error("E0104", f"`{keyword}` belongs {home}", place, f"not in a {kind}", fix=fix)

    def _s_header(self, tree: Tree) -> ast.Header:
        digits = str(tree.children[0]).replace("_", "")
        return ast.Header(self.span(tree), int(digits[:18]))

    # --- declarations ---

    def _s_import_as(self, tree: Tree) -> ast.ImportAs:
        path, alias = cast("tuple[Token, Token]", tree.children)
        return ast.ImportAs(self.span(tree), self.string(path), self.ident(alias))

    def _s_import_use(self, tree: Tree) -> ast.ImportUse:
        path, names = cast("tuple[Token, Tree]", tree.children)
        return ast.ImportUse(self.span(tree), self.string(path), self.names(names))

    def _s_import_python(self, tree: Tree) -> ast.ImportPython:
        path, alias = cast("tuple[Token, Token]", tree.children)
        return ast.ImportPython(self.span(tree), self.string(path), self.ident(alias))

    def _s_param(self, tree: Tree) -> ast.Param:
        name, type_, default, within, doc = cast("list[Any]", tree.children)
        return ast.Param(
            self.span(tree),
            self.ident(name),
            self.type(type_),
            self.optional(default),
            self.within(within),
            self.text(doc),
        )

    def _s_dim(self, tree: Tree) -> ast.DimDecl:
        return ast.DimDecl(self.span(tree), self.names(cast(Tree, tree.children[0])))

    def _s_let(self, tree: Tree) -> ast.Let:
        name, indices, value = cast("list[Any]", tree.children)
        return ast.Let(self.span(tree), self.ident(name), self._indices(indices), self.expression(value))

    def _s_model(self, tree: Tree) -> ast.ModelDecl:
        role, name, value, block = cast("list[Any]", tree.children)
        return ast.ModelDecl(
            self.span(tree), self._role(role), self.ident(name), self.expression(value), self.block(block, "model")
        )

    def _role(self, tree: Tree) -> Any:
        return str(tree.children[0])

    def _indices(self, tree: Tree | None) -> tuple[ast.Ident, ...]:
        return self.once(self.names(cast(Tree, tree.children[0]))) if tree is not None else ()

    def _s_data(self, tree: Tree) -> ast.DataDecl:
        return ast.DataDecl(*self._named(tree))

    def _s_mask(self, tree: Tree) -> ast.MaskDecl:
        return ast.MaskDecl(*self._named(tree))

    def _s_metric(self, tree: Tree) -> ast.MetricDecl:
        return ast.MetricDecl(*self._named(tree))

    def _named(self, tree: Tree) -> tuple[Any, ast.Ident, ast.Expr]:
        name, value = cast("tuple[Token, Tree]", tree.children)
        return self.span(tree), self.ident(name), self.expression(value)

    def _s_project(self, tree: Tree) -> ast.ProjectDecl:
        name, indices, value = cast("list[Any]", tree.children)
        return ast.ProjectDecl(self.span(tree), self.ident(name), self._indices(indices), self.expression(value))

    def _s_loss(self, tree: Tree) -> ast.LossDecl:
        name, indices, formals, value = cast("list[Any]", tree.children)
        return ast.LossDecl(
            self.span(tree),
            self.ident(name),
            self._indices(indices),
            self._formals(formals) if formals is not None else None,
            self.expression(value),
        )

    def _s_method(self, tree: Tree) -> ast.MethodDecl:
        name, formals, doc, block = cast("list[Any]", tree.children)
        return ast.MethodDecl(
            self.span(tree), self.ident(name), self._formals(formals), self.block(block, "method"), self.text(doc)
        )

    def _formals(self, tree: Tree) -> tuple[ast.Formal, ...]:
        found = tuple(self._formal(child) for child in tree.children if isinstance(child, Tree))
        self.once(tuple(formal.name for formal in found))
        return found

    def _formal(self, tree: Tree) -> ast.Formal:
        if tree.data == "role_formal":
            role, name = cast("list[Any]", tree.children)
            return ast.Formal(self.span(tree), self._role(role), self.ident(name), None, None, None, None)
        name, type_, default, within, doc = cast("list[Any]", tree.children)
        return ast.Formal(
            self.span(tree),
            None,
            self.ident(name),
            self.type(type_),
            self.optional(default),
            self.within(within),
            self.text(doc),
        )

    def _s_use(self, tree: Tree) -> ast.Use:
        path, args, alias = cast("list[Any]", tree.children)
        target: ast.Expr = ast.Name(self.span(path.children[0]), str(path.children[0]))
        for part in path.children[1:]:
            target = ast.Attr(target.span.to(self.span(part)), target, self.ident(part))
        return ast.Use(self.span(tree), target, self.arguments(args), self.ident(alias))

    def _s_run(self, tree: Tree) -> ast.Run:
        return ast.Run(self.span(tree), self.ident(cast(Token, tree.children[0])))

    def _s_stage(self, tree: Tree) -> ast.Stage:
        name, index, duration, binder, over, block = cast("list[Any]", tree.children)
        return ast.Stage(
            self.span(tree),
            self.ident(name),
            self.ident(index) if index is not None else None,
            self._length(duration) if duration is not None else None,
            (self.ident(binder), self.expression(over)) if binder is not None else None,
            self.block(block, "stage"),
        )

    def _length(self, token: Token) -> ast.Duration | ast.Name:
        return self.duration(token) if token.type == "DURATION" else ast.Name(self.span(token), str(token))

    def _s_pass_(self, tree: Tree) -> ast.Pass:
        name, value, block = cast("list[Any]", tree.children)
        return ast.Pass(self.span(tree), self.ident(name), self.expression(value), self.block(block, "pass"))

    def _s_counter(self, tree: Tree) -> ast.Counter:
        name, start, stop, when = cast("list[Any]", tree.children)
        return ast.Counter(
            self.span(tree), self.ident(name), self.expression(start), self.expression(stop), self.expression(when)
        )

    def _s_policy(self, tree: Tree) -> ast.Policy:
        name, value, block = cast("list[Any]", tree.children)
        return ast.Policy(self.span(tree), self.ident(name), self.expression(value), self.block(block, "policy"))

    def _s_runtime(self, tree: Tree) -> ast.Runtime:
        return ast.Runtime(self.span(tree), self.block(cast(Tree, tree.children[0])))

    def _s_placement(self, tree: Tree) -> ast.Placement:
        role, name, block = cast("list[Any]", tree.children)
        return ast.Placement(self.span(tree), self._role(role), self.ident(name), self.block(block))

    # --- statements ---

    def _s_setting(self, tree: Tree) -> ast.Setting:
        return ast.Setting(*self._named(tree))

    def _targets(self, tree: Any) -> tuple[ast.Expr, ...]:
        return tuple(self.expression(child) for child in tree.children)

    def _s_train(self, tree: Tree) -> ast.Train:
        return ast.Train(self.span(tree), self._targets(tree.children[0]))

    def _s_freeze(self, tree: Tree) -> ast.Freeze:
        return ast.Freeze(self.span(tree), self._targets(tree.children[0]))

    def _s_minimize(self, tree: Tree) -> ast.Minimize:
        return ast.Minimize(self.span(tree), self.expression(cast(Tree, tree.children[0])))

    def _s_total(self, tree: Tree) -> ast.Total:
        return ast.Total(self.span(tree), self.expression(cast(Tree, tree.children[0])))

    def _s_evaluate(self, tree: Tree) -> ast.Evaluate:
        targets, every = cast("list[Any]", tree.children)
        return ast.Evaluate(
            self.span(tree), self._targets(targets), self.duration(every) if every is not None else None
        )

    def _s_keep(self, tree: Tree) -> ast.KeepBest:
        return ast.KeepBest(self.span(tree), self.ident(cast(Token, tree.children[0])))

    def _over(self, tree: Tree | None) -> tuple[tuple[ast.Ident, ...], ast.Expr] | None:
        if tree is None:
            return None
        binder, value = cast("tuple[Tree, Tree]", tree.children)
        return self.once(self.names(binder)), self.expression(value)

    def _s_replace(self, tree: Tree) -> ast.Replace:
        target, source, over, when = cast("list[Any]", tree.children)
        return ast.Replace(
            self.span(tree),
            self.expression(target),
            self.expression(source),
            self._over(over),
            self.optional(when),
        )

    def _s_swap(self, tree: Tree) -> ast.Swap:
        target, source, at, over, when = cast("list[Any]", tree.children)
        return ast.Swap(
            self.span(tree),
            self.expression(target),
            self.expression(source),
            self.optional(at),
            self._over(over),
            self.optional(when),
        )

    def _s_add(self, tree: Tree) -> ast.AddTo:
        target, value = cast("list[Any]", tree.children)
        return ast.AddTo(self.span(tree), self.expression(target), self.expression(value))
