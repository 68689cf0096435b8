"""The processor of the Qwen families: frames, sizes and M-RoPE positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vft.common.types import MediaInfo, MediaPlan, MediaRef, VisionLimits
from vft.models import vision_rules as rules
from vft.models.processor import VisionProcessor

MIN_TOKENS, MAX_TOKENS = 4, 16384
"""Limits for a frame of a requested size (qwen-vl-utils' IMAGE_MIN_TOKEN_NUM and IMAGE_MAX_TOKEN_NUM)."""


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
            first, last = rules.frame_range(ref, info, limits)
            count = rules.frame_count(last - first + 1, ref, info, limits)
            indices = rules.sample_frames(ref, info, first, last, count)
            seconds_per_grid = self.temporal / rules.sampled_rate(info, first, last, count)
            if limits.total_pixels is not None:
                share = limits.total_pixels / (-(-count // self.temporal))
                max_pixels = min(max_pixels, max(share, int(limits.min_pixels * 1.05)))
        factor = self.patch * self.merge
        if limits.resized_height and limits.resized_width:
            size = limits.resized_height, limits.resized_width
            height, width = rules.smart_resize(*size, factor, MIN_TOKENS * factor**2, MAX_TOKENS * factor**2)
        else:
            height, width = rules.smart_resize(info.height, info.width, factor, limits.min_pixels, max_pixels)
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
