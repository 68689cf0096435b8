"""Captioning: describe what happens in a video or a picture.

torchrun --nproc-per-node N -m vft.recipes.caption CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence

from vft import train
from vft.metrics import bleu4, cider_d, rouge_l
from vft.types import Conversation, Sample


class Caption:
    """The record's own conversation; scored by CIDEr-D, BLEU-4 and ROUGE-L."""

    name = "caption"
    default_prompt = "Describe the video."

    def conversation(self, sample: Sample) -> Conversation:
        """The record as it is."""
        return Conversation(sample.id, sample.turns, sample.origin)

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """CIDEr-D (0 to 10, no PTB tokenizer), BLEU-4 (0 to 100), ROUGE-L (0 to 1, beta 1).

        Nothing without captions; no CIDEr-D for a single one, where it has no meaning.
        """
        if not predictions:
            return {}
        scores = {"cider_d": cider_d(predictions, references)} if len(predictions) > 1 else {}
        return {**scores, "bleu4": bleu4(predictions, references), "rouge_l": rouge_l(predictions, references)}


if __name__ == "__main__":
    train.main(Caption())
