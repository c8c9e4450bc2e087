import json
from functools import partial

import pytest
from tiny_models import CONFIGS, assert_close, batch_of, build


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """One folder with a config.json for each family."""
    root = tmp_path_factory.mktemp("tiny")
    for family, config in CONFIGS.items():
        (root / family).mkdir()
        (root / family / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture
def make(folder):
    """A tiny random model of a family; further arguments change its config."""
    return partial(build, folder)


@pytest.fixture
def batch():
    return batch_of


@pytest.fixture
def close():
    return assert_close
