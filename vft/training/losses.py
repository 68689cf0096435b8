"""The objective of supervised tuning, and log-probabilities, as functions of a model and a batch.

A model computes no loss. It returns hidden states of the rows that predict supervised tokens, and its `head` makes
logits of them. An objective returns a *sum* over the batch; a training step divides once, by the weight of all packs of
all processes. `Trainer` takes any `Objective`: those of pairs are in `vft.training.preferences`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vft.common.types import Batch, move
from vft.models.base import Head, Objective, VideoLanguageModel


class CrossEntropy(Objective):
    """Supervised tuning: each supervised token counts the same. With several `sources`, by name, the loss of each is a
    figure."""

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self.sources = tuple(sources)
        self.figures = tuple(f"{name}/source/{one}" for name in ("loss", "tokens") for one in self.sources)

    def weight(self, batch: Batch) -> int:
        """Supervised tokens: a step's loss is the mean over them."""
        return batch.num_targets

    def __call__(self, model: VideoLanguageModel, batch: Batch) -> Tensor:
        """Sum over the supervised tokens of -log p(token | everything before it), natural log, in float32. Behind it,
        the same and the number of tokens of each source."""
        if not self.sources:
            return torch.stack(_in_chunks(model, batch, "sum")).sum()
        losses_N = torch.cat(_in_chunks(model, batch, "none"))
        names = [one.source for document in batch.documents for one in document.conversations]
        # Rows that only try memory have no conversations.
        of_suffix = [self.sources.index(name) for name in names] or [0] * batch.num_suffixes
        source_N = move(torch.tensor(of_suffix, dtype=torch.long), losses_N.device)[batch.target_suffix_N]
        with torch.no_grad():
            both_2N = torch.stack([losses_N, torch.ones_like(losses_N)])
            sums_2C = both_2N.new_zeros(2, len(self.sources)).index_add(1, source_N, both_2N)
        return torch.cat([losses_N.sum().view(1), sums_2C.flatten()])

    def named(self, means: Sequence[float]) -> dict[str, float]:
        """The loss of each source by name; nan for one of which the step has no token."""
        losses, shares = means[: len(self.sources)], means[len(self.sources) :]
        each = zip(self.figures, losses, shares, strict=False)
        return {name: loss / share if share else math.nan for name, loss, share in each}


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
