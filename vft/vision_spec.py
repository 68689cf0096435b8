"""The half of a model family that the data side knows: how a medium is planned, cut, written and placed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from vft.types import MediaInfo, MediaKind, MediaPlan, MediaRef, VisionLayout, VisionLimits


class VisionSpec(Protocol):
    """All that `data` needs to know of a model family. Each family's file in `models/` holds one."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of pixel values in 0..1, by channel."""
        ...

    @property
    def std(self) -> tuple[float, float, float]:
        """Beside `mean`."""
        ...

    @property
    def patch_features(self) -> int:
        """D: values of one patch."""
        ...

    @property
    def turn_end(self) -> str:
        """Text that closes a message; supervised with the answer before it. Empty: the tokenizer's end of sequence,
        which the template may leave out."""
        ...

    @property
    def context_tokens(self) -> int | None:
        """Positions that the language model was trained for, if that is fewer than a row may have."""
        ...

    def plan(self, ref: MediaRef, info: MediaInfo, limits: VisionLimits) -> MediaPlan:
        """Choose frames, size and token count of one medium. UserError where the limits can't be met."""
        ...

    def order_patches(self, frames_TCHW: Tensor) -> Tensor:
        """Views [T, 3, H, W] of a medium to pixels_PD uint8, in the tower's order: temporal patch by temporal patch."""
        ...

    def placeholder(self, kind: MediaKind) -> tuple[int, ...]:
        """Token ids with which the chat template marks one medium."""
        ...

    def lead(self, plan: MediaPlan) -> str:
        """Text that stands before the medium in its message."""
        ...

    def expand(self, plan: MediaPlan) -> Sequence[str | int]:
        """What replaces the placeholder: runs of vision embeddings, by length, and text between them."""
        ...

    def positions(self, num_tokens: int, media: Sequence[tuple[Sequence[int], MediaPlan]]) -> Tensor:
        """Position ids [3, T] of a document; `media` holds the first rows of each medium's runs, and its plan."""
        ...

    def layout(self, media: Sequence[MediaPlan]) -> VisionLayout:
        """How the patches of these media, one behind another, lie in the tower."""
        ...
