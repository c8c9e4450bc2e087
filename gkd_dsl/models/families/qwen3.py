"""Qwen3 (Yang et al., arXiv 2505.09388): Qwen2 with a norm on each head's query and key."""

from gkd_dsl.models.families.llama import decoder
from gkd_dsl.models.families.qwen2 import SHARED
from gkd_dsl.models.families.table import Place

QWEN3 = decoder(
    "qwen3",
    "Qwen3",
    {**SHARED, "head_dim": 128, "attention_bias": False},
    q=Place("self_attn.q_norm", transform="swap"),
    k=Place("self_attn.k_norm", transform="swap"),
)
