"""Operators from tensors to tensors. Softmax, logarithms and norms are in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd_dsl.runtime.ops.common import end_token, full, mask_for, zero_where_not
from gkd_dsl.runtime.ops.divergences import expectation, log_probs
from gkd_dsl.runtime.ops.registry import function


@function("softmax")
def softmax(x: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Softmax of x / T over the last axis: the shape of x."""
    return F.softmax(full(x) / temperature, dim=-1)


@function("softmin")
def softmin(x: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Softmax of -x / T over the last axis: the shape of x."""
    return F.softmax(-full(x) / temperature, dim=-1)


@function("log_softmax")
def log_softmax(x: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-softmax of x / T over the last axis: the shape of x."""
    return log_probs(x, temperature)


@function("entropy")
def entropy(x: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(x / T): [..., C] -> [...], between 0 and log C."""
    log_p = log_probs(x, temperature)
    return -expectation(log_p.exp(), log_p)


@function("l2norm")
def l2norm(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) over the last axis: the shape of x."""
    return F.normalize(full(x), dim=-1)


@function("layernorm")
def layernorm(x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Layer normalisation without parameters over the last axis: the shape of x. arXiv 1607.06450."""
    return F.layer_norm(full(x), x.shape[-1:], eps=eps)


@function("pool")
def pool(x: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean over the valid tokens: [B, L, H] -> [B, H]; 0 for a text without any."""
    x = full(x)
    if valid is None:
        return x.mean(1)
    valid = valid.bool()
    mask = (valid if valid.ndim == 2 else valid[:, None].expand(x.shape[:2])).unsqueeze(-1)
    return zero_where_not(mask, x).sum(1) / mask.sum(1).clamp_min(1)


@function("cls")
def cls(x: Tensor, *, last: bool = False, valid: Tensor | None = None) -> Tensor:
    """The first valid token, or the last: [B, L, H] -> [B, H]; that of all tokens for a text without any."""
    rows = valid if valid is None or valid.ndim == 2 else valid.bool()[:, None].expand(x.shape[:2])
    return end_token(x, rows, last)


def _ordered(xs: dict[str, Tensor]) -> list[Tensor]:
    return [xs[slot] for slot in sorted(xs, key=int)]


@function("stack")
def stack(**xs: Tensor) -> Tensor:
    """Slots "0", "1", ... of one shape [...] -> [..., n]."""
    return torch.stack(_ordered(xs), dim=-1)


@function("concat")
def concat(**xs: Tensor) -> Tensor:
    """Slots "0", "1", ... joined along the last axis."""
    return torch.cat(_ordered(xs), dim=-1)


@function("index")
def index(x: Tensor, *, i: int) -> Tensor:
    """x[..., i]: [..., n] -> [...]."""
    return x[..., i]


@function("merge_heads")
def merge_heads(x: Tensor) -> Tensor:
    """[B, A, L, D] -> [B, L, A D]."""
    return x.transpose(1, 2).flatten(2)


@function("split_heads")
def split_heads(x: Tensor, *, heads: int) -> Tensor:
    """[B, L, H] -> [B, heads, L, H / heads]."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


@function("detach")
def detach(x: Tensor) -> Tensor:
    """The same values without a gradient."""
    return x.detach()


@function("project")
def project(x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
    """A module on the last axis: [..., I] -> [..., O]; x is brought to the dtype of its weight."""
    weight = getattr(block, "weight", None)
    return block(x.to(weight.dtype) if isinstance(weight, Tensor) else x)


@function("rank_bin")
def rank_bin(x: Tensor, *, bins: int) -> Tensor:
    """floor(bins * rank / B), ranks from 0 by ascending value: [B] -> Int[B]; equal values keep their order."""
    rank = x.detach().argsort(stable=True).argsort(stable=True)
    return rank * bins // max(1, len(x))


@function("per_sample")
def per_sample(
    x: Tensor, *, valid: Tensor | None = None, causal: bool = False, dims: Sequence[str] | None = None
) -> Tensor:
    """The mean of a loss over the positions that count in each sample: [B, ...] -> [B]; 0 where none does."""
    x = full(x)
    mask = mask_for(x.shape, dims, valid, causal, x.device)
    samples = (x.shape[0], -1)
    if mask is None:
        return x.reshape(samples).mean(1)
    mask = mask.expand(x.shape)
    return zero_where_not(mask, x).reshape(samples).sum(1) / mask.reshape(samples).sum(1).clamp_min(1)
