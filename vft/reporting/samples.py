"""Samples as the model gets them, ready for a page: frames with their times, the text with what is supervised in it,
lengths, and what was left out to fit a row. `samples.html` beside this module is their template.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from vft.common.types import IGNORE_INDEX, Document, MediaKind, MediaPlan, Patches
from vft.config.data import DataConfig
from vft.data.budget import limits_of
from vft.data.chat import ChatEncoder, control_tokens
from vft.data.dataset import Dataset
from vft.data.media.errors import MediaError
from vft.data.media.patches import frames_of, load_patches
from vft.models.processor import VisionProcessor

T = TypeVar("T")
Frame = tuple[str, str]
"""A `data:` URL and the time that it shows."""
Decode = Callable[[MediaPlan, VisionProcessor], Patches]
"""As `load_patches`, which raises MediaError."""

MAX_FRAMES = 32
"""Shown of each video."""
QUALITY = 90
"""Of the frames, as JPEG without subsampled colours."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text and what it is: `vision`, `supervised`, `rejected` (supervised, in the worse answer of a pair),
    `control` (a token of the chat template), or empty for other text that the model reads."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """A shared prefix, a suffix, or a whole sample that shares nothing."""

    name: str
    is_shared: bool
    num_tokens: int
    text: list[Piece]
    tokens: list[Piece]
    """The same, token by token; each run of vision tokens is one."""


@dataclass(frozen=True, slots=True)
class MediumView:
    """A video or picture."""

    kind: MediaKind
    title: str
    frames: list[Frame]
    notes: list[str]
    """What it lost so that its sample fits a row."""
    problem: str = ""
    """Why there are no frames."""


@dataclass(frozen=True, slots=True)
class SampleView:
    """A sample, or all those that share their media (`Document`)."""

    name: str
    sources: list[str]
    media: list[MediumView]
    parts: list[Part]
    num_tokens: int
    num_vision: int
    num_supervised: int

    @property
    def kinds(self) -> list[str]:
        """Kinds of its media; `text` if it has none."""
        return sorted({medium.kind for medium in self.media}) or ["text"]

    @property
    def is_paired(self) -> bool:
        """Whether it holds a rejected answer."""
        return any(piece.kind == "rejected" for part in self.parts for piece in part.text)

    @property
    def is_shortened(self) -> bool:
        """Whether a medium lost something."""
        return any(medium.notes for medium in self.media)


def samples_shown(documents: Dataset, numbers: Iterable[int], decode: Decode = load_patches) -> list[SampleView]:
    """The documents of these numbers. A medium that `decode` can't decode has a `problem` instead of frames."""
    encoder, config = documents.encoder, documents.config
    built = [documents.build(number) for number in numbers]
    return [
        sample_shown(one, [medium_decoded(plan, encoder.processor, config, decode) for plan in one.media], encoder)
        for one in built
    ]


