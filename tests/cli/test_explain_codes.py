"""`gkd explain` of codes and operators that there are, and of some that there are not."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from gkd_dsl.cli.main import application


@pytest.mark.parametrize(("what", "said"), [("E0301", "# Sizes that differ"), ("e0301", "# Sizes"), ("kl", "kl: ")])
def test_what_there_is(what, said):
    result = CliRunner().invoke(application(), ["explain", what])
    assert result.exit_code == 0
    assert result.output.startswith(said)


@pytest.mark.parametrize("what", ["E9999", "W0001", "kll", "nothing.gkd"])
def test_what_there_is_not_ends_in_words(what):
    result = CliRunner().invoke(application(), ["explain", what])
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert isinstance(result.exception, SystemExit)
