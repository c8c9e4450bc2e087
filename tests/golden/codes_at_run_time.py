"""Codes that no file alone can bring about, each with the reason and the test that does."""

WHILE_RUNNING: dict[str, str] = {
    "E0407": "a `--set` of a parameter that the spec lacks; tests/meaning/test_parameters.py",
}
