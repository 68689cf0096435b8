"""How likely a model finds each of a closed set of answers: labels of a data set, options of a question.

The prompt runs once and its keys and values are kept. The options run on this shared prefix as suffixes, in chunks of
bounded size. The token that ends an answer counts: if one option begins another ("basketball", "basketball dunk"), that
token alone says that the answer ends there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vft.common.types import IGNORE_INDEX, Batch, Document, Segment
from vft.distributed.process_group import largest_over_ranks
from vft.models.attention import build_plan
from vft.models.base import VideoLanguageModel
from vft.models.kv_cache import PrefixCache

MAX_ROWS = 1024
"""Tokens of options in a pass, which bounds the memory of their logits over the vocabulary."""
MAX_KEY_ROWS = 1 << 18
"""Keys of a pass, the prefix counted once for each suffix, which bounds the memory of gathered keys and values."""


@dataclass(frozen=True, slots=True)
class OptionScore:
    """How likely one option is as the answer: summed natural log-probabilities."""

    whole: float
    """Of the whole answer, its end token included: the log-probability of giving this answer."""
    text: float
    """Of the option's own tokens."""


@dataclass(frozen=True, slots=True)
class _Suffix:
    """One option of a question."""

    question: int
    """Index of its document; -1 for a suffix that only keeps a process busy."""
    rows: Document
    """Its own rows."""
    prefix: tuple[int, int]
    """First row of its prefix in the prefix cache, and the prefix's length."""


def prefix_of(document: Document) -> Document:
    """The shared prefix of `document`, as a document of its own without labels."""
    prefix = _part(document, slice(0, document.prefix_length))
    return replace(prefix, labels_T=torch.full_like(prefix.labels_T, IGNORE_INDEX))


def _part(document: Document, rows: slice) -> Document:
    """Some rows of a document."""
    return replace(
        document,
        sample_ids=document.sample_ids[:1],
        ids_T=document.ids_T[rows],
        labels_T=document.labels_T[rows],
        positions_3T=document.positions_3T[:, rows],
        media_mask_T=document.media_mask_T[rows],
        prefix_length=0,
        suffix_lengths=(rows.stop - rows.start,),
    )


@torch.no_grad()
def score_options(
    model: VideoLanguageModel, prefixes: Batch, documents: Sequence[Document], around: tuple[int, int]
) -> list[list[OptionScore]]:
    """Scores of every option of `documents` (from `ChatEncoder.options`), in order.

    `prefixes` holds `prefix_of` of each document, on the model's device; `around` is `ChatEncoder.around_answer`. Every
    process must call it, with an empty batch if it has no question: a sharded model needs all of them in each pass.
    """
    device = prefixes.input_ids_T.device
    cache = PrefixCache()
    model(prefixes, cache)
    past = prefixes.input_ids_T.numel()
    chunks = _chunks(documents)
    scores: list[list[OptionScore]] = [[] for _ in documents]
    before, behind = around
    idle = [_Suffix(-1, Document.blank(), (0, 1))]
    for number in range(largest_over_ranks(len(chunks))):
        chunk = chunks[number] if number < len(chunks) else idle
        batch = _batch(chunk, prefixes, past).to(device)
        logits_NV = model.logits(batch, cache)
        losses = iter(F.cross_entropy(logits_NV, batch.target_ids_N, reduction="none").tolist())
        for suffix in chunk:
            log_probs = [-next(losses) for _ in range(int((suffix.rows.labels_T != IGNORE_INDEX).sum()))]
            if suffix.question >= 0:
                text = log_probs[before : len(log_probs) - behind]
                scores[suffix.question].append(OptionScore(math.fsum(log_probs), math.fsum(text)))
    return scores


def _chunks(documents: Sequence[Document]) -> list[list[_Suffix]]:
    """The options of all documents in order, as many in a chunk as both bounds allow, and at least one."""
    chunks: list[list[_Suffix]] = []
    start = rows = keys = 0
    for number, document in enumerate(documents):
        for own in document.suffix_rows:
            suffix = _Suffix(number, _part(document, own), (start, document.prefix_length))
            more_rows = suffix.rows.num_tokens
            more_keys = document.prefix_length + more_rows
            if not chunks or rows + more_rows > MAX_ROWS or keys + more_keys > MAX_KEY_ROWS:
                chunks.append([])
                rows = keys = 0
            chunks[-1].append(suffix)
            rows, keys = rows + more_rows, keys + more_keys
        start += document.prefix_length
    return chunks


def _batch(chunk: Sequence[_Suffix], prefixes: Batch, past: int) -> Batch:
    """A row of suffixes. The row before a label predicts it; the first row of a suffix never has a label."""
    labels_T = torch.cat([suffix.rows.labels_T for suffix in chunk])
    segments, row = [], 0
    for suffix in chunk:
        segments.append(Segment(row, suffix.rows.num_tokens, *suffix.prefix))
        row += suffix.rows.num_tokens
    targets_N = (labels_T != IGNORE_INDEX).nonzero().flatten()
    return Batch(
        input_ids_T=torch.cat([suffix.rows.ids_T for suffix in chunk]),
        positions_3T=torch.cat([suffix.rows.positions_3T for suffix in chunk], dim=1),
        plan=build_plan(segments, causal=True, past=past),
        target_index_N=targets_N - 1,
        target_ids_N=labels_T[targets_N],
        media_index_M=targets_N[:0],
        pixels_PD=prefixes.pixels_PD[:0],
        continues=True,
    )
