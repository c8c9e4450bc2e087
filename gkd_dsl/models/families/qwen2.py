"""Qwen2 and Qwen2.5 (Yang et al., arXiv 2407.10671)."""

from gkd_dsl.models.families.llama import decoder

SHARED = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

QWEN2 = decoder("qwen2", "Qwen2", SHARED)
