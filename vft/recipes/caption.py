"""Captioning: describe what happens in a video or a picture.

torchrun --nproc-per-node N -m vft.recipes.caption CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence

from vft import train
from vft.metrics import cider_d
from vft.types import Conversation, Sample


class Caption:
    """The record's own conversation; scored by CIDEr-D."""

    name = "caption"
    default_prompt = "Describe the video."

    def conversation(self, sample: Sample) -> Conversation:
        """The record as it is."""
        return Conversation(sample.id, sample.turns, sample.origin)

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """CIDEr-D, 0 to 10 (no PTB tokenizer); nothing for fewer than two captions, where it has no meaning."""
        return {"cider_d": cider_d(predictions, references)} if len(predictions) > 1 else {}


if __name__ == "__main__":
    train.main(Caption())
