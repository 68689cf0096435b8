"""Qwen3-VL's `VisionProcessor`: frames, sizes, patches, times as text, positions, by the released model's rules.

Sources: the Qwen3-VL technical report (arXiv 2511.21631), qwen-vl-utils 0.0.14, and the processor of transformers 4.57,
with which the models were released. transformers from 5.10 leaves a second pair of vision_start and vision_end around a
whole video, which 4.57 takes away: `keep_outer_pair`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vft.common.types import MediaPlan, VisionLayout
from vft.models.processor import QwenProcessor, frame_plan, patch_positions


@dataclass(eq=False)
class TableLayout(VisionLayout):
    """Where each patch lies in its frame and in the table of learned positions: there between four entries.

    U are the patches of one frame of each size: all frames of a size share them."""

    positions_P2: Tensor
    """Row and column of each patch."""
    corners_U4: Tensor
    """Entries of the table, int64."""
    shares_U4: Tensor
    """Their weights, float32, of sum 1."""
    place_P: Tensor
    """Which of U each patch is."""


@dataclass(frozen=True, kw_only=True)
class Qwen3Processor(QwenProcessor):
    """The family's `VisionProcessor`: everything that the data path needs to know of Qwen3-VL."""

    table_side: int
    """Rows and columns of the table of learned positions."""
    patch: int = 16
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    video_text: str = "<|vision_start|><|video_pad|><|vision_end|>"

    @classmethod
    def of(cls, config: Any, preprocessor: dict[str, Any]) -> Qwen3Processor:
        """The processor of transformers' configuration object and a `preprocessor_config.json`."""
        vision = config.vision_config
        return cls.read(
            config,
            preprocessor,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
            table_side=round(vision.num_position_embeddings**0.5),
        )

    def lead(self, plan: MediaPlan) -> str:
        """The time of a video's first frames, if the template's vision_start is theirs."""
        return self._times(plan)[0] if plan.ref.kind == "video" and not self.keep_outer_pair else ""

    def expand(self, plan: MediaPlan) -> list[str | int]:
        """As many pad tokens as the medium has merged tokens; each temporal patch of a video stands between its own
        vision_start and vision_end, behind its time."""
        if plan.ref.kind == "image":
            return [plan.num_tokens]
        times = self._times(plan)
        pieces: list[str | int] = [plan.num_tokens // len(times)]
        for time in times[1:]:
            pieces += [f"<|vision_end|>{time}<|vision_start|>", pieces[0]]
        return [f"{times[0]}<|vision_start|>", *pieces, "<|vision_end|>"] if self.keep_outer_pair else pieces

    def _times(self, plan: MediaPlan) -> list[str]:
        """When each temporal patch was seen: halfway between its first frame and its last, to a tenth of a second."""
        times_s = plan.frame_times_s + plan.frame_times_s[-1:] * (-len(plan.frame_times_s) % self.temporal)
        pairs = zip(times_s[:: self.temporal], times_s[self.temporal - 1 :: self.temporal], strict=True)
        return [f"<{(first + last) / 2:.1f} seconds>" for first, last in pairs]

    def run_times(self, plan: MediaPlan) -> Tensor:
        """Each temporal patch like a picture, at one point of time, since times are text."""
        return torch.zeros(1, dtype=torch.long)

    def layout(self, media: Sequence[MediaPlan]) -> TableLayout:
        """Media order; every block sees a temporal patch."""
        grids = [plan.grid_thw for plan in media]
        positions_P2 = patch_positions(grids, self.merge)
        starts: dict[tuple[int, int], int] = {}
        corners, shares, count = [], [], 0
        for size in dict.fromkeys((height, width) for _, height, width in grids):
            starts[size], count = count, count + size[0] * size[1]
            corners_U4, shares_U4 = self._in_table(*size)
            corners.append(corners_U4)
            shares.append(shares_U4)
        places = [torch.arange(h * w).add(starts[h, w]).repeat(t) for t, h, w in grids]
        return TableLayout(
            plans={"frame": frame_plan(grids)},
            projector_rows=len(positions_P2) // self.merge**2,
            positions_P2=positions_P2,
            corners_U4=torch.cat(corners),
            shares_U4=torch.cat(shares),
            place_P=torch.cat(places),
        )

    def _in_table(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Entries around each patch of a frame, and their weights: the table stretched over the frame, corner on
        corner, bilinear."""
        end = self.table_side - 1
        row_U, column_U = patch_positions([(1, height, width)], self.merge).unbind(1)
        y_U, x_U = torch.linspace(0, end, height)[row_U], torch.linspace(0, end, width)[column_U]
        top_U, left_U = y_U.long(), x_U.long()
        down_U, across_U = y_U - top_U, x_U - left_U
        rows = (top_U, 1 - down_U), ((top_U + 1).clamp(max=end), down_U)
        columns = (left_U, 1 - across_U), ((left_U + 1).clamp(max=end), across_U)
        corners = [row * self.table_side + column for row, _ in rows for column, _ in columns]
        shares = [share * other for _, share in rows for _, other in columns]
        return torch.stack(corners, dim=1), torch.stack(shares, dim=1)
