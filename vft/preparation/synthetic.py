"""Documents and rows of random words and pixels, made without files, for planning and benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from vft.common.types import IGNORE_INDEX, Batch, Document, MediaInfo, MediaPlan, MediaRef, Patches, VisionLimits
from vft.config.data import DataConfig
from vft.data.budget import limits_of, plan_media, shrink
from vft.data.packing import collate
from vft.models.processor import VisionProcessor

VIDEO_SIZE = (1080, 1920)
"""Height and width of the videos of `filled_row` before they are fitted into the limits."""
SYSTEM_TOKENS = 15
"""Tokens before the video, as many as the chat template writes."""
TIME_TOKENS = 9
"""Tokens of the time between two pairs of frames, for models that read times as text."""


@dataclass(frozen=True)
class Video:
    """Size of a video in pixels. Qwen2.5-VL keeps it if height and width are multiples of 28."""

    frames: int = 8
    height: int = 224
    width: int = 224


def plan_of(processor: Any, video: Video) -> MediaPlan:
    """Plan to take all frames of the video in its own size, as far as the family allows it."""
    ref = MediaRef("video", Path("video.mp4"))
    info = MediaInfo("video", video.height, video.width, video.frames, 2.0, duration_s=video.frames / 2)
    pixels = video.height * video.width
    return processor.plan(ref, info, VisionLimits(None, video.frames, video.frames, video.frames, pixels, pixels, None))


def video_document(
    processor: Any, video: Video | MediaPlan, questions: int, words: int, answer: int, seed: int = 0
) -> Document:
    """A video and `questions` about it, each of `words` tokens, of which the last `answer` are supervised."""
    generator = torch.Generator().manual_seed(seed)
    plan = plan_of(processor, video) if isinstance(video, Video) else video
    mark = processor.placeholder("video")
    pieces = ([mark] * piece if isinstance(piece, int) else [2] * TIME_TOKENS for piece in processor.expand(plan))
    vision_ids = list(chain.from_iterable(pieces))
    vision_mask = [token == mark for token in vision_ids]
    runs = [SYSTEM_TOKENS + i for i, seen in enumerate(vision_mask) if seen and (i == 0 or not vision_mask[i - 1])]
    head = torch.randint(20, 500, (SYSTEM_TOKENS,), generator=generator).tolist()
    trunk = [*head, *vision_ids, 1]  # and the token that ends the video
    positions_3T = processor.positions(len(trunk) + words, [(runs, plan)])
    shared = len(trunk) if questions > 1 else 0
    ids = [torch.tensor(trunk)]
    labels = [torch.full((len(trunk),), IGNORE_INDEX)]
    for _ in range(questions):
        text = torch.randint(20, 500, (words,), generator=generator)
        ids.append(text)
        labels.append(torch.where(torch.arange(words) >= words - answer, text, IGNORE_INDEX))
    mask = [*([False] * SYSTEM_TOKENS), *vision_mask, False, *([False] * (questions * words))]
    branches = [positions_3T[:, len(trunk) :]] * questions
    return Document(
        sample_ids=tuple(f"{seed}-{i}" for i in range(questions)),
        ids_T=torch.cat(ids),
        labels_T=torch.cat(labels),
        positions_3T=torch.cat([positions_3T[:, : len(trunk)], *branches], dim=1),
        prefix_length=shared,
        suffix_lengths=(words,) * questions if shared else (len(trunk) + words,),
        media=(plan,),
        media_mask_T=torch.tensor(mask),
    )


def text_document(tokens: int, answer: int, seed: int = 0) -> Document:
    """A text of `tokens` tokens, of which the last `answer` are supervised."""
    ids = torch.randint(20, 500, (tokens,), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.arange(tokens) >= tokens - answer, ids, IGNORE_INDEX)
    positions_3T = torch.arange(tokens).expand(3, -1).contiguous()
    return Document((f"text-{seed}",), ids, labels, positions_3T, 0, (tokens,), (), torch.zeros(tokens).bool())


def filled_row(processor: VisionProcessor, data: DataConfig, text_tokens: int = 300, answers: int = 1) -> Batch:
    """A row filled with the largest videos that the limits of `data` allow, each with a question and its answer of
    `text_tokens` in all, or half of a short row; for pairs with as many a second time."""
    text_tokens = min(text_tokens, data.pack_tokens // (2 * answers))
    ref = MediaRef("video", Path("video.mp4"))
    limits = limits_of(ref, data)
    limits = replace(limits, fps=None, frames=limits.frames or limits.max_frames)
    length = 10 * (limits.frames or 1)
    info = MediaInfo("video", *VIDEO_SIZE, length, 10.0, duration_s=length / 10)
    token_budget = data.pack_tokens - answers * text_tokens - 20
    (media,) = shrink(plan_media([(ref, info, limits)], processor, "video"), processor, token_budget, "video").plans
    document = video_document(processor, media, answers, text_tokens, text_tokens // 2)
    document = replace(document, sample_ids=document.sample_ids[:1], desirable=(None,))
    count = max(1, data.pack_tokens // document.num_tokens)
    return row_of(processor, [document] * min(count, data.max_samples_per_pack or count))


def row_of(processor: Any, documents: list[Document], seed: int = 0) -> Batch:
    """One pack of `documents` with random pixels, which are the same for videos of one size."""
    members = []
    for document in documents:
        patches = []
        for plan in document.media:
            generator = torch.Generator().manual_seed(seed)  # copies of a video are equal
            shape = (math.prod(plan.grid_thw), processor.patch_features)
            pixels_PD = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
            patches.append(Patches(pixels_PD, plan.grid_thw, plan.seconds_per_grid))
        members.append((document, patches))
    return collate(members, processor)
