"""Where the logits of a language model are made: a linear map, and what its class does to what that gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gkd_dsl.models.info import ModelInfo


@dataclass(frozen=True)
class LinearHead:
    """`module`, of the whole model, gives z; the logits are z * scale (z / scale with `divide`), then capped.

    A cap c makes them c * tanh(. / c).
    """

    module: str
    scale: float = 1.0
    divide: bool = False
    softcap: float | None = None


_PLAIN: Mapping[str, str] = {
    "LlamaForCausalLM": "lm_head",
    "MistralForCausalLM": "lm_head",
    "Qwen2ForCausalLM": "lm_head",
    "Qwen3ForCausalLM": "lm_head",
    "GemmaForCausalLM": "lm_head",
    "GPT2LMHeadModel": "lm_head",
    "BertForMaskedLM": "cls.predictions.decoder",
    "BertLMHeadModel": "cls.predictions.decoder",
    "RobertaForMaskedLM": "lm_head.decoder",
    "RobertaForCausalLM": "lm_head.decoder",
    "DistilBertForMaskedLM": "vocab_projector",
}
"""Classes whose logits are what a linear map gives."""

_CAPPED: Mapping[str, float | None] = {"Gemma2ForCausalLM": 30.0, "Gemma3ForCausalLM": None}
"""Classes that cap their logits by `final_logit_softcapping`, and what that is where the config leaves it out."""
_MULTIPLIED: Mapping[str, float] = {"CohereForCausalLM": 0.0625, "Cohere2ForCausalLM": 0.0625}
"""Classes that multiply them by `logit_scale`."""
_DIVIDED: Mapping[str, float] = {"GraniteForCausalLM": 1.0}
"""Classes that divide them by `logits_scaling`."""


def linear_head(info: ModelInfo) -> LinearHead | None:
    """The head of a language model; None where it is no linear map, or not known."""
    name = info.architecture
    if info.formal or info.task not in ("causal_lm", "masked_lm"):
        return None
    if name in _PLAIN:
        return LinearHead(_PLAIN[name])
    if name in _CAPPED:
        cap = _field(info, "final_logit_softcapping", _CAPPED[name])
        return LinearHead("lm_head", softcap=None if cap is None else float(cap))
    if name in _MULTIPLIED:
        return LinearHead("lm_head", scale=float(_field(info, "logit_scale", _MULTIPLIED[name])))
    if name in _DIVIDED:
        return LinearHead("lm_head", scale=float(_field(info, "logits_scaling", _DIVIDED[name])), divide=True)
    return None


def is_packed(info: ModelInfo, module: str) -> bool:
    """Whether a head is quantised with the rest of its model. The libraries leave it out unless others are named."""
    if info.quantised is None:
        return False
    given = dict(info.quantised.args)
    left = given.get("llm_int8_skip_modules", given.get("modules_to_not_convert"))
    return left is not None and not any(module == name or module.endswith(f".{name}") for name in left)


def _field(info: ModelInfo, name: str, default: Any) -> Any:
    return info.config.get(name, default)
