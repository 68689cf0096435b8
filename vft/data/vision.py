"""Frames to patches: the resize that the model was trained with, in uint8; the device normalises later.

T frames, C/H/W channels, height, width of pixels, P patches, D features of a patch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vft.data.video import as_media_error, decode_chunks
from vft.types import Clip, MediaPlan, Patches, VisionSpec


def load(plan: MediaPlan, spec: VisionSpec) -> Patches:
    """Decode, resize and cut one medium: what a worker process runs.

    Frames are resized as they are decoded, so that a long video is never held at the size of its source.

    Raises:
        MediaError: the file can't be decoded as planned.
    """
    path = plan.ref.path
    with as_media_error(path[0] if isinstance(path, tuple) else path):
        return _cut([resize(clip.frames_TCHW, plan.height, plan.width) for clip in decode_chunks(plan)], plan, spec)


def patchify(clip: Clip, plan: MediaPlan, spec: VisionSpec) -> Patches:
    """Resize the planned frames and cut them into patches."""
    return _cut([resize(clip.frames_TCHW, plan.height, plan.width)], plan, spec)


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


def _cut(pieces_TCHW: list[Tensor], plan: MediaPlan, spec: VisionSpec) -> Patches:
    frames_TCHW = torch.cat(pieces_TCHW)
    assert len(frames_TCHW) == len(plan.frame_indices), (len(frames_TCHW), len(plan.frame_indices))
    # A temporal patch of several frames may lack its last one; a single frame is the spec's to double.
    temporal_patch = math.ceil(len(frames_TCHW) / plan.grid_thw[0])
    num_repeats = plan.grid_thw[0] * temporal_patch - len(frames_TCHW)
    if num_repeats:
        frames_TCHW = torch.cat([frames_TCHW, frames_TCHW[-1:].expand(num_repeats, -1, -1, -1)])
    pixels_PD = spec.order_patches(frames_TCHW)
    assert pixels_PD.shape == (math.prod(plan.grid_thw), spec.patch_features), (pixels_PD.shape, plan.grid_thw)
    return Patches(pixels_PD, plan.grid_thw, plan.seconds_per_grid)
