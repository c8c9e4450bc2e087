"""The tables of the families agree with transformers."""

import pytest
import transformers
from tiny_models import FAMILY_NAMES

from gkd_dsl.models.families import FAMILIES

LEGACY = {"rope_theta", "rope_scaling"}
DERIVED = {"rope_parameters", "layer_types", "head_dim", "num_key_value_heads", "sliding_window"}


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_fields_and_defaults(name):
    family = FAMILIES[name]
    config = transformers.CONFIG_MAPPING[name]()
    general = set(transformers.PreTrainedConfig().to_dict())
    fields = {key: value for key, value in config.to_dict().items() if key not in general}
    assert set(family.defaults) - LEGACY == set(fields) - set(family.computed) - ({"head_dim"} - set(family.defaults))
    for key, value in fields.items():
        if key not in DERIVED and key not in family.computed:
            assert family.defaults[key] == value, key
    assert dict(family.aliases) == config.attribute_map


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_classes(name):
    family = FAMILIES[name]
    for cls in (*family.classes.values(), *family.accepts):
        assert getattr(transformers, cls).config_class is transformers.CONFIG_MAPPING[name]
        assert getattr(transformers, cls).base_model_prefix == family.prefix
