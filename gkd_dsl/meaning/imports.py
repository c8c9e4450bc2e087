"""Imports: files of the language, the method library, and Python files read without running them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gkd_dsl import extension
from gkd_dsl.diagnostics import Label, SpecError
from gkd_dsl.meaning.context import Context, replace, suggest
from gkd_dsl.meaning.scope import Definition, Scope
from gkd_dsl.meaning.values import UNKNOWN, Method, Module, PythonModule, Value
from gkd_dsl.ops import registry
from gkd_dsl.ops.spec import OpSpec
from gkd_dsl.places import is_dir, is_file
from gkd_dsl.sources import SourceKind, source_kind
from gkd_dsl.syntax import ast, parse, parse_signature
from gkd_dsl.text import Source, Span

LIBRARY = "gkd:"


def library_folder() -> Path:
    """The folder of the method library."""
    spec = importlib.util.find_spec("gkd_dsl.stdlib_methods")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def library() -> list[str]:
    """The names of the methods that ship, sorted."""
    return sorted(path.stem for path in library_folder().glob("*.gkd"))


def read(ctx: Context, path: Path, name: str) -> Source | None:
    """The text of a file, or None where it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    source = Source(name, text, path)
    ctx.sources[name] = source
    return source


def collect(ctx: Context, scope: Scope, items: tuple[ast.Item | ast.Stmt, ...]) -> None:
    """Put the names that declarations give into a scope; a name given twice is reported."""
    for item in items:
        for ident in _names(item):
            _define(ctx, scope, ident, item)


def _names(item: ast.Item | ast.Stmt) -> tuple[ast.Ident, ...]:
    match item:
        case ast.ImportUse():
            return item.names
        case ast.ImportAs() | ast.ImportPython() | ast.Use():
            return (item.alias,)
        case ast.DimDecl():
            return item.names
        case (
            ast.Param() | ast.Let() | ast.ModelDecl() | ast.DataDecl() | ast.MaskDecl() | ast.ProjectDecl()
            | ast.LossDecl() | ast.MetricDecl() | ast.MethodDecl() | ast.Pass() | ast.Counter() | ast.Policy()
        ):  # fmt: skip
            return (item.name,)
    return ()


def _define(ctx: Context, scope: Scope, ident: ast.Ident, item: ast.Item | ast.Stmt) -> None:
    if ident.text == "batch":
        ctx.error(
            scope, "E0246", "`batch` is the batch of a step, and cannot be declared", ident.span, "choose another name"
        )
        scope.names[ident.text] = Definition(ident.text, None, None, UNKNOWN, used=True)
        return
    held = scope.names.get(ident.text)
    if held is not None:
        labels = [Label(held.span, "first here", primary=False)] if held.span is not None else []
        ctx.error(scope, "E0245", f"`{ident.text}` is declared twice", ident.span, "again here", labels=labels)
        return
    scope.names[ident.text] = Definition(ident.text, item, ident.span)


def load(ctx: Context, scope: Scope, written: ast.String) -> Scope | None:
    """The scope of an imported file, read once; what is wrong with the import is reported."""
    text = written.value
    if text.startswith(LIBRARY):
        name = text.removeprefix(LIBRARY)
        path = library_folder() / f"{name}.gkd"
        shown = text
        if not is_file(path):
            label, near = suggest(name, library())
            ctx.error(
                scope, "E0511", f"the library has no method `{name}`", written.span,
                f"did you mean `{LIBRARY}{near}`?" if near else label, notes=[f"it has: {', '.join(library())}"],
                fix=replace(written.span, f'"{LIBRARY}{near}"') if near else None,
            )  # fmt: skip
            return None
    else:
        path = scope.root / text
        shown = text.removeprefix("./")
        if not is_file(path):
            names = sorted(p.name for p in path.parent.glob("*.gkd")) if is_dir(path.parent) else []
            label, near = suggest(path.name, names)
            fixed = text[: len(text) - len(path.name)] + near if near else None
            ctx.error(
                scope, "E0512", f"there is no file `{text}`", written.span, label or "not found",
                notes=["paths start at the folder of the file that imports"],
                fix=replace(written.span, f'"{fixed}"') if fixed else None,
            )  # fmt: skip
            return None
    path = path.resolve()
    if any(path == loading for loading, _ in ctx.loading):
        start = next(i for i, (loading, _) in enumerate(ctx.loading) if loading == path)
        chain = [loading.name for loading, _ in ctx.loading[start:]] + [path.name]
        others = [Label(span, "imported here", primary=False) for _, span in ctx.loading[start + 1 :] if span]
        ctx.error(
            scope, "E0507", f"these files import each other: {' -> '.join(chain)}", written.span,
            "closes the circle", labels=others,
        )  # fmt: skip
        return None
    if path in ctx.files:
        return ctx.files[path]
    source = read(ctx, path, shown)
    if source is None:
        ctx.error(scope, "E0512", f"`{text}` cannot be read as UTF-8 text", written.span)
        return None
    file, found = parse(source)
    for diagnostic in found:
        ctx.diagnostics.add(diagnostic)
    inner = Scope(source, root=path.parent)
    ctx.loading.append((path, written.span))
    try:
        collect(ctx, inner, file.items)
        load_all(ctx, inner)
    finally:
        ctx.loading.pop()
    ctx.files[path] = inner
    return inner


