"""A data source in Python: the docstrings of the standard library, text that every machine has.

import python "./docstrings.py" as local
data texts = local.standard_library_docstrings(limit = 4000)
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import gkd_dsl

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "encodings"}
NOT_PROSE = (" ", "\t", ">>>", "-", "*", "+", "|", "@", ":", "=", "#")
SHORTEST, LONGEST = 20, 400


@gkd_dsl.source("standard_library_docstrings(limit: int = 4000) -> text")
def standard_library_docstrings(limit: int = 4000) -> list[str]:
    """Paragraphs of the docstrings of Python's own modules, 20 to 400 characters each, none twice.

    The files are parsed, not imported, in the order of their names; the first `limit` paragraphs are given.
    """
    found: dict[str, None] = {}
    for path in modules():
        for doc in docstrings(path):
            for text in paragraphs(doc):
                found[text] = None
                if len(found) >= limit:
                    return list(found)
    return list(found)


def modules() -> list[Path]:
    """The Python files of the standard library, without its tests, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a file: of the module, its classes and its functions, in the order they stand."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield doc
            waiting.extend(reversed(node.body))


def paragraphs(doc: str) -> Iterator[str]:
    """The paragraphs of a docstring that are sentences: no code, no lists of parameters, no tables."""
    for block in re.split(r"\n\s*\n", doc):
        if any(
            line.startswith((" ", "\t", ">>>", "-", "*", "+", "|", "@", ":", "=", "#")) for line in block.split("\n")
        ):
            continue
        text = " ".join(block.split()).replace("``", "").replace("`", "")
        if not SHORTEST <= len(text) <= LONGEST or not text[0].isalpha() or text.count(" ") < 3:
            continue
        letters = sum(character.isalpha() or character == " " for character in text)
        if letters >= 0.85 * len(text):
            yield text
