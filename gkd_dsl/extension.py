"""Operators and data sources written in Python: two decorators, a reader that runs nothing, and a loader.

@gkd_dsl.op("gram2(x: Float[B, L, D], samples: int = 32) -> Float[B, L, L]")
def gram2(x, samples): ...

@gkd_dsl.source("docstrings(limit: int = 4000) -> text")
def docstrings(limit): ...
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from gkd_dsl.places import expanded, is_dir, is_file

Kind = Literal["op", "source"]
Function = TypeVar("Function", bound=Callable[..., Any])

_MARK = "__gkd_extension__"


@dataclass(frozen=True)
class Extension:
    """A decorated function as it is written: nothing of it has run.

    `signature` is the text of the decorator; `flags` are its other arguments (`where`, `linear`, ...);
    `line` is the line of the decorator.
    """

    kind: Kind
    name: str
    signature: str
    doc: str
    line: int
    flags: tuple[tuple[str, str | bool | int | float], ...] = ()


@dataclass(frozen=True)
class Registered:
    """A decorated function, to be called."""

    extension: Extension
    function: Callable[..., Any] = field(compare=False)
    file: str = ""


class ExtensionError(Exception):
    """A Python file that cannot be used; `file` and `line` say where, `hint` what to do."""

    def __init__(self, message: str, file: str, line: int | None = None, hint: str | None = None) -> None:
        super().__init__(message, file, line, hint)
        self.message, self.file, self.line, self.hint = message, file, line, hint

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.message}" + (f"; {self.hint}" if self.hint else "")


_REGISTRY: dict[tuple[Kind, str, str], Registered] = {}


def op(signature: str, **flags: str | bool | int | float) -> Callable[[Function], Function]:
    """Register a function as an operator; `signature` is a literal text such as `f(x: Float[B, H]) -> Float[B]`.

    Flags: `where` (a condition on sizes), `linear`, `reduces`. The function itself is given back unchanged.
    """
    return _decorator("op", signature, flags)


def source(signature: str, **flags: str | bool | int | float) -> Callable[[Function], Function]:
    """Register a function as a data source: `-> text` gives strings, `-> rows` mappings from column names.

    Its arguments are those of the signature; `held_out`, `max_length` and the other common ones come with it.
    """
    return _decorator("source", signature, flags)


def registered(kind: Kind, name: str, file: str | None = None) -> Registered | None:
    """The function registered under a name by a file that was loaded (any file where `file` is None).

    A dotted name (`mine.docstrings`) stands for its last part. Raises ExtensionError where two files have it.
    """
    last = name.rsplit(".", 1)[-1]
    found = [each for (k, n, f), each in _REGISTRY.items() if k == kind and n == last and file in (None, f)]
    if len(found) > 1:
        files = " and ".join(sorted(each.file for each in found))
        raise ExtensionError(f"the {kind} `{last}` is in {files}", found[0].file, hint="rename one of them")
    return found[0] if found else None


def scan(path_or_module: str, root: Path) -> list[Extension]:
    """The decorated functions of a Python file, read from its syntax tree; the file does not run.

    `path_or_module` is what `import python` names: a path ending in `.py`, from the folder `root`, or a
    dotted module name. Raises ExtensionError: no such file, a syntax error, a signature that is not a
    literal text, a name used twice.
    """
    file = find(path_or_module, root)
    return _scan_text(_read(file), str(path_or_module))


def load(path_or_module: str, root: Path) -> dict[tuple[Kind, str], Registered]:
    """Run a Python file and give its decorated functions by kind and name; each file runs once.

    Raises ExtensionError as `scan` does, and where the file itself raises.
    """
    extensions = scan(path_or_module, root)
    file = find(path_or_module, root)
    text = _read(file)
    if path_or_module.endswith(".py"):
        digest = hashlib.sha256(f"{file.resolve()}\0{text}".encode()).hexdigest()[:16]
        name = f"_gkd_extension_{digest}"
    else:
        name = path_or_module
    module = sys.modules.get(name) or _run(name, file, path_or_module)
    found: dict[tuple[Kind, str], Registered] = {}
    functions = {id(value): value for value in vars(module).values() if hasattr(value, _MARK)}
    for extension in extensions:
        marked = (f for f in functions.values() if (extension.kind, extension.name) in getattr(f, _MARK))
        function = next(marked, None)
        if function is None:
            message = f"the {extension.kind} `{extension.name}` is not in the module after it has run"
            raise ExtensionError(message, path_or_module, extension.line, "define it at the top of the file")
        entry = Registered(extension, function, str(file))
        found[(extension.kind, extension.name)] = entry
        _REGISTRY[(extension.kind, extension.name, str(file))] = entry
    return found


def find(path_or_module: str, root: Path) -> Path:
    """The file of a path or a module. Raises ExtensionError where there is none."""
    if path_or_module.endswith(".py"):
        path = expanded(path_or_module)
        path = path if path.is_absolute() else root / path
        if not is_file(path):
            folder = path.parent if is_dir(path.parent) else root
            others = ", ".join(sorted(p.name for p in folder.glob("*.py"))[:8])
            hint = f"that folder holds {others}" if others else "paths start at the folder of the spec"
            raise ExtensionError("there is no such file", path_or_module, hint=hint)
        return path.resolve()
    parts = path_or_module.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ExtensionError(
            "it is neither a module name nor a path to a `.py` file", path_or_module, hint="such as `./ops.py`"
        )
    found = _module_file(parts, root)
    if found is None:
        raise ExtensionError("no such module is installed", path_or_module, hint="or give the path of its `.py` file")
    return found


def _module_file(parts: list[str], root: Path) -> Path | None:
    """The source file of a dotted name, by folders: importing a package to look inside would run it."""
    try:
        top = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        top = None
    if top is None:
        places = [root / parts[0]]
        single = root / f"{parts[0]}.py"
    else:
        places = [Path(place) for place in top.submodule_search_locations or ()]
        single = Path(top.origin) if top.origin and not places else Path()
    if len(parts) == 1:
        candidates = [single, *(place / "__init__.py" for place in places)]
    else:
        inner = [place.joinpath(*parts[1:]) for place in places]
        candidates = [*(place.with_name(f"{place.name}.py") for place in inner), *(p / "__init__.py" for p in inner)]
    return next((path.resolve() for path in candidates if path.suffix == ".py" and is_file(path)), None)


def _run(name: str, file: Path, written: str) -> ModuleType:
    """Execute the file as a module. What it raises becomes an ExtensionError at the line in the file."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ExtensionError("it is not a Python file", written)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ExtensionError:
        sys.modules.pop(name, None)
        raise
    except Exception as error:
        sys.modules.pop(name, None)
        line = None
        trace = error.__traceback__
        while trace is not None:
            if Path(trace.tb_frame.f_code.co_filename) == file:
                line = trace.tb_lineno
            trace = trace.tb_next
        hint = f"install the package `{error.name}`" if isinstance(error, ModuleNotFoundError) else None
        raise ExtensionError(f"running it raised {type(error).__name__}: {error}", written, line, hint) from error
    return module


