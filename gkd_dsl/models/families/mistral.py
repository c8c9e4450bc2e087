"""Mistral (Jiang et al., arXiv 2310.06825)."""

from gkd_dsl.models.families.llama import decoder

MISTRAL = decoder(
    "mistral",
    "Mistral",
    {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
