"""Objectives: what a step minimises, as functions of the model's hidden states.

A model says nothing about a loss. It returns hidden states at the rows that predict supervised tokens, and its `head`
makes logits of them. An objective runs the model on a pack and returns a *sum* over the pack; a step divides once, by
the count over all ranks and packs.
"""

from __future__ import annotations

from torch import Tensor

from vft.common.types import Batch
from vft.models.base import VideoLanguageModel
from vft.models.cross_entropy import cross_entropy_sum


def cross_entropy(model: VideoLanguageModel, batch: Batch) -> Tensor:
    """Sum over the supervised tokens of -log p(token | everything before it), natural log, in float32."""
    return cross_entropy_sum(model(batch), model.head, model.config.vocabulary, batch.target_ids_N)
