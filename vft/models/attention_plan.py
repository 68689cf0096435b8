"""Who attends whom in a packed row, as data: a plan is made once for each batch and used by every layer.

A document has a shared prefix (its system text and media) and suffixes (each a question with its answer), elsewhere
called trunk and branches. Rows of the prefix attend the prefix, rows of a suffix attend the prefix and their suffix.
Each of these parts is a `Segment`. There is no padding, and no mask of the size of the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vft.common.types import AttentionPlan, Segment


def document_segments(start: int, prefix_length: int, suffix_lengths: Sequence[int]) -> list[Segment]:
    """Segments of one document whose first token is row `start`. With a single suffix it is one segment."""
    if len(suffix_lengths) == 1:
        return [Segment(start, prefix_length + suffix_lengths[0])]
    segments = [Segment(start, prefix_length)]
    row = start + prefix_length
    for length in suffix_lengths:
        segments.append(Segment(row, length, prefix_start=start, prefix_length=prefix_length))
        row += length
    return segments


def build_plan(segments: Iterable[Segment], causal: bool, past: int = 0) -> AttentionPlan:
    """The plan of a row that consists of `segments`, which must cover its rows in order.

    With `past` rows of keys from earlier passes, the keys are these and then the row's own. Prefixes lie among the past
    keys.
    """
    segments = tuple(segment for segment in segments if segment.q_length)
    row = 0
    for segment in segments:
        assert segment.q_start == row, f"segment starts at row {segment.q_start}, the one before ended at {row}"
        row += segment.q_length
    k_index = None
    if past or any(segment.prefix_length for segment in segments):
        k_index = torch.cat([key_rows(segment, past) for segment in segments])
    return AttentionPlan(
        segments=segments,
        causal=causal,
        cu_seqlens_q_S=_cumulative(segment.q_length for segment in segments),
        cu_seqlens_k_S=_cumulative(segment.k_length for segment in segments),
        k_index=k_index,
        max_q=max((segment.q_length for segment in segments), default=0),
        max_k=max((segment.k_length for segment in segments), default=0),
        past=past,
    )


def blocks_plan(lengths: Sequence[int]) -> AttentionPlan:
    """The plan of consecutive blocks of these lengths. Each row attends all rows of its own block."""
    blocks = [Segment(end - length, length) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    return build_plan(blocks, causal=False)


def key_rows(segment: Segment, past: int) -> Tensor:
    """Rows of the keys that a segment attends."""
    prefix = torch.arange(segment.prefix_start, segment.prefix_start + segment.prefix_length)
    own = past + segment.q_start
    return torch.cat([prefix, torch.arange(own, own + segment.q_length)])


def attended_pairs(segments: Iterable[Segment], causal: bool) -> int:
    """Query-key pairs that are computed (of causal attention only the lower triangle). FLOP counts are based on it."""
    total = 0
    for segment in segments:
        own = segment.q_length * (segment.q_length + 1) // 2 if causal else segment.q_length**2
        total += own + segment.q_length * segment.prefix_length
    return total


def _cumulative(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
