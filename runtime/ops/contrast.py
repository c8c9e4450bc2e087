"""Contrastive losses over the samples of a micro-batch, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_dsl.runtime.ops.common import mask_for, unit, zero_where_not
from gkd_dsl.runtime.ops.registry import function


@function("contrastive")
def contrastive(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor | None = None,
    negatives: str = "teacher",
    dims: Sequence[str] | None = None,
) -> Tensor:
    """COS-NCE of each sample against the others: [B, H] twice -> [B], [B, L, H] twice -> [B, L]. arXiv 2012.07335.

    g(s_a, t_a) + mean over b != a of (2 - g(s_a, t_b)) / 2 with g = 1 - cos, between 0 and 3; with student
    negatives g(t_a, s_b) in the mean. At a position both samples must be valid; without such b the mean is 0.
    """
    shape = student.shape[:-1]
    mask = mask_for(shape, dims, valid, False, student.device)
    counted = torch.ones(shape, dtype=torch.bool, device=student.device) if mask is None else mask.expand(shape)
    # Zeroed before the norm, so that what stands in the padding, infinities included, reaches no product.
    rows = (unit(zero_where_not(counted.unsqueeze(-1), x)) for x in (student, teacher))
    s, t = (x.reshape(len(x), -1, x.shape[-1]) for x in rows)
    at = counted.reshape(len(s), -1)
    with torch.autocast(s.device.type, enabled=False):
        cosines = torch.einsum("alh,blh->lab", s, t)
    own = cosines.diagonal(dim1=-2, dim2=-1).transpose(0, 1)
    if negatives == "student":
        cosines = cosines.transpose(-1, -2)
    others = at.t().unsqueeze(-1) & at.t().unsqueeze(-2)
    others = others & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    similarity = zero_where_not(others, (1.0 + cosines) / 2.0).sum(-1) / others.sum(-1).clamp_min(1)
    return zero_where_not(at, 1.0 - own + similarity.transpose(0, 1)).reshape(shape)