def sample_shown(document: Document, media: list[MediumView], encoder: ChatEncoder) -> SampleView:
    """A document, with its media in their order."""
    ids, more = document.sample_ids, len(document.sample_ids) - 1
    supervised = {False: "supervised", True: "rejected"}
    rejected = document.rejected or (False,) * len(document.suffix_lengths)
    rows = [("shared prefix", slice(0, document.prefix_length), "")] if document.prefix_length else []
    for number, (suffix, is_rejected) in enumerate(zip(document.suffix_rows, rejected, strict=True)):
        name = f"suffix {number + 1}" if document.prefix_length else "whole sample"
        if any(rejected):
            name += _answer_of_pair(document.desirable[number // 2], is_rejected)
        elif more:
            name += f": {ids[number]}"
        rows.append((name, suffix, supervised[is_rejected]))
    parts = [_part(name, document, own, kind, encoder.tokenizer) for name, own, kind in rows]
    return SampleView(
        name=f"{ids[0]} and {more} more about the same" if more else ids[0],
        sources=sorted({one.source for one in document.conversations}),
        media=media,
        parts=parts,
        num_tokens=document.num_tokens,
        num_vision=int(document.media_mask_T.sum()),
        num_supervised=int((document.labels_T != IGNORE_INDEX).sum()),
    )


def _answer_of_pair(desirable: bool | None, is_rejected: bool) -> str:
    if desirable is not None:  # its second suffix is only compared with
        return ", the answer to another prompt" if is_rejected else f", an answer {'' if desirable else 'not '}to give"
    return f", the {'rejected' if is_rejected else 'chosen'} answer"


def _part(name: str, document: Document, rows: slice, supervised: str, tokenizer: Any) -> Part:
    control = set(tokenizer.convert_tokens_to_ids(control_tokens(tokenizer)))

    def kind_of(row: tuple[bool, int, int]) -> str:
        is_media, token, label = row
        if is_media:
            return "vision"
        return supervised if label != IGNORE_INDEX else "control" * (token in control)

    columns = (document.media_mask_T[rows], document.ids_T[rows], document.labels_T[rows])
    text, tokens = [], []
    for kind, run in groupby(zip(*(column.tolist() for column in columns), strict=True), key=kind_of):
        ids = [token for _, token, _ in run]
        if kind == "vision":
            pieces = [Piece(kind, f"{len(ids):,} vision token{'s' * (len(ids) > 1)}")]
            text += pieces
        else:
            text.append(Piece(kind, tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
            pieces = [Piece(kind, tokenizer.decode([token])) for token in ids]
        tokens += pieces
    return Part(name, name == "shared prefix", rows.stop - rows.start, text, tokens)


# -------------------------------------------------------------------------------------------------------------- media


def medium_decoded(
    plan: MediaPlan,
    processor: VisionProcessor,
    config: DataConfig,
    decode: Decode = load_patches,
    count: int = MAX_FRAMES,
    longest: int | None = None,
) -> MediumView:
    """A medium with at most `count` frames, as `pictures` shows them. Only these are decoded."""
    few = some_frames(plan, count)
    try:
        frames, problem = pictures(decode(few, processor).pixels_PD, few, processor, longest), ""
    except MediaError as error:
        frames, problem = [], f"can't be decoded: {error}"
    return medium_shown(plan, frames, processor, config, problem)


def medium_shown(
    plan: MediaPlan, frames: list[Frame], processor: VisionProcessor, config: DataConfig, problem: str = ""
) -> MediumView:
    """A medium whose frames are made already."""
    return MediumView(plan.ref.kind, _title(plan, len(frames)), frames, shortened(plan, processor, config), problem)


def _title(plan: MediaPlan, num_shown: int) -> str:
    """The file, and what the model sees of it."""
    info, num_frames = plan.info, len(plan.frame_indices)
    size, tokens = f"{plan.width} x {plan.height} px", f"{plan.num_tokens:,} vision tokens"
    if plan.ref.kind == "image":
        return f"{Path(plan.ref.name).name}: {info.width} x {info.height} px, seen at {size} as {tokens}"
    few = f" ({num_shown} of them here)" if num_shown < num_frames and num_shown else ""
    return (
        f"{Path(plan.ref.name).name}: {info.num_frames:,} frames of {info.width} x {info.height} px; the model sees "
        f"{num_frames:,}{few} at {size} as {tokens}"
    )


def shortened(plan: MediaPlan, processor: VisionProcessor, config: DataConfig) -> list[str]:
    """What a video or picture lost so that its sample fits a row, compared with the configured limits alone."""
    free = processor.plan(plan.ref, plan.info, limits_of(plan.ref, config))
    notes = []
    if len(plan.frame_indices) < len(free.frame_indices):
        notes.append(f"frames: {len(plan.frame_indices)} of {len(free.frame_indices)} kept to fit data.pack_tokens")
    if plan.height * plan.width < free.height * free.width:
        size = f"{plan.width} x {plan.height} instead of {free.width} x {free.height}"
        notes.append(f"resolution: {size} px to fit data.pack_tokens")
    return notes


def some_frames(plan: MediaPlan, count: int) -> MediaPlan:
    """The plan with at most `count` of its frames, evenly spread."""
    t, h, w = plan.grid_thw
    few = replace(plan, frame_indices=tuple(evenly(plan.frame_indices, count)))
    return replace(few, grid_thw=(math.ceil(few.num_pictures / math.ceil(plan.num_pictures / t)), h, w))


def pictures(pixels_PD: Tensor, plan: MediaPlan, processor: VisionProcessor, longest: int | None = None) -> list[Frame]:
    """At most MAX_FRAMES of the frames in a medium's patches as `data:` URLs, the longer side at most `longest` pixels,
    each with its time."""
    captions = [f"{time_s:.2f} s" for time_s in plan.frame_times_s] if plan.ref.kind == "video" else ["picture"]
    captions += captions[-1:]  # an odd clip's last frame is there twice
    made = []
    frames = list(zip(frames_of(pixels_PD, plan, processor), captions, strict=False))
    for frame_CHW, caption in evenly(frames, MAX_FRAMES):
        image = Image.fromarray(frame_CHW.permute(1, 2, 0).numpy())
        if longest is not None:
            image.thumbnail((longest, longest))
        image.save(buffer := io.BytesIO(), "jpeg", quality=QUALITY, subsampling=0)
        made.append((f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", caption))
    return made


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spread, with the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]
