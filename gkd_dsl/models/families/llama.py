"""Llama (Touvron et al., arXiv 2302.13971) and what the families built like it share."""

from collections.abc import Mapping
from typing import Any

from gkd_dsl.models.families.table import Family, Place

FIELDS = {
    "H": "hidden_size",
    "V": "vocab_size",
    "N": "num_hidden_layers",
    "A": "num_attention_heads",
    "KV": "num_key_value_heads",
    "D": "head_dim",
    "F": "intermediate_size",
}

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_theta": None,
    "rope_scaling": None,
    "attention_dropout": 0.0,
}


def decoder(
    name: str, cls: str, defaults: Mapping[str, Any], *, q: Place | None = None, k: Place | None = None
) -> Family:
    """A decoder of pre-norm blocks with rotary positions, `self_attn` and `mlp`."""
    return Family(
        name=name,
        decoder=True,
        fields=FIELDS,
        defaults={**DEFAULTS, **defaults},
        classes={
            "encoder": f"{cls}Model",
            "classification": f"{cls}ForSequenceClassification",
            "causal_lm": f"{cls}ForCausalLM",
        },
        prefix="model",
        blocks="layers",
        embed=Place("embed_tokens"),
        embeddings=("embed_tokens",),
        words="embed_tokens.weight",
        final_norm="norm",
        attention="self_attn",
        q=q or Place("self_attn.q_proj", transform="heads"),
        k=k or Place("self_attn.k_proj", transform="heads"),
        v=Place("self_attn.v_proj", transform="heads"),
        attn_out=Place("self_attn"),
        mlp=Place("mlp"),
        heads={"classification": ("score",), "causal_lm": ("lm_head",)},
    )


LLAMA = decoder("llama", "Llama", {"pretraining_tp": 1, "attention_bias": False, "mlp_bias": False, "head_dim": None})
