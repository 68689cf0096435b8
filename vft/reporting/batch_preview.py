"""The page of tools/inspect_batch.py: the whole index in numbers, then the first row as the model sees it."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from vft.common.types import IGNORE_INDEX, Batch, MediaPlan
from vft.config.data import DataConfig
from vft.config.run import Config
from vft.data.budget import limits_of
from vft.data.chat import ChatEncoder
from vft.data.dataset import Dataset
from vft.data.media.patches import frames_of
from vft.data.packing import PackPlan
from vft.models.processor import VisionProcessor
from vft.reporting.examples import picture

BINS = 32
"""Bars of the histogram."""
LOOKED_AT = 2000
"""Dataset that are planned once more, evenly spread, to see what they lost."""

STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
h2{margin:2rem 0 .3rem;font-size:1.1rem}table{border-collapse:collapse}
td,th{padding:.1rem .8rem .1rem 0;text-align:left}
.strip{display:flex;flex-wrap:wrap;gap:.4rem;margin:.5rem 0}.strip figure{margin:0}
.strip figcaption{color:#666;font-size:12px}
.tokens{white-space:pre-wrap;padding:.3rem .8rem;border-left:4px solid #ccc}
.tokens{font-family:ui-monospace,monospace;font-size:13px}
.bars{display:flex;align-items:flex-end;gap:2px;height:8rem;border-bottom:1px solid #999;margin-top:1rem}
.bars div{flex:1;background:#5b8;min-height:1px}.note{color:#a40}.soft{color:#666}
.supervised{background:#c8efc8}.media{background:#dde6ff;color:#345}.t{border-right:1px solid #ddd}"""


@dataclass(frozen=True)
class Summary:
    """All documents of the index in numbers."""

    facts: dict[str, str]
    lengths: Sequence[int]
    """Tokens of each document."""
    limit: int
    """Tokens of a row."""


