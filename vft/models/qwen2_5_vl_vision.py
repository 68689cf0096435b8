"""Qwen2.5-VL's `VisionSpec`: frames, sizes, patches, positions and windows, by the released model's rules.

Sources: the Qwen2.5-VL technical report (arXiv 2502.13923) and qwen-vl-utils 0.0.14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vft.models import media as rules
from vft.models.media import CLIP_MEAN, CLIP_STD
from vft.models.qwen_vision import QwenSpec
from vft.types import MediaPlan, VisionLayout


@dataclass(eq=False)
class QwenLayout(VisionLayout):
    """How the patches of a batch lie in the tower."""

    order_P: Tensor
    """Permutation from media order to the order in which the tower attends."""
    positions_P2: Tensor
    """Row and column of each patch, in the tower's order."""
    restore_M: Tensor
    """Permutation of merged tokens from the tower's order back to media order."""


@dataclass(frozen=True, kw_only=True)
class QwenVision(QwenSpec):
    """The family's `VisionSpec`: everything that the data path needs to know of Qwen2.5-VL."""

    tokens_per_second: float
    patch: int = 14
    window: int = 112
    """Pixels of a side of an attention window."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @staticmethod
    def from_hf(config: Any, preprocessor: dict[str, Any]) -> QwenVision:
        """From transformers' configuration object and the checkpoint's `preprocessor_config.json`."""
        vision = config.vision_config
        return QwenVision(
            image_token=config.image_token_id,
            video_token=config.video_token_id,
            tokens_per_second=vision.tokens_per_second,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
            window=vision.window_size,
            mean=tuple(preprocessor.get("image_mean", CLIP_MEAN)),
            std=tuple(preprocessor.get("image_std", CLIP_STD)),
        )

    def lead(self, plan: MediaPlan) -> str:
        """Nothing."""
        return ""

    def expand(self, plan: MediaPlan) -> list[str | int]:
        """As many pad tokens as the medium has merged tokens."""
        return [plan.num_tokens]

    def positions(self, num_tokens: int, media: Sequence[tuple[Sequence[int], MediaPlan]]) -> Tensor:
        """M-RoPE positions [3, T] by the rule that the model was trained with.

        Time advances by seconds_per_grid x tokens_per_second in floating point, truncated; text goes on at the
        largest position so far + 1. transformers 4.57 truncates the seconds first, 5.x resumes text earlier.
        """
        runs = []
        for (start,), plan in media:
            seconds = torch.arange(plan.grid_thw[0], dtype=torch.float64) * plan.seconds_per_grid
            time = (seconds * self.tokens_per_second).long()
            size = plan.grid_thw[1] // self.merge, plan.grid_thw[2] // self.merge
            runs.append((start, rules.mrope_grid(time, *size)))
        return rules.mrope_positions(num_tokens, runs)

    def layout(self, media: Sequence[MediaPlan]) -> QwenLayout:
        """By the media's grids alone."""
        return self.layout_of([plan.grid_thw for plan in media])

    def layout_of(self, grids: Sequence[tuple[int, int, int]]) -> QwenLayout:
        """Merged tokens sorted by frame and window; full-attention blocks see a frame pair, the others a window."""
        side = self.window // self.patch // self.merge
        keys, base = [], 0
        for t, height, width in grids:
            h, w = height // self.merge, width // self.merge
            time, row, column = (x.flatten() for x in torch.meshgrid(*map(torch.arange, (t, h, w)), indexing="ij"))
            windows_h, windows_w = -(-h // side), -(-w // side)
            keys.append(base + (time * windows_h + row // side) * windows_w + column // side)
            base += t * windows_h * windows_w
        key_G = torch.cat(keys)
        order_G = torch.argsort(key_G, stable=True)
        group = self.merge**2
        windows = torch.bincount(key_G).mul(group).tolist()
        order_P = (order_G[:, None] * group + torch.arange(group)).flatten()
        return QwenLayout(
            order_P=order_P,
            positions_P2=rules.patch_positions(grids, self.merge)[order_P],
            merger_rows=len(order_G),
            plans={"window": rules.blocks_plan(windows), "frame": rules.frame_plan(grids)},
            restore_M=torch.argsort(order_G),
        )
