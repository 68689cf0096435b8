"""The part of a model family that the data path uses: frames, sizes, patches, tokens and positions of media.

What each family answers for itself is a `VisionProcessor`. Rules of the released models that several families share
are here too: which frames, what size, where patches are, and what the Qwen families have in common.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vft.common.errors import UserError
from vft.common.types import AttentionPlan, MediaInfo, MediaKind, MediaPlan, MediaRef, VisionLayout, VisionLimits
from vft.models.attention import blocks_plan

MIN_TOKENS, MAX_TOKENS = 4, 16384
"""Limits for a frame of a requested size (qwen-vl-utils' IMAGE_MIN_TOKEN_NUM and IMAGE_MAX_TOKEN_NUM)."""


@dataclass(frozen=True, kw_only=True)
class VisionProcessor:
    """What `vft.data` uses of a model family. Each family has its own subclass in its `processor.py`."""

    image_token: int
    video_token: int
    patch: int
    """Side of a patch, in pixels."""
    merge: int = 1
    """Side of a vision token, in patches."""
    temporal: int = 1
    """Frames in a patch."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of pixel values in 0..1, by channel. The default is CLIP's."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation, as `mean`."""
    turn_end: str = ""
    """Text that ends a message, supervised with the answer before it. Empty: the tokenizer's end of sequence, which the
    template may leave out."""
    video_text: str = ""
    """The template's text for a video, if it is more than the placeholder and some templates leave the rest out."""
    keep_outer_pair: bool = False
    """Whether that text stays around the whole video (`data.video.keep_outer_pair`)."""
    context_tokens: int | None = None
    """Largest number of tokens of a conversation, by the positions that the model was trained for. None: unknown."""

    @classmethod
    def read(cls, config: Any, preprocessor: dict[str, Any], **own: Any) -> Self:
        """From transformers' configuration object and the model's `preprocessor_config.json`. `own` are fields that the
        family reads itself."""
        return cls(
            image_token=config.image_token_id,
            video_token=config.video_token_id,
            patch=config.vision_config.patch_size,
            mean=tuple(preprocessor.get("image_mean", cls.mean)),
            std=tuple(preprocessor.get("image_std", cls.std)),
            context_tokens=context_of(config.text_config),
            **own,
        )

    @property
    def patch_features(self) -> int:
        """D: channels x time x y x x."""
        return 3 * self.temporal * self.patch**2

    def plan(self, ref: MediaRef, info: MediaInfo, limits: VisionLimits) -> MediaPlan:
        """Choose frames, size and number of tokens of a medium. Raises UserError if the limits cannot be met."""
        raise NotImplementedError

    def order_patches(self, frames_TCHW: Tensor) -> Tensor:
        """Views [T, 3, H, W] of a medium to patches [P, D], in the encoder's order, temporal patch by temporal patch:
        rows [t, h/merge, w/merge, merge, merge], features [channel, time, y, x].

        A single picture is repeated for all frames of its patch.
        """
        if frames_TCHW.shape[0] == 1:
            frames_TCHW = frames_TCHW.expand(self.temporal, -1, -1, -1)
        t, c, h, w = frames_TCHW.shape
        patch, side = self.patch, self.patch * self.merge
        # numpy moves a line of a patch's pixels as one item. torch's permute moves bytes, which takes 3 times as long.
        line = np.dtype((np.void, patch * frames_TCHW.element_size()))
        lines = frames_TCHW.contiguous().view(torch.uint8).numpy().view(line)
        lines = lines.reshape(t // self.temporal, self.temporal, c, h // side, self.merge, patch, w // side, self.merge)
        ordered = np.ascontiguousarray(lines.transpose(0, 3, 6, 4, 7, 2, 1, 5)).view(np.uint8)
        return torch.from_numpy(ordered).view(frames_TCHW.dtype).reshape(-1, self.patch_features)

    def placeholder(self, kind: MediaKind) -> int:
        """The token by which the chat template marks a medium."""
        return self.image_token if kind == "image" else self.video_token

    def lead(self, plan: MediaPlan) -> str:
        """Text before the medium in its message."""
        return ""

    def expand(self, plan: MediaPlan) -> Sequence[str | int]:
        """What replaces the placeholder: lengths of runs of vision embeddings, and text between them."""
        return [plan.num_tokens]

    def positions(self, num_tokens: int, media: Sequence[tuple[Sequence[int], MediaPlan]]) -> Tensor:
        """Position ids [3, T] of a document. `media` has the first rows of each medium's runs, and its plan."""
        raise NotImplementedError

    def layout(self, media: Sequence[MediaPlan]) -> VisionLayout:
        """Layout of the patches of consecutive media in the encoder."""
        raise NotImplementedError


def linear_factor(rope: Mapping[str, Any]) -> float:
    """Factor of linear scaling by which `rope_parameters` extend the positions that a model was trained for, else 1."""
    return float(rope["factor"]) if rope["rope_type"] == "linear" else 1.0


def context_of(text: Any) -> int:
    """Positions that a model supports: those of its language model's configuration times the linear scaling."""
    return int(text.max_position_embeddings * linear_factor(text.rope_parameters))


def frame_range(info: MediaInfo, limits: VisionLimits) -> tuple[int, int]:
    """First and last frame of the requested range, both included.

    At a constant rate these are ceil(start * fps) and floor(end * fps), as in qwen-vl-utils 0.0.14; at a variable rate
    the frames whose times lie in the range.
    """
    first, last, times_s, start_s, end_s = 0, info.num_frames - 1, info.times_s, limits.start_s, limits.end_s
    if start_s is not None:
        first = max(0, math.ceil(start_s * info.fps)) if times_s is None else bisect_left(times_s, start_s)
    if end_s is not None:
        last = min(last, math.floor(end_s * info.fps) if times_s is None else bisect_right(times_s, end_s) - 1)
    if first > last:
        raise UserError(
            f"video_start = {start_s}, video_end = {end_s}: no frame lies in this range; "
            f"the video has {info.num_frames} frames in {info.duration_s:.2f} s"
        )
    return first, last


def frame_count(available: int, ref: MediaRef, info: MediaInfo, limits: VisionLimits) -> int:
    """Number of frames to take of `available` ones.

    A requested count is used as far as there are frames. A rate gives an even count between the limits (qwen-vl-utils'
    smart_nframes, which rounds down to the temporal patch of 2), but at least one frame. For a list of pictures the
    count is rounded up, and may be all of an odd number: qwen-vl-utils repeats the last picture.
    """
    if limits.frames is not None:
        return min(limits.frames, available)
    if limits.fps is None:
        return min(limits.max_frames, available)
    least = math.ceil(limits.min_frames / 2) * 2
    most = math.floor(limits.max_frames / 2) * 2
    count = min(max(available / info.fps * limits.fps, least), most) if info.fps > 0 else most
    count = min(count, available)
    pairs = math.ceil(round(count / 2, 6)) if ref.is_list else math.floor(count / 2)
    return max(min(2 * pairs, available), min(available, 1))


def sample_frames(ref: MediaRef, info: MediaInfo, first: int, last: int, count: int) -> tuple[int, ...]:
    """`count` frames spread over first..last: by equal steps at a constant rate, by equal times at a variable one. A
    list of pictures with times uses equal steps, so that no picture is taken twice."""
    if info.times_s is None or ref.is_list:
        # float32 with ties to even, as linspace(...).round() in the released preprocessing.
        return tuple(torch.linspace(first, last, count).round().long().tolist())
    times_s = torch.linspace(info.times_s[first], info.times_s[last], count, dtype=torch.float64).tolist()
    # The frame that is on screen at each time, with half a microsecond of tolerance for rounded times.
    return tuple(max(first, bisect_right(info.times_s, time_s + 5e-7) - 1) for time_s in times_s)


def sampled_rate(info: MediaInfo, first: int, last: int, count: int) -> float:
    """Frames per second of `count` frames spread over first..last, as transformers defines it."""
    if info.times_s is None or last == first:
        return count / (last - first + 1) * (info.fps or 1.0)
    span_s = info.times_s[last] - info.times_s[first]
    if span_s <= 0:  # pictures with equal times
        return info.fps or 1.0
    return count / (span_s * (last - first + 1) / (last - first))


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Nearest size in multiples of `factor` with an area within the limits (qwen-vl-utils' smart_resize)."""
    if max(height, width) / min(height, width) > 200:
        raise UserError(f"picture of {width} x {height} pixels: one side is more than 200 times the other; crop it")
    h, w = (max(factor, round(size / factor) * factor) for size in (height, width))
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def patch_positions(grids: Sequence[tuple[int, int, int]], merge: int) -> Tensor:
    """Row and column of each patch [P, 2], in the order of `VisionProcessor.order_patches`."""
    positions = []
    for t, h, w in grids:
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        both = torch.stack([rows, columns], dim=-1).reshape(h // merge, merge, w // merge, merge, 2)
        positions.append(both.transpose(1, 2).reshape(-1, 2).repeat(t, 1))
    return torch.cat(positions)


def frame_plan(grids: Sequence[tuple[int, int, int]]) -> AttentionPlan:
    """The plan in which all patches of a temporal patch attend each other."""
    return blocks_plan([height * width for t, height, width in grids for _ in range(t)])


@dataclass(frozen=True, kw_only=True)
class QwenProcessor(VisionProcessor):
    """Frames and sizes by the rules of qwen-vl-utils 0.0.14, with one placeholder for each medium."""

    merge: int = 2
    temporal: int = 2
    turn_end: str = "<|im_end|>"

    def plan(self, ref: MediaRef, info: MediaInfo, limits: VisionLimits) -> MediaPlan:
        """A frame has at most `max_pixels`, and its share of `total_pixels`, which is never less than 1.05 x
        `min_pixels`."""
        indices: tuple[int, ...] = (0,)
        seconds_per_grid, max_pixels = 0.0, float(limits.max_pixels)
        if ref.kind == "video":
            first, last = frame_range(info, limits)
            count = frame_count(last - first + 1, ref, info, limits)
            indices = sample_frames(ref, info, first, last, count)
            seconds_per_grid = self.temporal / sampled_rate(info, first, last, count)
            if limits.total_pixels is not None:
                share = limits.total_pixels / (-(-count // self.temporal))
                max_pixels = min(max_pixels, max(share, int(limits.min_pixels * 1.05)))
        factor = self.patch * self.merge
        if limits.resized_height and limits.resized_width:
            size = limits.resized_height, limits.resized_width
            height, width = smart_resize(*size, factor, MIN_TOKENS * factor**2, MAX_TOKENS * factor**2)
        else:
            height, width = smart_resize(info.height, info.width, factor, limits.min_pixels, max_pixels)
        grid = (-(-len(indices) // self.temporal), height // self.patch, width // self.patch)
        num_tokens = grid[0] * grid[1] * grid[2] // self.merge**2
        return MediaPlan(ref, info, indices, height, width, grid, num_tokens, seconds_per_grid)

    def positions(self, num_tokens: int, media: Sequence[tuple[Sequence[int], MediaPlan]]) -> Tensor:
        """M-RoPE positions [3, T], by the rule with which the released models were trained: text increases by one on
        all three axes, and continues after a run of vision tokens at the largest position so far + 1."""
        pieces: list[Tensor] = []
        row = position = 0
        for starts, plan in media:
            size = plan.grid_thw[1] // self.merge, plan.grid_thw[2] // self.merge
            grid = torch.meshgrid(self.run_times(plan), *map(torch.arange, size), indexing="ij")
            own_3M = torch.stack(grid).reshape(3, -1)
            for start in starts:
                pieces.append(torch.arange(position, position + start - row).expand(3, -1))
                pieces.append(own_3M + position + start - row)
                position = int(pieces[-1].max()) + 1
                row = start + own_3M.shape[1]
        pieces.append(torch.arange(position, position + num_tokens - row).expand(3, -1))
        return torch.cat(pieces, dim=1)

    def run_times(self, plan: MediaPlan) -> Tensor:
        """Temporal positions of the patches of one run of a medium's tokens, relative to its start."""
        raise NotImplementedError
