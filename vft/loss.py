"""Cross-entropy of supervised tokens, as a sum: a step divides once, by the count over all ranks and packs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 27
"""Logits held at once (512 MiB in float32); more supervised tokens than fit are taken in chunks."""


def linear_cross_entropy_sum(hidden_NE: Tensor, weight_VE: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over N of -log softmax(hidden @ weight.T)[target], natural log, in float32.

    The logits are never all kept for the backward pass where they exceed `MAX_LOGITS`: a chunk's are computed again.
    """
    chunk = max(1, MAX_LOGITS // weight_VE.shape[0])
    if hidden_NE.shape[0] <= chunk:
        return _chunk_sum(hidden_NE, weight_VE, targets_N)
    sums = [
        checkpoint(_chunk_sum, hidden, weight_VE, targets, use_reentrant=False, preserve_rng_state=False)
        for hidden, targets in zip(hidden_NE.split(chunk), targets_N.split(chunk), strict=True)
    ]
    return torch.stack(sums).sum()


def _chunk_sum(hidden_NE: Tensor, weight_VE: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_NE, weight_VE.to(hidden_NE.dtype))
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
