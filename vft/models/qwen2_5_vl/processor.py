"""Qwen2.5-VL's `VisionProcessor`: frames, sizes, patches, positions and windows, by the released model's rules.

Sources: the Qwen2.5-VL technical report (arXiv 2502.13923) and qwen-vl-utils 0.0.14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vft.common.types import MediaPlan, VisionLayout
from vft.models.attention import blocks_plan
from vft.models.processor import QwenProcessor, frame_plan, patch_positions


@dataclass(eq=False)
class QwenLayout(VisionLayout):
    """How the patches of a batch lie in the encoder."""

    order_P: Tensor
    """Permutation from media order to the order in which the encoder attends."""
    positions_P2: Tensor
    """Row and column of each patch, in the encoder's order."""
    restore_M: Tensor
    """Permutation of merged tokens from the encoder's order back to media order."""


@dataclass(frozen=True, kw_only=True)
class Qwen2_5Processor(QwenProcessor):
    """The family's `VisionProcessor`: everything that the data path needs to know of Qwen2.5-VL."""

    tokens_per_second: float
    patch: int = 14
    window: int = 112
    """Pixels of a side of an attention window."""

    def run_times(self, plan: MediaPlan) -> Tensor:
        """seconds_per_grid x tokens_per_second in floating point, truncated, by the rule that the model was trained
        with. transformers 4.57 truncates the seconds first, 5.x resumes text earlier. Pictures with times of their own
        stand at these, a pair at its first one's."""
        seconds = torch.arange(plan.grid_thw[0], dtype=torch.float64) * plan.seconds_per_grid
        if plan.ref.options.timestamps:
            seconds = torch.tensor(plan.frame_times_s[:: self.temporal], dtype=torch.float64) - plan.frame_times_s[0]
        return (seconds * self.tokens_per_second).long()

    def layout(self, media: Sequence[MediaPlan]) -> QwenLayout:
        """Merged tokens sorted by frame and window; full-attention blocks see a frame pair, the others a window."""
        grids = [plan.grid_thw for plan in media]
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
            positions_P2=patch_positions(grids, self.merge)[order_P],
            projector_rows=len(order_G),
            plans={"window": blocks_plan(windows), "frame": frame_plan(grids)},
            restore_M=torch.argsort(order_G),
        )
