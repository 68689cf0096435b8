"""Cross-entropy of supervised tokens, as a sum: a step divides once, by the count over all ranks and packs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 27
"""Logits held at once (512 MiB in float32); more supervised tokens than fit are taken in chunks."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, E] to logits [N, V]."""


def cross_entropy_sum(hidden_NE: Tensor, head: Head, vocabulary: int, targets_N: Tensor) -> Tensor:
    """Sum over N of -log softmax(head(hidden))[target], natural log, in float32.

    The logits are never all kept for the backward pass where they exceed `MAX_LOGITS`: a chunk's are computed again.
    """
    chunk = max(1, MAX_LOGITS // vocabulary)
    if hidden_NE.shape[0] <= chunk:
        return _chunk_sum(hidden_NE, head, targets_N)
    sums = [
        checkpoint(_chunk_sum, hidden, head, targets, use_reentrant=False)
        for hidden, targets in zip(hidden_NE.split(chunk), targets_N.split(chunk), strict=True)
    ]
    return torch.stack(sums).sum()


def token_losses(hidden_NE: Tensor, head: Head, vocabulary: int, targets_N: Tensor) -> Tensor:
    """The terms of `cross_entropy_sum` [N], outside of training: no graph, and one chunk's logits at a time."""
    chunk = max(1, MAX_LOGITS // vocabulary)
    with torch.no_grad():
        pairs = zip(hidden_NE.split(chunk), targets_N.split(chunk), strict=True)
        return torch.cat([F.cross_entropy(head(x).float(), targets, reduction="none") for x, targets in pairs])


def _chunk_sum(hidden_NE: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_NE).float(), targets_N, reduction="sum")
