"""Python extensions: read without running, and loaded."""

from pathlib import Path

import pytest

import gkd_dsl
from gkd_dsl import extension
from gkd_dsl.extension import ExtensionError, load, registered, scan

EXAMPLES = Path(__file__).parent.parent / "examples"

PLAIN = '''
import gkd_dsl
raise RuntimeError("this file ran")

@gkd_dsl.op("gram2(x: Float[B, L, D], samples: int = 32) -> Float[B, L, L]", where="L <= D", linear=False)
def gram2(x, samples):
    """Inner products.

    More.
    """

@staticmethod
@gkd_dsl.source(
    "lines(limit: int = 3) "
    "-> text"
)
def anything(limit):
    pass

def not_marked():
    pass
'''


def write(folder, text, name="mine.py"):
    (folder / name).write_text(text, encoding="utf-8")
    return f"./{name}"


def test_scan_reads_and_does_not_run(tmp_path):
    gram, lines = scan(write(tmp_path, PLAIN), tmp_path)
    assert (gram.kind, gram.name, gram.line) == ("op", "gram2", 5)
    assert gram.signature == "gram2(x: Float[B, L, D], samples: int = 32) -> Float[B, L, L]"
    assert gram.doc == "Inner products."
    assert dict(gram.flags) == {"where": "L <= D", "linear": False}
    assert (lines.kind, lines.name, lines.signature, lines.doc) == (
        "source",
        "lines",
        "lines(limit: int = 3) -> text",
        "",
    )


@pytest.mark.parametrize(
    ("imported", "decorator"),
    [
        ("import gkd_dsl", "gkd_dsl.op"),
        ("import gkd_dsl as x", "x.op"),
        ("import gkd_dsl.extension", "gkd_dsl.extension.op"),
        ("import gkd_dsl.extension as x", "x.op"),
        ("from gkd_dsl import op", "op"),
        ("from gkd_dsl import op as operator", "operator"),
        ("from gkd_dsl.extension import op", "op"),
        ("from gkd_dsl import extension as e", "e.op"),
    ],
)
def test_ways_to_import(tmp_path, imported, decorator):
    text = f'{imported}\n@{decorator}("f(x: Float[B]) -> Float[B]")\ndef f(x): return x\n'
    path = write(tmp_path, text)
    assert [e.name for e in scan(path, tmp_path)] == ["f"]
    assert load(path, tmp_path)[("op", "f")].function(3) == 3


def test_decorators_of_others_are_left_alone(tmp_path):
    text = "import click\nfrom elsewhere import op\n@click.op('f()')\ndef f(): ...\n@op('g()')\ndef g(): ...\n"
    assert scan(write(tmp_path, text), tmp_path) == []


def test_functions_under_a_condition_count(tmp_path):
    text = "from gkd_dsl import source\nif True:\n    @source('a() -> text')\n    def a(): return ['x']\n"
    path = write(tmp_path, text)
    assert [e.name for e in scan(path, tmp_path)] == ["a"]
    assert load(path, tmp_path)[("source", "a")].function() == ["x"]


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("def f(:\n", "it is not Python: invalid syntax", 1),
        ("import gkd_dsl\n@gkd_dsl.op\ndef f(x): ...\n", "the decorator has no signature", 2),
        ("import gkd_dsl\nS = 'f() -> text'\n@gkd_dsl.source(S)\ndef f(): ...\n", "is not a literal text", 3),
        ("import gkd_dsl\n@gkd_dsl.source(f'f() -> text')\ndef f(): ...\n", "is not a literal text", 2),
        ("import gkd_dsl\n@gkd_dsl.source('-> text')\ndef f(): ...\n", "does not begin with a name", 2),
        ("import gkd_dsl\n@gkd_dsl.op('f() -> x', where=print)\ndef f(): ...\n", "an argument of the decorator", 2),
        (
            "import gkd_dsl\n@gkd_dsl.op('f() -> x')\ndef f(): ...\n@gkd_dsl.op('f() -> y')\ndef g(): ...\n",
            "the op `f` was registered in line 2 already",
            4,
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message, line):
    path = write(tmp_path, text)
    for read in (scan, load):
        with pytest.raises(ExtensionError) as caught:
            read(path, tmp_path)
        assert message in str(caught.value)
        assert caught.value.line == line
        assert str(caught.value).startswith(f"./mine.py:{line}: ")


