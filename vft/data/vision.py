"""Frames to patches: the resize that the model was trained with, in uint8; the device normalises later.

T frames, C/H/W channels, height, width of pixels, P patches, D features of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vft.data.video import as_media_error, decode_chunks
from vft.types import Clip, MediaPlan, Patches, VisionSpec


def decode_resized(plan: MediaPlan) -> Tensor:
    """The planned frames at the planned size, uint8 [T, 3, height, width].

    They are resized as they are decoded, so that a long video is never held at the size of its source.
    """
    return torch.cat([resize(clip.frames_TCHW, plan.height, plan.width) for clip in decode_chunks(plan)])


def load(plan: MediaPlan, spec: VisionSpec, read_frames: Callable[[MediaPlan], Tensor] = decode_resized) -> Patches:
    """Decode, resize and cut one medium: what a worker process runs. `read_frames` may know a shorter way to them.

    Raises:
        MediaError: the file can't be decoded as planned.
    """
    path = plan.ref.path
    with as_media_error(path[0] if isinstance(path, tuple) else path):
        return _cut(read_frames(plan), plan, spec)


def patchify(clip: Clip, plan: MediaPlan, spec: VisionSpec) -> Patches:
    """Resize the planned frames and cut them into patches."""
    return _cut(resize(clip.frames_TCHW, plan.height, plan.width), plan, spec)


def resize(frames_TCHW: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialias on the uint8 tensor, as Qwen2.5-VL's own processor does it.

    Going to float first would change up to 16 % of the values.
    """
    assert frames_TCHW.dtype == torch.uint8
    if frames_TCHW.shape[-2:] == (height, width):
        return frames_TCHW
    return F.interpolate(frames_TCHW, (height, width), mode="bicubic", antialias=True, align_corners=False)


def frames_of(pixels_PD: Tensor, plan: MediaPlan, spec: VisionSpec) -> Tensor:
    """Patches back to frames [T, 3, H, W]: the spec's own ordering, applied to pixel numbers, says where each goes."""
    count = 1 if plan.ref.kind == "image" else round(pixels_PD.numel() / (3 * plan.height * plan.width))
    numbers = torch.arange(count * 3 * plan.height * plan.width).view(count, 3, plan.height, plan.width)
    frames = torch.empty(numbers.numel(), dtype=torch.uint8)
    frames[spec.order_patches(numbers).flatten()] = pixels_PD.flatten()
    return frames.view_as(numbers)


def _temporal_patch(plan: MediaPlan) -> int:
    """Frames of one temporal patch; 1 for a single frame, which is the spec's to double."""
    return math.ceil(len(plan.frame_indices) / plan.grid_thw[0])


def _cut(clips: Iterable[Clip], plan: MediaPlan, spec: VisionSpec) -> Patches:
    """Resize and cut clip by clip, while it is in the processor's cache; all but the last are whole temporal patches."""
    pixels_PD = torch.empty(math.prod(plan.grid_thw), spec.patch_features, dtype=torch.uint8)
    temporal_patch, num_frames, end = _temporal_patch(plan), 0, 0
    for clip in clips:
        frames_TCHW = resize(clip.frames_TCHW, plan.height, plan.width)
        num_frames += len(frames_TCHW)
        num_repeats = -len(frames_TCHW) % temporal_patch  # the last temporal patch may lack frames
        if num_repeats:
            frames_TCHW = torch.cat([frames_TCHW, frames_TCHW[-1:].expand(num_repeats, -1, -1, -1)])
        piece_PD = spec.order_patches(frames_TCHW)
        start, end = end, end + len(piece_PD)
        pixels_PD[start:end] = piece_PD
    assert (num_frames, end) == (len(plan.frame_indices), len(pixels_PD)), (num_frames, end, plan)
    return Patches(pixels_PD, plan.grid_thw, plan.seconds_per_grid)
