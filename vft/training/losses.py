"""Objectives: what a step minimises, as functions of a model and a batch.

A model computes no loss. It returns hidden states of the rows that predict supervised tokens, and its `head` makes
logits of them. An objective returns a *sum* over the batch; a training step divides once, by the number of supervised
tokens of all packs and processes. `Trainer` takes any `Objective`, so that others can stand beside `cross_entropy`.
"""

from __future__ import annotations

from torch import Tensor

from vft.common.types import Batch
from vft.models.base import VideoLanguageModel
from vft.models.cross_entropy import cross_entropy_sum


def cross_entropy(model: VideoLanguageModel, batch: Batch) -> Tensor:
    """Sum over the supervised tokens of -log p(token | everything before it), natural log, in float32."""
    return cross_entropy_sum(model(batch), model.head, model.config.vocabulary, batch.target_ids_N)
