import json
from pathlib import Path

import pytest

CONFIGS = json.loads((Path(__file__).parents[1] / "models" / "tiny.json").read_text())


@pytest.fixture
def save(tmp_path):
    """Write a family's tiny config.json, with changes, to a folder."""

    def write(family, name=None, **changes):
        config = {**CONFIGS.get(family, {"model_type": family}), **changes}
        folder = tmp_path / (name or family)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write
