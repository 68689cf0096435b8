"""The objective of supervised tuning, and log-probabilities, as functions of a model and a batch.

A model computes no loss. It returns hidden states of the rows that predict supervised tokens, and its `head` makes
logits of them. An objective returns a *sum* over the batch; a training step divides once, by the weight of all packs of
all processes. `Trainer` takes any `Objective`: those of pairs are in `vft.training.preferences`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vft.common.types import Batch
from vft.models.base import Head, Objective, VideoLanguageModel


class CrossEntropy(Objective):
    """Supervised tuning: each supervised token counts the same."""

    def weight(self, batch: Batch) -> int:
        """Supervised tokens: a step's loss is the mean over them."""
        return batch.num_targets

    def __call__(self, model: VideoLanguageModel, batch: Batch) -> Tensor:
        """Sum over the supervised tokens of -log p(token | everything before it), natural log, in float32."""
        return torch.stack(_in_chunks(model, batch, "sum")).sum()


cross_entropy = CrossEntropy()


def log_probabilities(model: VideoLanguageModel, batch: Batch) -> Tensor:
    """log p(token | everything before it) of the supervised tokens [N], natural log, in float32."""
    return -torch.cat(_in_chunks(model, batch, "none"))


def _in_chunks(model: VideoLanguageModel, batch: Batch, reduction: str) -> list[Tensor]:
    """The logits are never all kept for the backward pass where they exceed `MAX_LOGITS`: a chunk's are computed
    again."""
    chunks = model.chunks(model(batch), batch.target_ids_N)
    if len(chunks) == 1:
        return [_of_chunk(model.head, *chunks[0], reduction)]
    return [checkpoint(_of_chunk, model.head, *chunk, reduction, use_reentrant=False) for chunk in chunks]


def _of_chunk(head: Head, hidden_NE: Tensor, targets_N: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(head(hidden_NE).float(), targets_N, reduction=reduction)
