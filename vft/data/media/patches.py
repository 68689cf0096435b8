"""Frames to patches. Frames are resized in uint8, as the models were trained; the device normalises later.

T frames, C/H/W channels, height, width of pixels, P patches, D features of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vft.common.types import MediaPlan, Patches, View
from vft.data.media.errors import as_media_error
from vft.data.media.video import decode_chunks
from vft.data.workers import empty_bytes
from vft.models.processor import VisionProcessor


def load_patches(plan: MediaPlan, processor: VisionProcessor) -> Patches:
    """Decode, resize and cut one medium into patches: what a worker process runs.

    Raises:
        MediaError: the file cannot be decoded as planned.
    """
    with as_media_error(plan.ref.files[0]):
        return cut_patches(_resized_chunks(plan), plan, processor)


def decode_resized(plan: MediaPlan) -> Tensor:
    """The planned views of the planned frames, uint8 [T, 3, height, width]."""
    frames_TCHW = torch.empty(plan.num_pictures, 3, plan.height, plan.width, dtype=torch.uint8)
    end = 0
    for chunk_TCHW in _resized_chunks(plan):  # copied one by one: torch.cat at the end would take twice the memory
        start, end = end, end + len(chunk_TCHW)
        frames_TCHW[start:end] = chunk_TCHW
    assert end == len(frames_TCHW), (end, len(frames_TCHW))
    return frames_TCHW


def resize_views(frames_TCHW: Tensor, plan: MediaPlan) -> Tensor:
    """The plan's views of source frames, frame by frame, uint8 [T x views, 3, height, width]."""
    if not plan.views:
        return resize(frames_TCHW, plan.height, plan.width)
    sizes = {(view.height, view.width) for view in plan.views}
    resized = {size: resize(frames_TCHW, *size) for size in sizes}
    views = [_crop(resized[view.height, view.width], view, plan) for view in plan.views]
    return torch.stack(views, dim=1).flatten(0, 1)


def _crop(frames_TCHW: Tensor, view: View, plan: MediaPlan) -> Tensor:
    """The view's window, with zeros where it reaches beyond the frame."""
    window_TCHW = frames_TCHW.new_zeros(*frames_TCHW.shape[:2], plan.height, plan.width)
    top, left = max(view.top, 0), max(view.left, 0)
    part = frames_TCHW[..., top : max(view.top + plan.height, 0), left : max(view.left + plan.width, 0)]
    y, x = top - view.top, left - view.left
    window_TCHW[..., y : y + part.shape[-2], x : x + part.shape[-1]] = part
    return window_TCHW


def resize(frames_TCHW: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialias on the uint8 tensor, as the families' own processors do it.

    Converting to float first would change up to 16 % of the values.
    """
    assert frames_TCHW.dtype == torch.uint8
    if frames_TCHW.shape[-2:] == (height, width):
        return frames_TCHW
    return F.interpolate(frames_TCHW, (height, width), mode="bicubic", antialias=True, align_corners=False)


def cut_patches(chunks_TCHW: Iterable[Tensor], plan: MediaPlan, processor: VisionProcessor) -> Patches:
    """Cut resized frames into patches, chunk by chunk; all chunks but the last hold whole temporal patches."""
    pixels_PD = empty_bytes(math.prod(plan.grid_thw), processor.patch_features)
    temporal_patch, num_frames, end = _temporal_patch(plan), 0, 0
    for frames_TCHW in chunks_TCHW:
        num_frames += len(frames_TCHW)
        num_repeats = -len(frames_TCHW) % temporal_patch  # the last temporal patch may lack frames
        if num_repeats:
            frames_TCHW = torch.cat([frames_TCHW, frames_TCHW[-1:].expand(num_repeats, -1, -1, -1)])
        chunk_PD = processor.order_patches(frames_TCHW)
        start, end = end, end + len(chunk_PD)
        pixels_PD[start:end] = chunk_PD
    assert (num_frames, end) == (plan.num_pictures, len(pixels_PD)), (num_frames, end, plan)
    return Patches(pixels_PD, plan.grid_thw, plan.seconds_per_grid)


def frames_of(pixels_PD: Tensor, plan: MediaPlan, processor: VisionProcessor) -> Tensor:
    """The frames [T, 3, H, W] that patches were cut from.

    Cutting pixel numbers instead of pixels shows where the family's order puts each pixel.
    """
    count = plan.num_pictures if plan.ref.kind == "image" else round(pixels_PD.numel() / (3 * plan.height * plan.width))
    numbers = torch.arange(count * 3 * plan.height * plan.width).view(count, 3, plan.height, plan.width)
    frames = torch.empty(numbers.numel(), dtype=torch.uint8)
    frames[processor.order_patches(numbers).flatten()] = pixels_PD.flatten()
    return frames.view_as(numbers)


def _resized_chunks(plan: MediaPlan) -> Iterator[Tensor]:
    """Frames [T, 3, height, width], resized as they are decoded: a long video is never held at its source's size."""
    for frames_TCHW in decode_chunks(plan, multiple=_temporal_patch(plan)):
        yield resize_views(frames_TCHW, plan)


def _temporal_patch(plan: MediaPlan) -> int:
    """Frames of one temporal patch; 1 for a single frame, which the processor doubles."""
    return math.ceil(plan.num_pictures / plan.grid_thw[0])
