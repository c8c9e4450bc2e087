"""What follows from the fields of a config alone."""

import pytest
import torch
from tiny_models import build

from gkd_dsl.models.families import FAMILIES
from gkd_dsl.models.fields import positions


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_runs_on_as_many_tokens_as_it_has_positions_for(folder, family):
    tiny = build(folder, family)
    most = positions(tiny.info)

    def run(count):
        ids = torch.full((1, count), 5)
        return tiny.model(input_ids=ids, attention_mask=torch.ones_like(ids))

    if most is None:
        run(int(tiny.model.config.max_position_embeddings) + 3)
        return
    run(most)
    with pytest.raises((IndexError, RuntimeError)):
        run(most + 1)
