"""Captioning: describe what happens in a video or a picture.

torchrun --nproc-per-node N -m vft.recipes.caption CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vft.common.scores import Interval
from vft.common.task import Answer, answer_facts, samples_of, texts_of, with_prompt
from vft.common.types import Conversation, Sample
from vft.metrics import Japanese, bleu4_interval, cider_d_interval, coco_scores, rouge_l_interval
from vft.recipes.main import main


@dataclass(frozen=True)
class Caption:
    """The record's own conversation; scored by CIDEr-D, BLEU-4 and ROUGE-L."""

    prompt: str = "Describe the video."
    japanese: Japanese = "char"
    coco: bool = False
    name = "caption"
    main_metric = "cider_d"

    def conversations(self, sample: Sample) -> list[Conversation]:
        """The record as it is."""
        turns = with_prompt(sample.turns, self.prompt)
        return [Conversation(sample.id, turns, sample.origin, facts=answer_facts(sample))]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """CIDEr-D (0 to 10, no PTB tokenizer), BLEU-4 (0 to 100), ROUGE-L (0 to 1, beta 1).

        No CIDEr-D for a single caption, where it has no meaning. With `coco` also `metrics.coco_scores`.
        """
        predictions, references = texts_of(answers)
        samples = samples_of(answers)
        scores = {}
        if len(predictions) > 1:
            scores["cider_d"] = cider_d_interval(predictions, references, samples, self.japanese)
        scores["bleu4"] = bleu4_interval(predictions, references, samples, self.japanese)
        scores["rouge_l"] = rouge_l_interval(predictions, references, samples)
        return scores | (coco_scores(predictions, references, samples) if self.coco else {})


if __name__ == "__main__":
    main("caption")
