"""Rules of the released models that several families share: which frames, what size, where patches are."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from vft.common.errors import UserError
from vft.common.types import AttentionPlan, MediaInfo, MediaRef, VisionLimits
from vft.models.attention_plan import blocks_plan


def frame_range(ref: MediaRef, info: MediaInfo, limits: VisionLimits) -> tuple[int, int]:
    """First and last frame of the requested range, both included.

    At a constant rate these are ceil(start * fps) and floor(end * fps), as in qwen-vl-utils 0.0.14; at a variable rate
    the frames whose times lie in the range.
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