def summary(documents: Dataset, plan: PackPlan, data: DataConfig) -> Summary | None:
    """None where everything is streamed: then nobody knows yet."""
    if not documents.documents:
        return None
    count = len(documents.documents)
    packs = plan.first_packs
    tokens = sum(documents.lengths[number] for pack in packs for number in pack)
    chosen = range(0, count, -(-count // LOOKED_AT))
    notes = Counter(
        note.split(":")[0]
        for number in chosen
        for one in documents.build(number).media
        for note in shortened(one, documents.encoder.processor, data)
    )
    looked = f" of {len(chosen):,} documents looked at" if len(chosen) < count else ""
    facts = {
        "samples": f"{documents.num_samples:,} in {count:,} documents; {len(documents.bad):,} left out",
        "tokens of a document": f"{min(documents.lengths):,} to {max(documents.lengths):,}",
        "rows of an epoch": f"{len(packs):,}, filled to {tokens / (len(packs) * data.pack_tokens):.0%} on average",
        "dropped to fit a row": ", ".join(f"{note} in {n:,}" for note, n in notes.items()) + looked or "nothing",
    }
    return Summary(facts, documents.lengths, data.pack_tokens)


def shortened(plan: MediaPlan, processor: VisionProcessor, data: DataConfig) -> list[str]:
    """What a medium lost so that its sample fits a row, against what the settings alone would give it."""
    free = processor.plan(plan.ref, plan.info, limits_of(plan.ref, data))
    notes = []
    if len(plan.frame_indices) < len(free.frame_indices):
        notes.append(f"frames: {len(plan.frame_indices)} of {len(free.frame_indices)} kept to fit data.pack_tokens")
    if plan.height * plan.width < free.height * free.width:
        size = f"{plan.width} x {plan.height} instead of {free.width} x {free.height}"
        notes.append(f"resolution: {size} px to fit data.pack_tokens")
    return notes


def _index(whole: Summary) -> list[str]:
    facts = "".join(f"<tr><th>{name}<td>{value}" for name, value in whole.facts.items())
    width = -(-max(whole.lengths) // BINS)
    counts = Counter(min(length // width, BINS - 1) for length in whole.lengths)
    most = max(counts.values())
    bars = ""
    for i in range(BINS):
        told = f"{i * width:,} to {(i + 1) * width - 1:,} tokens: {counts[i]:,}"
        bars += f'<div style="height:{counts[i] / most:.1%}" title="{told}"></div>'
    scale = f"<div class=soft>0 to {width * BINS:,} tokens; the highest bar is {most:,} documents</div>"
    return [f"<h1>All samples</h1><table>{facts}</table><div class=bars>{bars}</div>{scale}"]


def preview(batch: Batch, encoder: ChatEncoder, config: Config, whole: Summary | None) -> str:
    """A page that stands alone: no scripts, no links, pictures inside."""
    parts = [f"<!doctype html><meta charset=utf-8><title>first pack</title><style>{STYLE}</style>"]
    parts += [] if whole is None else _index(whole)
    parts.append("<h1>First pack</h1>")
    vision = int(batch.media_index_M.numel())
    rows = {
        "tokens": f"{batch.num_tokens:,} of data.pack_tokens = {config.data.pack_tokens:,}",
        "video and picture tokens": f"{vision:,}",
        "text tokens": f"{batch.num_tokens - vision:,}",
        "supervised tokens": f"{batch.num_targets:,}",
        "documents, samples": f"{len(batch.documents)}, {len(batch.sample_ids)}",
    }
    parts.append("<table>" + "".join(f"<tr><th>{k}<td>{v}" for k, v in rows.items()) + "</table>")
    patch_row = token_row = 0
    for number, document in enumerate(batch.documents):
        parts.append(f"<h2>document {number}: {html.escape(', '.join(document.sample_ids))}</h2>")
        for plan in document.media:
            count = plan.grid_thw[0] * plan.grid_thw[1] * plan.grid_thw[2]
            parts.append(_strip(batch.pixels_PD[patch_row : patch_row + count], plan, encoder.processor))
            parts += [f"<div class=note>{note}</div>" for note in shortened(plan, encoder.processor, config.data)]
            patch_row += count
        trunk = document.prefix_length
        named = [("trunk", slice(0, trunk))] if trunk else []
        named += [(f"branch {n}" if trunk else "one branch", own) for n, own in enumerate(document.suffix_rows)]
        for name, own in named:
            rows_of = slice(token_row + own.start, token_row + own.stop)
            parts.append(f"<div>{name}, {own.stop - own.start} tokens</div>")
            parts.append(_tokens(batch, rows_of, encoder.tokenizer))
        token_row += document.num_tokens
    return "\n".join(parts) + "\n"


def _strip(pixels_PD: Tensor, plan: MediaPlan, processor: VisionProcessor) -> str:
    times = (*plan.frame_times_s, plan.frame_times_s[-1])  # an odd clip's last frame stands twice
    figures = [
        f'<figure><img alt="frame" src="{picture(frame_CHW, "png")}"><figcaption>{time_s:.2f} s</figcaption></figure>'
        for frame_CHW, time_s in zip(frames_of(pixels_PD, plan, processor), times, strict=False)
    ]
    size = f"{plan.width} x {plan.height} px, grid {plan.grid_thw}, {plan.num_tokens} tokens"
    source_size = f"{plan.info.width} x {plan.info.height} px, {plan.info.num_frames} frames"
    heading = f"{html.escape(str(plan.ref.path))}: {source_size}, seen as {size}"
    return f"<div>{heading}</div><div class=strip>{''.join(figures)}</div>"


def _tokens(batch: Batch, rows: slice, tokenizer: Any) -> str:
    """Tokens one by one; a run of vision tokens is written once, with its length."""
    media = set(batch.media_index_M.tolist())
    labels = batch.labels_T[rows].tolist()
    pieces = []
    numbered = zip(range(rows.start, rows.stop), batch.input_ids_T[rows].tolist(), labels, strict=True)
    for is_media, run in groupby(numbered, key=lambda one: one[0] in media):
        if is_media:
            pieces.append(f'<span class="t media">{len(list(run))} vision tokens</span>')
            continue
        for _, token, label in run:
            supervised = " supervised" if label != IGNORE_INDEX else ""
            pieces.append(f'<span class="t{supervised}">{html.escape(tokenizer.decode([token]))}</span>')
    return f"<div class=tokens>{''.join(pieces)}</div>"
