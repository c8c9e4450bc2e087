"""What every test of this folder has."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache of encoded data of its own."""
    monkeypatch.setenv("GKD_CACHE", str(tmp_path_factory.mktemp("cache")))
