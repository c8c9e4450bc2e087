"""Attention scores and probabilities of chosen layers; every other layer keeps the function it had.

transformers looks its attention function up by the name in the config. While scores are wanted that
name is ours; our function computes the tapped layers itself and hands all others on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

_PREFIX = "gkd_tapped_"


class Recorder(Protocol):
    """Takes `scores` and `probs` of one attention module as they are computed."""

    def __call__(self, what: str, value: Tensor) -> None:
        """Take `value`; `what` is "scores" or "probs"."""


_TAPPED: dict[nn.Module, Recorder] = {}


def _discard(what: str, value: Tensor) -> None:
    """The recorder of a recomputation: what is computed again was recorded the first time."""


def implementation(config: Any) -> str:
    """Our name for a config's attention: `eager` keeps eager, everything else becomes SDPA."""
    return _PREFIX + ("eager" if config._attn_implementation == "eager" else "sdpa")


@contextmanager
def tapped(recorders: Mapping[nn.Module, Recorder], configs: Iterable[Any]) -> Iterator[None]:
    """Within, the given attention modules report scores and probabilities to their recorders."""
    configs = list(configs)
    before = [config._attn_implementation for config in configs]
    shadowed = {module: _TAPPED[module] for module in recorders if module in _TAPPED}
    _TAPPED.update(recorders)
    try:
        for config, name in zip(configs, before, strict=True):
            if not str(name).startswith(_PREFIX):
                config._attn_implementation = implementation(config)
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        for module in recorders:
            _TAPPED.pop(module, None)
        _TAPPED.update(shadowed)


@contextmanager
def recomputing(modules: Iterable[nn.Module], configs: Iterable[Any]) -> Iterator[None]:
    """Within, these modules compute as when they were tapped, and report to nobody.

    Gradient checkpointing computes a block twice and insists that both times save the same tensors.
    """
    with tapped(dict.fromkeys(modules, _discard), configs):
        yield


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    *,
    record: Recorder,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with its scores `[B, A, L, L]` (scaled, before the mask) and probabilities (before dropout) reported.

    `query` is `[B, A, L, D]`, `key` and `value` are `[B, KV, L, D]`; the mask is boolean (True: attend),
    additive, or None. A query that may attend to nothing gives zeros, as SDPA does.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    record("scores", scores)

    logits = scores if scores.dtype == torch.float64 else scores.float()
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        shape = logits.shape[-2:]
        attention_mask = torch.ones(shape, dtype=torch.bool, device=logits.device).tril()[None, None]
    idle = None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
        idle = ~attention_mask.any(dim=-1, keepdim=True)
    elif attention_mask is not None:
        logits = logits + attention_mask
    probs = torch.softmax(logits, dim=-1)
    if idle is not None:
        probs = probs.masked_fill(idle, 0.0)
    record("probs", probs)

    weights = nn.functional.dropout(probs.to(value.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def _dispatch(fallback: Callable[..., Any] | None) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        record = _TAPPED.get(module)
        if record is not None:
            return attend(module, query, key, value, attention_mask, record=record, **kwargs)
        function = fallback or _eager(module)
        return function(module, query, key, value, attention_mask, **kwargs)

    return attention


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of a model: transformers keeps one in the file of each family."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _sdpa(*args: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(*args, **kwargs)


AttentionInterface.register(_PREFIX + "sdpa", _dispatch(_sdpa))
AttentionInterface.register(_PREFIX + "eager", _dispatch(None))
AttentionMaskInterface.register(_PREFIX + "sdpa", sdpa_mask)
AttentionMaskInterface.register(_PREFIX + "eager", eager_mask)
