"""Rules that several families share: which frames, what size, how patches lie. All of them are the released models'."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from vft.attention import build_plan
from vft.types import AttentionPlan, MediaInfo, MediaPlan, MediaRef, Segment, UserError, VisionLimits


def plan_medium(
    ref: MediaRef, info: MediaInfo, limits: VisionLimits, patch: int, merge: int, temporal: int
) -> MediaPlan:
    """Frames, size and token count of one medium of the Qwen families (qwen-vl-utils 0.0.14's rules).

    The budget of a frame is `max_pixels`, or less where `total_pixels` over all frames asks for it.
    """
    indices: tuple[int, ...] = (0,)
    seconds_per_grid, max_pixels = 0.0, limits.max_pixels
    if ref.kind == "video":
        first, last = frame_range(ref, info, limits)
        count = frame_count(last - first + 1, info.fps, limits)
        indices = sample_frames(info, first, last, count)
        seconds_per_grid = temporal / sampled_rate(info, first, last, count)
        if limits.total_pixels is not None:
            share = limits.total_pixels / count * temporal
            max_pixels = int(max(min(max_pixels, share), limits.min_pixels * 1.05))
    factor = patch * merge
    if limits.resized_height and limits.resized_width:
        height, width = (max(1, round(x / factor)) * factor for x in (limits.resized_height, limits.resized_width))
    else:
        height, width = smart_resize(info.height, info.width, factor, limits.min_pixels, max_pixels)
    grid = (-(-len(indices) // temporal), height // patch, width // patch)
    num_tokens = grid[0] * grid[1] * grid[2] // merge**2
    return MediaPlan(ref, info, indices, height, width, grid, num_tokens, seconds_per_grid)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def frame_range(ref: MediaRef, info: MediaInfo, limits: VisionLimits) -> tuple[int, int]:
    """First and last frame of the range asked for, both included.

    Constant rate: ceil(start * fps) and floor(end * fps), as qwen-vl-utils 0.0.14 has it; variable rate: the frames
    whose times lie in the range.
    """
    first, last = 0, info.num_frames - 1
    if info.times_s is not None:
        if limits.start_s is not None:
            first = bisect_left(info.times_s, limits.start_s)
        if limits.end_s is not None:
            last = min(last, bisect_right(info.times_s, limits.end_s) - 1)
    else:
        if limits.start_s is not None:
            first = max(0, math.ceil(limits.start_s * info.fps))
        if limits.end_s is not None:
            last = min(last, math.floor(limits.end_s * info.fps))
    if first > last:
        raise UserError(
            f"video_start = {limits.start_s}, video_end = {limits.end_s}: no frame lies in this range; "
            f"the video has {info.num_frames} frames in {info.duration_s:.2f} s"
        )
    return first, last


def frame_count(available: int, fps: float, limits: VisionLimits) -> int:
    """How many of `available` frames, at `fps` frames per second, to take.

    A count asked for is taken as it is, as far as there are frames. A rate gives an even count between the limits
    (qwen-vl-utils' smart_nframes, floor to the temporal patch of 2), but at least one frame.
    """
    if limits.frames is not None:
        return min(limits.frames, available)
    assert limits.fps is not None
    least = math.ceil(limits.min_frames / 2) * 2
    most = math.floor(limits.max_frames / 2) * 2
    wanted = min(max(available / fps * limits.fps, least), most, available) if fps > 0 else min(available, most)
    return max(math.floor(wanted / 2) * 2, min(available, 1))


def sample_frames(info: MediaInfo, first: int, last: int, count: int) -> tuple[int, ...]:
    """`count` frames spread over first..last: equal steps where the rate is constant, equal times where it varies."""
    if info.times_s is None:
        # float32 and ties to even: what linspace(...).round() gives in the released preprocessing.
        return tuple(torch.linspace(first, last, count).round().long().tolist())
    wanted = torch.linspace(info.times_s[first], info.times_s[last], count, dtype=torch.float64).tolist()
    # The frame on screen at each time; half a microsecond forgives rounding of the times themselves.
    return tuple(max(first, bisect_right(info.times_s, time_s + 5e-7) - 1) for time_s in wanted)


def sampled_rate(info: MediaInfo, first: int, last: int, count: int) -> float:
    """True rate, in frames per second, of `count` frames spread over first..last (as transformers defines it)."""
    if info.times_s is None or last == first:
        return count / (last - first + 1) * (info.fps or 1.0)
    span_s = info.times_s[last] - info.times_s[first]
    return count / (span_s * (last - first + 1) / (last - first))


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Nearest size in multiples of `factor` whose area lies within the budget (Qwen2-VL's smart_resize)."""
    if max(height, width) / min(height, width) > 200:
        raise UserError(f"picture of {width} x {height} pixels: one side is more than 200 times the other; crop it")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return max(h, factor), max(w, factor)


def order_patches(frames_TCHW: Tensor, patch: int, merge: int, temporal: int) -> Tensor:
    """Frames to patches [P, D]: rows [t, h/merge, w/merge, merge, merge], features [channel, time, y, x].

    A single picture stands at all times of its patch.
    """
    if frames_TCHW.shape[0] == 1:
        frames_TCHW = frames_TCHW.expand(temporal, -1, -1, -1)
    t, c, h, w = frames_TCHW.shape
    side = patch * merge
    # Through numpy, which moves a patch's line of pixels as one item; torch's permute moves single bytes, 3x as slowly.
    line = np.dtype((np.void, patch * frames_TCHW.element_size()))
    lines = frames_TCHW.contiguous().view(torch.uint8).numpy().view(line)
    lines = lines.reshape(t // temporal, temporal, c, h // side, merge, patch, w // side, merge)
    ordered = np.ascontiguousarray(lines.transpose(0, 3, 6, 4, 7, 2, 1, 5)).view(np.uint8)
    return torch.from_numpy(ordered).view(frames_TCHW.dtype).reshape(-1, c * temporal * patch * patch)


def patch_positions(grids: Sequence[tuple[int, int, int]], merge: int) -> Tensor:
    """Row and column of each patch, [P, 2], in the order of `order_patches`."""
    positions = []
    for t, h, w in grids:
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        both = torch.stack([rows, columns], dim=-1).reshape(h // merge, merge, w // merge, merge, 2)
        positions.append(both.transpose(1, 2).reshape(-1, 2).repeat(t, 1))
    return torch.cat(positions)


def blocks_plan(lengths: Sequence[int]) -> AttentionPlan:
    """Blocks of these lengths, one behind another, each attending itself alone and all of itself."""
    blocks = [Segment(end - length, length) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    return build_plan(blocks, causal=False)


def frame_plan(grids: Sequence[tuple[int, int, int]]) -> AttentionPlan:
    """Each temporal patch attends itself."""
    return blocks_plan([height * width for t, height, width in grids for _ in range(t)])


def mrope_grid(time_t: Tensor, height: int, width: int) -> Tensor:
    """M-RoPE positions [3, M] of merged tokens, counted from the medium's own start: `time_t` and all rows, columns."""
    grid = torch.meshgrid(time_t, torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(grid).reshape(3, -1)


def mrope_positions(num_tokens: int, runs: Sequence[tuple[int, Tensor]]) -> Tensor:
    """M-RoPE positions [3, T] of a document; `runs` holds the row of the first token of each run of vision tokens, and
    the run's own positions [3, M].

    Text counts by one on all three axes; what follows a run goes on at the largest position so far + 1, as the released
    models were trained.
    """
    pieces: list[Tensor] = []
    row = position = 0
    for start, own_3M in runs:
        pieces.append(torch.arange(position, position + start - row).expand(3, -1))
        position += start - row
        pieces.append(own_3M + position)
        position = int(pieces[-1].max()) + 1
        row = start + own_3M.shape[1]
    pieces.append(torch.arange(position, position + num_tokens - row).expand(3, -1))
    return torch.cat(pieces, dim=1)
