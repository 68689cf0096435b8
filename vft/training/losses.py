"""Objectives: what a step minimises, as functions of a model and a batch.

A model computes no loss. It returns hidden states of the rows that predict supervised tokens, and its `head` makes
logits of them. An objective returns a *sum* over the batch; a training step divides once, by the number of supervised
tokens of all packs and processes. `Trainer` takes any `Objective`, so that others can stand beside `cross_entropy`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vft.common.types import Batch
from vft.models.base import Head, VideoLanguageModel


def cross_entropy(model: VideoLanguageModel, batch: Batch) -> Tensor:
    """Sum over the supervised tokens of -log p(token | everything before it), natural log, in float32.

    The logits are never all kept for the backward pass where they exceed `MAX_LOGITS`: a chunk's are computed again.
    """
    chunks = model.chunks(model(batch), batch.target_ids_N)
    if len(chunks) == 1:
        return _chunk_sum(model.head, *chunks[0])
    sums = [checkpoint(_chunk_sum, model.head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum()


def _chunk_sum(head: Head, hidden_NE: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_NE).float(), targets_N, reduction="sum")