def load_all(ctx: Context, scope: Scope) -> None:
    """Read every file that a scope imports, so that circles are found before names are looked up."""
    seen: set[int] = set()
    for definition in list(scope.names.values()):
        decl = definition.decl
        if isinstance(decl, ast.ImportAs | ast.ImportUse) and id(decl) not in seen:
            seen.add(id(decl))
            inner = load(ctx, scope, decl.path)
            for ident in _names(decl):
                if inner is None:
                    scope.names[ident.text].value = UNKNOWN
                elif isinstance(decl, ast.ImportUse) and ident.text not in inner.names:
                    near = suggest(ident.text, inner.names)[1]
                    if near is not None:
                        scope.names.setdefault(near, Definition(near, None, None, UNKNOWN, used=True))


def module(ctx: Context, scope: Scope, decl: ast.ImportAs) -> Value:
    """`import "x.gkd" as x`."""
    inner = load(ctx, scope, decl.path)
    return UNKNOWN if inner is None else Module(decl.alias.text, inner)


def member(ctx: Context, scope: Scope, decl: ast.ImportUse, definition: Definition) -> Value:
    """One name of `import "x.gkd" use a, b`."""
    inner = load(ctx, scope, decl.path)
    if inner is None:
        return UNKNOWN
    found = inner.names.get(definition.name)
    if found is not None and isinstance(found.decl, ast.MethodDecl):
        return Method(found.decl, inner)
    methods = [d.name for d in inner.names.values() if isinstance(d.decl, ast.MethodDecl)]
    label, near = suggest(definition.name, methods)
    span: Span | None = definition.span
    return ctx.error(
        scope, "E0209", f"`{decl.path.value}` has no method `{definition.name}`", span, label or "not in that file",
        notes=[f"it has: {', '.join(methods) or 'none'}"],
        fix=replace(span, near) if near and span is not None else None,
    )  # fmt: skip


def python_module(ctx: Context, scope: Scope, decl: ast.ImportPython) -> Value:
    """`import python "ops.py" as ops`: its decorators are read, its code is not run (unless trusted)."""
    path = decl.path.value
    try:
        found = extension.scan(path, scope.root)
        if ctx.trust:
            extension.load(path, scope.root)
    except extension.ExtensionError as error:
        notes = [error.hint] if error.hint else []
        message = f"{path}:{error.line}: {error.message}" if error.line else f"`{path}`: {error.message}"
        return ctx.error(scope, "E0513", message, decl.path.span, "imported here", notes=notes)
    extensions: dict[str, object] = {}
    for each in found:
        shown = f"{path}:{each.line}"
        try:
            if each.kind == "source":
                shape = source_kind(parse_signature(each.signature, shown), each.doc)
                extensions[each.name] = SourceKind(f"{path}:{shape.name}", shape.args, shape.result, shape.doc)
            else:
                result = parse_signature(each.signature, shown).result.name.text
                loss = result == "Loss"
                spec = OpSpec(
                    f"{path}:{each.name}", "loss" if loss else "tensor", (each.signature,), each.doc, masked=loss
                )
                registry.register(spec, replace=True)
                extensions[each.name] = spec
        except (SpecError, ValueError) as error:
            return ctx.error(
                scope, "E0514", f"the signature of `{each.name}` cannot be read: {error}", decl.path.span,
                f"line {each.line} of that file",
            )  # fmt: skip
    return PythonModule(decl.alias.text, path, extensions)
