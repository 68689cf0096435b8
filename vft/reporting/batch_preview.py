"""The page of `vft inspect`: the whole index in numbers, then the first pack as the model sees it.

`preview.html` beside this module is its template.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vft.common.types import IGNORE_INDEX, Batch, Document, MediaPlan
from vft.config.data import DataConfig
from vft.config.run import Config
from vft.data.budget import limits_of
from vft.data.chat import ChatEncoder
from vft.data.dataset import Dataset
from vft.data.media.patches import frames_of
from vft.data.packing import PackPlan
from vft.models.processor import VisionProcessor
from vft.reporting.examples import picture
from vft.reporting.templates import render

NUM_BARS = 32
"""Bars of the histogram of lengths."""
MAX_PLANNED = 2000
"""Documents, evenly spread, that are planned again to see what they lose to fit a row."""

Token = tuple[str, str]
"""CSS classes and text of a token."""


@dataclass(frozen=True)
class Summary:
    """All documents of the index in numbers."""

    facts: dict[str, str]
    lengths: Sequence[int]
    """Tokens of each document."""


def summary(documents: Dataset, plan: PackPlan, data: DataConfig) -> Summary | None:
    """The index in numbers; None if all sources are streams, which have no index."""
    if not documents.documents:
        return None
    count = len(documents.documents)
    packs = plan.first_packs
    tokens = sum(documents.lengths[number] for pack in packs for number in pack)
    planned = range(0, count, -(-count // MAX_PLANNED))
    notes = Counter(
        note.split(":")[0]
        for number in planned
        for media in documents.build(number).media
        for note in shortened(media, documents.encoder.processor, data)
    )
    planned_text = f" of {len(planned):,} documents looked at" if len(planned) < count else ""
    facts = {
        "samples": f"{documents.num_samples:,} in {count:,} documents; {len(documents.bad):,} left out",
        "tokens of a document": f"{min(documents.lengths):,} to {max(documents.lengths):,}",
        "rows of an epoch": f"{len(packs):,}, filled to {tokens / (len(packs) * data.pack_tokens):.0%} on average",
        "dropped to fit a row": ", ".join(f"{note} in {n:,}" for note, n in notes.items()) + planned_text or "nothing",
    }
    return Summary(facts, documents.lengths)


def shortened(plan: MediaPlan, processor: VisionProcessor, data: DataConfig) -> list[str]:
    """What a video or picture lost so that its sample fits a row, compared with the configured limits alone."""
    free = processor.plan(plan.ref, plan.info, limits_of(plan.ref, data))
    notes = []
    if len(plan.frame_indices) < len(free.frame_indices):
        notes.append(f"frames: {len(plan.frame_indices)} of {len(free.frame_indices)} kept to fit data.pack_tokens")
    if plan.height * plan.width < free.height * free.width:
        size = f"{plan.width} x {plan.height} instead of {free.width} x {free.height}"
        notes.append(f"resolution: {size} px to fit data.pack_tokens")
    return notes


def preview(batch: Batch, encoder: ChatEncoder, config: Config, index: Summary | None) -> str:
    """The page, which stands alone: no scripts, no links, pictures inside."""
    vision = int(batch.media_index_M.numel())
    facts = {
        "tokens": f"{batch.num_tokens:,} of data.pack_tokens = {config.data.pack_tokens:,}",
        "video and picture tokens": f"{vision:,}",
        "text tokens": f"{batch.num_tokens - vision:,}",
        "supervised tokens": f"{batch.num_targets:,}",
        "documents, samples": f"{len(batch.documents)}, {len(batch.sample_ids)}",
    }
    documents = []
    patch = 0
    for document in batch.documents:
        media = []
        for plan in document.media:
            pixels_PD = batch.pixels_PD[patch : patch + math.prod(plan.grid_thw)]
            patch += len(pixels_PD)
            frames_TCHW = frames_of(pixels_PD, plan, encoder.processor)
            times = (*plan.frame_times_s, plan.frame_times_s[-1])  # an odd clip's last frame is there twice
            media.append(
                {
                    "title": _title(plan),
                    "frames": [
                        (picture(frame_CHW, "png"), f"{time_s:.2f} s")
                        for frame_CHW, time_s in zip(frames_TCHW, times, strict=False)
                    ],
                    "notes": shortened(plan, encoder.processor, config.data),
                }
            )
        documents.append({"sample_ids": document.sample_ids, "media": media, "parts": _parts(document, encoder)})
    return render("preview.html", index=index and _histogram(index), facts=facts, documents=documents)


def _histogram(index: Summary) -> dict[str, Any]:
    width = -(-max(index.lengths) // NUM_BARS)
    counts = Counter(min(length // width, NUM_BARS - 1) for length in index.lengths)
    most = max(counts.values())
    bars = [
        {
            "height": f"{counts[i] / most:.1%}",
            "title": f"{i * width:,} to {(i + 1) * width - 1:,} tokens: {counts[i]:,}",
        }
        for i in range(NUM_BARS)
    ]
    return {"facts": index.facts, "bars": bars, "longest": f"{width * NUM_BARS:,}", "most": f"{most:,}"}


def _title(plan: MediaPlan) -> str:
    source = f"{plan.info.width} x {plan.info.height} px, {plan.info.num_frames} frames"
    seen = f"{plan.width} x {plan.height} px, grid {plan.grid_thw}, {plan.num_tokens} tokens"
    return f"{plan.ref.path}: {source}, seen as {seen}"


def _parts(document: Document, encoder: ChatEncoder) -> list[tuple[str, list[Token]]]:
    """The trunk, if there is one, and the branches of a document, each with its tokens."""
    trunk = document.prefix_length
    parts = [("trunk", slice(0, trunk))] if trunk else []
    parts += [(f"branch {n}" if trunk else "one branch", rows) for n, rows in enumerate(document.suffix_rows)]
    return [
        (f"{name}, {rows.stop - rows.start} tokens", _tokens(document, rows, encoder.tokenizer)) for name, rows in parts
    ]


def _tokens(document: Document, rows: slice, tokenizer: Any) -> list[Token]:
    """The tokens one by one; each run of vision tokens as one."""
    columns = (document.media_mask_T[rows], document.ids_T[rows], document.labels_T[rows])
    tokens: list[Token] = []
    for is_media, run in groupby(zip(*(column.tolist() for column in columns), strict=True), key=lambda row: row[0]):
        if is_media:
            tokens.append(("t media", f"{len(list(run))} vision tokens"))
        else:
            tokens += [
                ("t" if label == IGNORE_INDEX else "t supervised", tokenizer.decode([token])) for _, token, label in run
            ]
    return tokens