def test_missing_files_and_modules(tmp_path):
    write(tmp_path, "x = 1\n", "ops.py")
    with pytest.raises(ExtensionError, match=r"no such file; .* holds ops.py"):
        scan("./opps.py", tmp_path)
    with pytest.raises(ExtensionError, match="no such module is installed"):
        scan("no_such_package_of_ours.ops", tmp_path)
    with pytest.raises(ExtensionError, match="neither a module name nor a path"):
        scan("./ops", tmp_path)


def test_what_the_file_raises_is_told_with_its_line(tmp_path):
    path = write(tmp_path, "import gkd_dsl\n\ndef f():\n    return 1 / 0\nf()\n")
    assert scan(path, tmp_path) == []
    with pytest.raises(ExtensionError, match="running it raised ZeroDivisionError") as caught:
        load(path, tmp_path)
    assert caught.value.line == 4
    path = write(tmp_path, "import no_such_package_of_ours\n", "needs.py")
    with pytest.raises(ExtensionError, match="install the package `no_such_package_of_ours`"):
        load(path, tmp_path)


def test_a_function_that_goes_away(tmp_path):
    path = write(tmp_path, "import gkd_dsl\n@gkd_dsl.op('f() -> x')\ndef f(): ...\ndel f\n")
    with pytest.raises(ExtensionError, match="is not in the module after it has run"):
        load(path, tmp_path)


def test_a_file_runs_once_and_again_when_it_changed(tmp_path):
    text = "import gkd_dsl\n@gkd_dsl.source('once() -> text')\ndef once(): return ['%s']\n"
    path = write(tmp_path, text % "a")
    first = load(path, tmp_path)[("source", "once")].function
    assert load(path, tmp_path)[("source", "once")].function is first
    write(tmp_path, text % "b")
    assert load(path, tmp_path)[("source", "once")].function() == ["b"]
    assert registered("source", "local.once").function() == ["b"]


def test_one_name_in_two_files_is_refused_when_it_is_asked_for(tmp_path):
    text = "import gkd_dsl\n@gkd_dsl.source('twice() -> text')\ndef twice(): return []\n"
    for name in ("one.py", "two.py"):
        load(write(tmp_path, text, name), tmp_path)
    with pytest.raises(ExtensionError, match=r"the source `twice` is in .*one\.py and .*two\.py"):
        registered("source", "twice")
    assert registered("source", "twice", str((tmp_path / "two.py").resolve())).file.endswith("two.py")


def test_modules_by_name_are_found_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "acme_kd_for_tests"
    package.mkdir()
    write(package, "raise RuntimeError('the package ran')\n", "__init__.py")
    write(package, "import gkd_dsl\n@gkd_dsl.op('f() -> x')\ndef f(): ...\n", "ops.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert [e.name for e in scan("acme_kd_for_tests.ops", tmp_path)] == ["f"]


def test_the_decorators_give_the_function_back():
    @gkd_dsl.op("same(x: Float[B]) -> Float[B]", linear=True)
    def same(x):
        return x

    assert same(5) == 5
    assert extension.registered("op", "same").function is same
    with pytest.raises(TypeError, match="takes its signature as a text"):
        gkd_dsl.op(same)


def test_the_example_gives_clean_different_texts_in_a_fixed_order():
    path = "./docstrings.py"
    (found,) = scan(path, EXAMPLES)
    assert found.signature == "standard_library_docstrings(limit: int = 4000) -> text"
    function = load(path, EXAMPLES)[("source", found.name)].function
    texts = function(limit=500)
    assert texts == function(limit=800)[:500]
    assert len(set(texts)) == 500
    for text in texts:
        assert 20 <= len(text) <= 400
        assert "\n" not in text
        assert "  " not in text
        assert ">>>" not in text


def test_a_file_that_failed_is_run_again(tmp_path):
    (tmp_path / "ops.py").write_text("raise RuntimeError('not yet')\n")
    for _ in range(2):
        with pytest.raises(ExtensionError, match="not yet"):
            load("./ops.py", tmp_path)
