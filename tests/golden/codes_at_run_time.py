"""Codes that no file alone can bring about, each with the reason and the test that does."""

WHILE_RUNNING: dict[str, str] = {}
