"""The half of a model family that the data side knows: how a medium is planned, cut, written and placed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vft.common.types import MediaInfo, MediaKind, MediaPlan, MediaRef, VisionLayout, VisionLimits


@dataclass(frozen=True, kw_only=True)
class VisionProcessor:
    """All that `data` needs to know of a model family. Each family's file in `models/` has its own."""

    image_token: int
    video_token: int
    patch: int
    """Pixels of a side of a patch."""
    merge: int = 1
    """Patches of a side of a merged token."""
    temporal: int = 1
    """Frames of a patch."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Of pixel values in 0..1, by channel; CLIP's where a family has none of its own."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Beside `mean`."""
    turn_end: str = ""
    """Text that closes a message; supervised with the answer before it. Empty: the tokenizer's end of sequence, which
    the template may leave out."""
    context_tokens: int | None = None
    """Positions that the language model was trained for: tokens of one conversation, at most. None: unknown."""

    @classmethod
    def read(cls, config: Any, preprocessor: dict[str, Any], **own: Any) -> Self:
        """From transformers' configuration object and the checkpoint's `preprocessor_config.json`; `own` are fields
        that the family reads itself."""
        return cls(
            image_token=config.image_token_id,
            video_token=config.video_token_id,
            patch=config.vision_config.patch_size,
            mean=tuple(preprocessor.get("image_mean", cls.mean)),
            std=tuple(preprocessor.get("image_std", cls.std)),
            **own,
        )

    @property
    def patch_features(self) -> int:
        """D: channels x time x y x x."""
        return 3 * self.temporal * self.patch**2

    def plan(self, ref: MediaRef, info: MediaInfo, limits: VisionLimits) -> MediaPlan:
        """Choose frames, size and token count of one medium. UserError where the limits can't be met."""
        raise NotImplementedError

    def order_patches(self, frames_TCHW: Tensor) -> Tensor:
        """Views [T, 3, H, W] of a medium to patches [P, D], in the encoder's order, temporal patch by temporal patch:
        rows [t, h/merge, w/merge, merge, merge], features [channel, time, y, x].

        A single picture stands at all times of its patch.
        """
        if frames_TCHW.shape[0] == 1:
            frames_TCHW = frames_TCHW.expand(self.temporal, -1, -1, -1)
        t, c, h, w = frames_TCHW.shape
        patch, side = self.patch, self.patch * self.merge
        # Through numpy, which moves a patch's line of pixels as one item; torch's permute moves bytes, 3x as slowly.
        line = np.dtype((np.void, patch * frames_TCHW.element_size()))
        lines = frames_TCHW.contiguous().view(torch.uint8).numpy().view(line)
        lines = lines.reshape(t // self.temporal, self.temporal, c, h // side, self.merge, patch, w // side, self.merge)
        ordered = np.ascontiguousarray(lines.transpose(0, 3, 6, 4, 7, 2, 1, 5)).view(np.uint8)
        return torch.from_numpy(ordered).view(frames_TCHW.dtype).reshape(-1, self.patch_features)

    def placeholder(self, kind: MediaKind) -> tuple[int, ...]:
        """Token ids with which the chat template marks one medium."""
        return (self.image_token if kind == "image" else self.video_token,)

    def lead(self, plan: MediaPlan) -> str:
        """Text that stands before the medium in its message."""
        return ""

    def expand(self, plan: MediaPlan) -> Sequence[str | int]:
        """What replaces the placeholder: runs of vision embeddings, by length, and text between them."""
        return [plan.num_tokens]

    def positions(self, num_tokens: int, media: Sequence[tuple[Sequence[int], MediaPlan]]) -> Tensor:
        """Position ids [3, T] of a document; `media` holds the first rows of each medium's runs, and its plan."""
        raise NotImplementedError

    def layout(self, media: Sequence[MediaPlan]) -> VisionLayout:
        """How the patches of these media, one behind another, lie in the encoder."""
        raise NotImplementedError
