"""BERT (Devlin et al., arXiv 1810.04805)."""

from gkd_dsl.models.families.table import Family, Place

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "use_cache": True,
    "classifier_dropout": None,
    "is_decoder": False,
    "add_cross_attention": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": True,
}

FIELDS = {
    "H": "hidden_size",
    "V": "vocab_size",
    "N": "num_hidden_layers",
    "A": "num_attention_heads",
    "KV": "num_attention_heads",
    "D": "hidden_size",
    "F": "intermediate_size",
}

BERT = Family(
    name="bert",
    fields=FIELDS,
    defaults=DEFAULTS,
    classes={
        "encoder": "BertModel",
        "classification": "BertForSequenceClassification",
        "masked_lm": "BertForMaskedLM",
        "causal_lm": "BertLMHeadModel",
    },
    accepts={"BertForPreTraining": "masked_lm"},
    prefix="bert",
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
    heads={"classification": ("classifier",), "masked_lm": ("cls",), "causal_lm": ("cls",)},
    row_heads=("classification",),
    pooler="pooler",
    pooled=("encoder", "classification"),
    causal={"is_decoder": True},
    no_pooler="its class is built without a pooler",
)
