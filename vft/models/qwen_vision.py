"""What the `VisionSpec`s of the Qwen families have in common."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vft.models import media as rules
from vft.types import MediaInfo, MediaKind, MediaPlan, MediaRef, VisionLimits


@dataclass(frozen=True, kw_only=True)
class QwenSpec:
    """Frames, sizes and patches by qwen-vl-utils' rules, one placeholder a medium."""

    image_token: int
    video_token: int
    patch: int
    """Pixels of a side of a patch."""
    merge: int = 2
    """Patches of a side of a merged token."""
    temporal: int = 2
    """Frames of a patch."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    turn_end: str = "<|im_end|>"
    context_tokens: int | None = None

    @property
    def patch_features(self) -> int:
        """D: channels x time x y x x."""
        return 3 * self.temporal * self.patch**2

    def plan(self, ref: MediaRef, info: MediaInfo, limits: VisionLimits) -> MediaPlan:
        """Frames, size and token count of one medium."""
        return rules.plan_medium(ref, info, limits, self.patch, self.merge, self.temporal)

    def order_patches(self, frames_TCHW: Tensor) -> Tensor:
        """Resized frames to patches [P, D]; a single picture stands at both times of its patch."""
        return rules.order_patches(frames_TCHW, self.patch, self.merge, self.temporal)

    def placeholder(self, kind: MediaKind) -> tuple[int, ...]:
        """The pad token between vision_start and vision_end, which the template writes once a medium."""
        return (self.image_token if kind == "image" else self.video_token,)
