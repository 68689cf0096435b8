"""The part of a model family that the data path uses: frames, sizes, patches, tokens and positions of media."""

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
    """What `vft.data` uses of a model family. Each family has its own subclass in its `processor.py`."""

    image_token: int
    video_token: int
    patch: int
    """Side of a patch, in pixels."""
    merge: int = 1
    """Side of a vision token, in patches."""
    temporal: int = 1
    """Frames in a patch."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of pixel values in 0..1, by channel. The default is CLIP's."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation, as `mean`."""
    turn_end: str = ""
    """Text that ends a message, supervised with the answer before it. Empty: the tokenizer's end of sequence, which the
    template may leave out."""
    context_tokens: int | None = None
    """Largest number of tokens of a conversation, by the positions that the model was trained for. None: unknown."""

    @classmethod
    def read(cls, config: Any, preprocessor: dict[str, Any], **own: Any) -> Self:
        """From transformers' configuration object and the model's `preprocessor_config.json`. `own` are fields that the
        family reads itself."""
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
        """Choose frames, size and number of tokens of a medium. Raises UserError if the limits cannot be met."""
        raise NotImplementedError

    def order_patches(self, frames_TCHW: Tensor) -> Tensor:
        """Views [T, 3, H, W] of a medium to patches [P, D], in the encoder's order, temporal patch by temporal patch:
        rows [t, h/merge, w/merge, merge, merge], features [channel, time, y, x].

        A single picture is repeated for all frames of its patch.
        """
        if frames_TCHW.shape[0] == 1:
            frames_TCHW = frames_TCHW.expand(self.temporal, -1, -1, -1)
        t, c, h, w = frames_TCHW.shape
        patch, side = self.patch, self.patch * self.merge
        # numpy moves a line of a patch's pixels as one item. torch's permute moves bytes, which takes 3 times as long.
        line = np.dtype((np.void, patch * frames_TCHW.element_size()))
        lines = frames_TCHW.contiguous().view(torch.uint8).numpy().view(line)
        lines = lines.reshape(t // self.temporal, self.temporal, c, h // side, self.merge, patch, w // side, self.merge)
        ordered = np.ascontiguousarray(lines.transpose(0, 3, 6, 4, 7, 2, 1, 5)).view(np.uint8)
        return torch.from_numpy(ordered).view(frames_TCHW.dtype).reshape(-1, self.patch_features)

    def placeholder(self, kind: MediaKind) -> tuple[int, ...]:
        """Token ids by which the chat template marks a medium."""
        return (self.image_token if kind == "image" else self.video_token,)

    def lead(self, plan: MediaPlan) -> str:
        """Text before the medium in its message."""
        return ""

    def expand(self, plan: MediaPlan) -> Sequence[str | int]:
        """What replaces the placeholder: lengths of runs of vision embeddings, and text between them."""
        return [plan.num_tokens]

    def positions(self, num_tokens: int, media: Sequence[tuple[Sequence[int], MediaPlan]]) -> Tensor:
        """Position ids [3, T] of a document. `media` has the first rows of each medium's runs, and its plan."""
        raise NotImplementedError

    def layout(self, media: Sequence[MediaPlan]) -> VisionLayout:
        """Layout of the patches of consecutive media in the encoder."""
        raise NotImplementedError
