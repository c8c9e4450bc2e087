"""RoBERTa (Liu et al., arXiv 1907.11692)."""

from gkd_dsl.models.families.bert import DEFAULTS, FIELDS
from gkd_dsl.models.families.table import Family, Place

ROBERTA = Family(
    name="roberta",
    fields=FIELDS,
    defaults={**DEFAULTS, "vocab_size": 50265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    classes={
        "encoder": "RobertaModel",
        "classification": "RobertaForSequenceClassification",
        "masked_lm": "RobertaForMaskedLM",
        "causal_lm": "RobertaForCausalLM",
    },
    prefix="roberta",
    blocks="encoder.layer",
    embed=Place("embeddings"),
    embeddings=("embeddings",),
    words="embeddings.word_embeddings.weight",
    attention="attention.self",
    q=Place("attention.self.query", transform="heads"),
    k=Place("attention.self.key", transform="heads"),
    v=Place("attention.self.value", transform="heads"),
    attn_out=Place("attention.output.dropout"),
    mlp=Place("output.dropout"),
    heads={"classification": ("classifier",), "masked_lm": ("lm_head",), "causal_lm": ("lm_head",)},
    row_heads=("classification",),
    pooler="pooler",
    pooled=("encoder",),
    causal={"is_decoder": True},
    no_pooler="its class is built without a pooler",
)
