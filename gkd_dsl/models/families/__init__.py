"""One table per model family, by `model_type`."""

from gkd_dsl.models.families.bert import BERT
from gkd_dsl.models.families.distilbert import DISTILBERT
from gkd_dsl.models.families.gpt2 import GPT2
from gkd_dsl.models.families.llama import LLAMA
from gkd_dsl.models.families.mistral import MISTRAL
from gkd_dsl.models.families.mobilebert import MOBILEBERT
from gkd_dsl.models.families.qwen2 import QWEN2
from gkd_dsl.models.families.qwen3 import QWEN3
from gkd_dsl.models.families.roberta import ROBERTA
from gkd_dsl.models.families.table import Family, Place

FAMILIES: dict[str, Family] = {
    family.name: family for family in (BERT, ROBERTA, DISTILBERT, MOBILEBERT, GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)
}

__all__ = ["FAMILIES", "Family", "Place"]
