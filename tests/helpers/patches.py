"""Patches as the reference describes them, to compare ours with; and frames in memory cut as training cuts them."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from vft.common.types import MediaInfo, MediaPlan, MediaRef, Patches
from vft.data.media.patches import cut_patches, resize_views
from vft.data.media.video import decode_chunks
from vft.models.processor import VisionProcessor


@dataclass(frozen=True)
class Spec:
    """Rows [t, gh/2, gw/2, 2, 2], features [channel, time, y, x]."""

    patch_features: int = 1176

    def order_patches(self, frames_TCHW: Tensor) -> Tensor:
        if len(frames_TCHW) == 1:
            frames_TCHW = frames_TCHW.repeat(2, 1, 1, 1)
        t, _, height, width = frames_TCHW.shape
        split = frames_TCHW.reshape(t // 2, 2, 3, height // 28, 2, 14, width // 28, 2, 14)
        return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 1176)


SPEC = cast(VisionProcessor, Spec())


class _Hanging:
    patch_features = 1176

    def order_patches(self, frames_TCHW: Tensor) -> Tensor:
        time.sleep(600)
        return frames_TCHW


HANGING = cast(VisionProcessor, _Hanging())
"""Never comes to an end."""


def plan_of(ref: MediaRef, info: MediaInfo, indices: tuple[int, ...], height: int, width: int) -> MediaPlan:
    grid = (math.ceil(len(indices) / 2), height // 14, width // 14)
    return MediaPlan(ref, info, indices, height, width, grid, math.prod(grid) // 4, seconds_per_grid=1.5)


def decode(plan: MediaPlan) -> Tensor:
    """All planned frames, uint8 [T, 3, H, W] at the size of the source."""
    (frames_TCHW,) = decode_chunks(plan, sys.maxsize)
    return frames_TCHW


def patches_of(frames_TCHW: Tensor, plan: MediaPlan, processor: VisionProcessor) -> Patches:
    """The planned frames, which lie in memory, resized and cut."""
    return cut_patches([resize_views(frames_TCHW, plan)], plan, processor)