def _decorator(kind: Kind, signature: str, flags: dict[str, Any]) -> Callable[[Function], Function]:
    if not isinstance(signature, str):
        raise TypeError(f'@gkd_dsl.{kind} takes its signature as a text, such as @gkd_dsl.{kind}("f(...) -> ...")')

    def mark(function: Function) -> Function:
        code = getattr(function, "__code__", None)
        line = code.co_firstlineno if code else 0
        name = _name_in(signature)
        extension = Extension(kind, name, signature, _first_line(function.__doc__), line, tuple(sorted(flags.items())))
        marks = {**getattr(function, _MARK, {}), (kind, name): extension}
        setattr(function, _MARK, marks)
        file = str(Path(code.co_filename).resolve()) if code else ""
        _REGISTRY[(kind, name, file)] = Registered(extension, function, file)
        return function

    return mark


def _name_in(signature: str) -> str:
    return signature.split("(", 1)[0].strip()


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n", 1)[0].strip()


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ExtensionError(f"it cannot be read ({error})", str(file)) from error


def _scan_text(text: str, written: str) -> list[Extension]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ExtensionError(f"it is not Python: {message}", written, line) from error
    packages, names = _imports(tree)
    found: list[Extension] = []
    for node in _functions(tree):
        for decorator in node.decorator_list:
            call = decorator.func if isinstance(decorator, ast.Call) else decorator
            kind = _kind_of(call, packages, names)
            if kind is None:
                continue
            if not isinstance(decorator, ast.Call):
                hint = f'write `@{ast.unparse(decorator)}("{node.name}(...) -> ...")`'
                raise ExtensionError("the decorator has no signature", written, decorator.lineno, hint)
            extension = _extension(kind, decorator, node, written)
            twin = next((e for e in found if (e.kind, e.name) == (kind, extension.name)), None)
            if twin:
                message = f"the {kind} `{extension.name}` was registered in line {twin.line} already"
                raise ExtensionError(message, written, extension.line, "give one of them another name")
            found.append(extension)
    return found


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions that exist once the file has run: at the top, or under a top-level `if` or `try`."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            inner = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            waiting = [*inner, *waiting]


def _imports(tree: ast.Module) -> tuple[set[str], dict[str, Kind]]:
    """The names that stand for the package (or for `gkd_dsl.extension`), and for its decorators."""
    packages: set[str] = set()
    names: dict[str, Kind] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in ("gkd_dsl", "gkd_dsl.extension"):
                    packages.add(alias.asname or alias.name)
                    if alias.asname is None:
                        packages.add("gkd_dsl")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in ("gkd_dsl", "gkd_dsl.extension"):
            for alias in node.names:
                if alias.name == "op":
                    names[alias.asname or "op"] = "op"
                elif alias.name == "source":
                    names[alias.asname or "source"] = "source"
                elif alias.name == "extension":
                    packages.add(alias.asname or "extension")
    return packages, names


def _kind_of(func: ast.expr, packages: set[str], names: dict[str, Kind]) -> Kind | None:
    if isinstance(func, ast.Name):
        return names.get(func.id)
    if isinstance(func, ast.Attribute) and func.attr in ("op", "source") and ast.unparse(func.value) in packages:
        return "op" if func.attr == "op" else "source"
    return None


def _extension(kind: Kind, call: ast.Call, node: ast.FunctionDef, written: str) -> Extension:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    signature = call.args[0] if call.args else keywords.pop("signature", None)
    if not (isinstance(signature, ast.Constant) and isinstance(signature.value, str)):
        raise ExtensionError(
            f"the signature of `{node.name}` is not a literal text", written, call.lineno, "it is read without running"
        )
    name = _name_in(signature.value)
    if not name.isidentifier():
        message = f"the signature of `{node.name}` does not begin with a name"
        raise ExtensionError(message, written, call.lineno, f'such as "{node.name}(x: Float[B, H]) -> Float[B]"')
    flags = []
    for key, value in keywords.items():
        if key is None or not isinstance(value, ast.Constant):
            raise ExtensionError(
                f"an argument of the decorator of `{node.name}` is not a literal", written, call.lineno
            )
        flags.append((key, value.value))
    doc = _first_line(ast.get_docstring(node))
    return Extension(kind, name, signature.value, doc, call.lineno, tuple(sorted(flags)))  # type: ignore[arg-type]
