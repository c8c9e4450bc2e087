"""A tiny tokenizer, and a cache of its own for every test."""

import pytest
from loader_help import word_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GKD_CACHE", str(folder))
    return folder


@pytest.fixture
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def causal_tokenizer():
    return word_tokenizer(causal=True)
