"""LLaVA-NeXT-Video's `VisionProcessor`: frames, crops, tiles and tokens, by the released model's rules.

Sources: the LLaVA-NeXT repository (`playground/demo/video_demo.py`, `llava/mm_utils.py`), as transformers'
LlavaNextVideo has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vft.common.errors import UserError
from vft.common.types import MediaInfo, MediaPlan, MediaRef, View, VisionLayout, VisionLimits
from vft.models.attention import blocks_plan
from vft.models.processor import VisionProcessor, frame_range, sample_frames, sampled_rate


@dataclass(eq=False)
class LlavaLayout(VisionLayout):
    """Which features of the encoder become tokens. Features count patches, the class tokens left out."""

    pooled_RG: Tensor
    """Of videos: the features that are averaged to one row of the projector, R rows of G."""
    kept_R: Tensor
    """Of pictures: features that go to the projector as they are, behind those rows."""
    tokens_M: Tensor
    """For each token the row of the projector, or the row behind its last: the line break of a picture."""


@dataclass(frozen=True, kw_only=True)
class LlavaProcessor(VisionProcessor):
    """The family's `VisionProcessor`. A picture of the encoder is a square of `side` pixels, its patches line by line.

    What closes an answer is the tokenizer's end of sequence: the released Vicuna template leaves it out, the model was
    trained with it.
    """

    side: int
    stride: int
    """Patches of a video's frame are averaged in squares of so many."""
    resolutions: tuple[tuple[int, int], ...]
    """Heights and widths that a picture may be fitted into, in whole squares."""

    @staticmethod
    def from_hf(config: Any, preprocessor: dict[str, Any]) -> LlavaProcessor:
        """From transformers' configuration object and the checkpoint's `preprocessor_config.json`."""
        side = config.vision_config.image_size
        crop = preprocessor.get("crop_size", side)
        crop = crop if isinstance(crop, int) else crop["height"]
        if crop != side:  # such as the processor class's own default of 224
            raise UserError(f"preprocessor_config.json: crop_size = {crop}: config.json has image_size = {side}")
        resolutions = tuple((height, width) for height, width in config.image_grid_pinpoints)
        if any(size % side for pair in resolutions for size in pair):
            raise UserError(f"config.json: image_grid_pinpoints = {list(resolutions)}: must be multiples of {side}")
        return LlavaProcessor.read(
            config,
            preprocessor,
            side=side,
            stride=config.spatial_pool_stride,
            resolutions=resolutions,
        )

    @property
    def grid(self) -> int:
        """Patches along a side of the encoder's picture."""
        return self.side // self.patch

    def plan(self, ref: MediaRef, info: MediaInfo, limits: VisionLimits) -> MediaPlan:
        """Frames spread over a video, each scaled to cover the square and cropped to its middle; of a picture the
        whole of it in one square, and tiles of the resolution that fits it best.

        `max_pixels` bounds a picture's resolution. The size of a video's frames is the model's: limits of pixels don't
        change it.
        """
        if limits.resized_height or limits.resized_width:
            raise UserError(
                f"{ref.field or ref.name}: resized_height = {limits.resized_height}, resized_width = "
                f"{limits.resized_width}: this model's pictures are {self.side} x {self.side}; take them out"
            )
        if ref.kind == "image":
            return self._plan_picture(ref, info, limits)
        first, last = frame_range(info, limits)
        available = last - first + 1
        count = limits.frames or limits.max_frames
        if not limits.frames and limits.fps is not None:
            wanted = available / info.fps * limits.fps if info.fps > 0 else available
            count = max(1, int(min(max(wanted, limits.min_frames), limits.max_frames)))
        count = min(count, available)
        if info.times_s is None or ref.is_list:
            # Truncated, where Qwen2.5-VL rounds.
            indices = tuple(torch.linspace(first, last, count, dtype=torch.float64).long().tolist())
        else:
            indices = sample_frames(ref, info, first, last, count)
        short = min(info.height, info.width)
        height, width = (int(self.side * size / short) for size in (info.height, info.width))
        view = View(height, width, (height - self.side) // 2, (width - self.side) // 2)
        tokens = count * (self.grid // self.stride) ** 2
        seconds = 1 / sampled_rate(info, first, last, count)
        grid = (count, self.grid, self.grid)
        return MediaPlan(ref, info, indices, self.side, self.side, grid, tokens, seconds, (view,))

    def _plan_picture(self, ref: MediaRef, info: MediaInfo, limits: VisionLimits) -> MediaPlan:
        side = self.side
        allowed = [size for size in self.resolutions if size[0] * size[1] <= limits.max_pixels]
        smallest = min(self.resolutions, key=lambda size: size[0] * size[1])
        best = best_resolution(info.height, info.width, allowed or [smallest])
        height, width = fitted(info.height, info.width, best)
        above, left = (best[0] - height) // 2, (best[1] - width) // 2
        tiles = [
            View(height, width, y - above, x - left) for y in range(0, best[0], side) for x in range(0, best[1], side)
        ]
        views = (View(side, side, 0, 0), *tiles)
        grid = (len(views), self.grid, self.grid)
        plan = MediaPlan(ref, info, (0,), side, side, grid, 0, 0.0, views)
        lines, columns = self._tile_features(plan).shape
        return replace(plan, num_tokens=self.grid**2 + lines * (columns + 1))

    def positions(self, num_tokens: int, media: Sequence[tuple[Sequence[int], MediaPlan]]) -> Tensor:
        """Token after token, the same in all three rows: the model knows one axis."""
        return torch.arange(num_tokens).expand(3, -1)

    def layout(self, media: Sequence[MediaPlan]) -> LlavaLayout:
        """Every square attends itself and its class token."""
        squares = sum(plan.grid_thw[0] for plan in media)
        rows = sum(plan.num_tokens for plan in media if plan.ref.kind == "video")
        pooled, kept, tokens = [], [], []
        first = pooled_rows = 0  # feature of the medium's first square; rows of videos so far
        picture_row = rows
        for plan in media:
            if plan.ref.kind == "video":
                pooled.append(first + self._pooled_features(plan.grid_thw[0]))
                tokens.append(torch.arange(pooled_rows, pooled_rows + plan.num_tokens))
                pooled_rows += plan.num_tokens
            else:
                features = self._tile_features(plan)
                kept.append(first + torch.cat([torch.arange(self.grid**2), features.flatten()]))
                own = torch.arange(picture_row, picture_row + kept[-1].numel())
                lines = own[self.grid**2 :].view_as(features)
                tokens.append(own[: self.grid**2])
                tokens.append(torch.nn.functional.pad(lines, (0, 1), value=-1).flatten())
                picture_row += own.numel()
            first += plan.grid_thw[0] * self.grid**2
        tokens_M = torch.cat(tokens)
        return LlavaLayout(
            plans={"square": blocks_plan([self.grid**2 + 1] * squares)},
            projector_rows=picture_row,
            pooled_RG=torch.cat([torch.zeros(0, self.stride**2, dtype=torch.long), *pooled]),
            kept_R=torch.cat([torch.zeros(0, dtype=torch.long), *kept]),
            tokens_M=torch.where(tokens_M < 0, picture_row, tokens_M),
        )

    def _pooled_features(self, frames: int) -> Tensor:
        """Features of a video's tokens, [tokens, stride^2]; a rest beyond whole squares is left out."""
        whole = self.grid // self.stride * self.stride
        features = torch.arange(frames * self.grid**2).view(frames, self.grid, self.grid)[:, :whole, :whole]
        groups = features.unflatten(2, (-1, self.stride)).unflatten(1, (-1, self.stride)).transpose(2, 3)
        return groups.reshape(-1, self.stride**2)

    def _tile_features(self, plan: MediaPlan) -> Tensor:
        """Features of a picture's tiles, joined to one picture, without the lines or columns that are padding."""
        tiles = plan.views[1:]
        across = len({view.left for view in tiles})
        features = torch.arange(self.grid**2, (1 + len(tiles)) * self.grid**2)
        joined = features.view(len(tiles) // across, across, self.grid, self.grid).transpose(1, 2)
        joined = joined.reshape(len(tiles) // across * self.grid, across * self.grid)
        lines, columns = joined.shape
        info = plan.info
        if info.width / info.height > columns / lines:
            padding = (lines - int(round(info.height * (columns / info.width), 7))) // 2
            return joined[padding : lines - padding]
        padding = (columns - int(round(info.width * (lines / info.height), 7))) // 2
        return joined[:, padding : columns - padding]


def best_resolution(height: int, width: int, allowed: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of the allowed heights and widths the one that keeps most pixels of a picture, and of these wastes fewest."""

    def score(size: tuple[int, int]) -> tuple[int, int]:
        scale = min(size[1] / width, size[0] / height)
        used = min(int(width * scale) * int(height * scale), height * width)
        return used, used - size[0] * size[1]

    return max(allowed, key=score)


def fitted(height: int, width: int, best: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a picture that fills `best` in one direction and keeps its shape."""
    by_height, by_width = best[0] / height, best[1] / width
    if by_width < by_height:
        return min(math.ceil(height * by_width), best[0]), best[1]
    return best[0], min(math.ceil(width * by_height), best[1])
