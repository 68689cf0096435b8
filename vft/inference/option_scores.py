"""How likely a model finds each of a closed set of answers: labels of a data set, options of a question.

The prompt runs once, its keys and values are kept, and the options run upon them as branches, in chunks of bounded
size. The token that closes the answer counts: where one option begins another ("basketball", "basketball dunk"), it
alone says that the answer ends there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vft.common.types import IGNORE_INDEX, Batch, Document, Segment
from vft.distributed.process_group import largest_over_ranks
from vft.models.attention import build_plan
from vft.models.base import VideoLanguageModel
from vft.models.kv_cache import PrefixCache

MAX_ROWS = 1024
"""Tokens of options in a pass: their logits over the vocabulary are what takes memory."""
MAX_KEY_ROWS = 1 << 18
"""Keys of a pass, each branch's trunk counted: where they are gathered, they take memory too."""


@dataclass(frozen=True, slots=True)
class OptionScore:
    """How likely one option is as the answer, natural logarithms."""

    whole: float
    """Of all that the model has to say, the closing token included, summed: the probability of giving this answer."""
    text: float
    """Of the option's own tokens alone, summed."""


@dataclass(frozen=True, slots=True)
class _Branch:
    """One option: where it stands in its document, and which rows of kept keys are its trunk."""

    question: int
    document: Document
    rows: slice
    trunk: tuple[int, int]

    @property
    def length(self) -> int:
        """Tokens."""
        return self.rows.stop - self.rows.start

    @property
    def labels_T(self) -> Tensor:
        """Of these tokens."""
        return self.document.labels_T[self.rows]


def prefix_of(document: Document) -> Document:
    """The trunk alone, as a document with nothing to learn."""
    end = document.prefix_length
    return replace(
        document,
        sample_ids=document.sample_ids[:1],
        ids_T=document.ids_T[:end],
        labels_T=torch.full_like(document.labels_T[:end], IGNORE_INDEX),
        positions_3T=document.positions_3T[:, :end],
        media_mask_T=document.media_mask_T[:end],
        prefix_length=0,
        suffix_lengths=(end,),
    )


@torch.no_grad()
def score_options(
    model: VideoLanguageModel,
    trunks: Batch,
    documents: Sequence[Document],
    around: tuple[int, int],
    max_rows: int = MAX_ROWS,
    max_keys: int = MAX_KEY_ROWS,
) -> list[list[OptionScore]]:
    """Scores of every option of `documents` (from `ChatEncoder.options`), in order.

    `trunks` is their trunks as one batch, on the model's device, `around` is `ChatEncoder.around_answer`. All processes
    must call it, with an empty batch where they have no question: a sharded model needs every one in each pass.
    """
    device = trunks.input_ids_T.device
    cache = PrefixCache(model.config.layers)
    model(trunks, cache)
    kept = trunks.input_ids_T.numel()
    chunks = _chunks(_branches(documents), max_rows, max_keys)
    scores: list[list[OptionScore]] = [[] for _ in documents]
    before, behind = around
    idle = [_Branch(-1, Document.blank(), slice(0, 1), (0, 1))]
    for number in range(largest_over_ranks(len(chunks), device)):
        chunk = chunks[number] if number < len(chunks) else idle
        batch = _batch(chunk, trunks, kept).to(device)
        logits_NV = model.logits(batch, cache)
        losses = iter(F.cross_entropy(logits_NV, batch.target_ids_N, reduction="none").tolist())
        for branch in chunk:
            said = [-next(losses) for _ in range(int((branch.labels_T != IGNORE_INDEX).sum()))]
            if branch.question >= 0:
                text = said[before : len(said) - behind]
                scores[branch.question].append(OptionScore(math.fsum(said), math.fsum(text)))
    return scores


def _branches(documents: Sequence[Document]) -> list[_Branch]:
    branches, row = [], 0
    for number, document in enumerate(documents):
        trunk = row, document.prefix_length
        branches += [_Branch(number, document, rows, trunk) for rows in document.suffix_rows]
        row += document.prefix_length
    return branches


def _chunks(branches: Sequence[_Branch], max_rows: int, max_keys: int) -> list[list[_Branch]]:
    """In order, as many at a time as the bounds allow, and at least one."""
    chunks: list[list[_Branch]] = []
    rows = keys = 0
    for branch in branches:
        more = branch.trunk[1] + branch.length
        if not chunks or rows + branch.length > max_rows or keys + more > max_keys:
            chunks.append([])
            rows = keys = 0
        chunks[-1].append(branch)
        rows, keys = rows + branch.length, keys + more
    return chunks


def _batch(chunk: Sequence[_Branch], trunks: Batch, kept: int) -> Batch:
    """A row of branches. The row before a labelled one predicts it; a branch's first row is never labelled."""
    labels_T = torch.cat([branch.labels_T for branch in chunk])
    segments, row = [], 0
    for branch in chunk:
        segments.append(Segment(row, branch.length, *branch.trunk))
        row += branch.length
    targets_N = (labels_T != IGNORE_INDEX).nonzero().flatten()
    return Batch(
        input_ids_T=torch.cat([branch.document.ids_T[branch.rows] for branch in chunk]),
        positions_3T=torch.cat([branch.document.positions_3T[:, branch.rows] for branch in chunk], dim=1),
        plan=build_plan(segments, causal=True, kept=kept),
        target_index_N=targets_N - 1,
        target_ids_N=labels_T[targets_N],
        media_index_M=targets_N[:0],
        pixels_PD=trunks.pixels_PD[:0],
        continues=True,
    )
