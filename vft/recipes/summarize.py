"""Summarization: a long video in a few sentences.

torchrun --nproc-per-node N -m vft.recipes.summarize CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vft.common.scores import Interval
from vft.common.task import Answer, narrate, samples_of, texts_of
from vft.common.types import Conversation, Sample
from vft.metrics import (
    Japanese,
    bleu4_interval,
    cider_d_interval,
    coco_scores,
    mean_interval,
    rouge_l_interval,
    rouge_l_tokenizer,
    segment_coverage_scores,
)
from vft.recipes.main import main


@dataclass(frozen=True)
class Summarize:
    """A summary of the video, and a question about each of its segments where the record describes them."""

    prompt: str = "Summarize the video."
    japanese: Japanese = "char"
    coco: bool = False
    name = "summarize"
    main_metric = "rouge_l"

    def conversations(self, sample: Sample) -> list[Conversation]:
        """The summary first, then what happens in each segment."""
        return narrate(sample, self.prompt)

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """ROUGE-L (0 to 1, beta 1), BLEU-4 (0 to 100), CIDEr-D of more than one summary (0 to 10), and where records
        have segments the share of them that the summary covers (ROUGE-L recall of its best sentence at least 0.3). With
        `coco` also `metrics.coco_scores`."""
        predictions, references = texts_of(answers)
        samples = samples_of(answers)
        scores = {
            "rouge_l": rouge_l_interval(predictions, references, samples),
            "bleu4": bleu4_interval(predictions, references, samples, self.japanese),
        }
        if len(predictions) > 1:
            scores["cider_d"] = cider_d_interval(predictions, references, samples, self.japanese)
        having = [answer for answer in answers if answer.question.prompt.facts.get("segments")]
        if having:
            segments = [answer.question.prompt.facts["segments"] for answer in having]
            covered = segment_coverage_scores([answer.text for answer in having], segments)
            scores["coverage"] = mean_interval(covered, samples_of(having)).cut_by(map(rouge_l_tokenizer, segments))
        return scores | (coco_scores(predictions, references, samples) if self.coco else {})


if __name__ == "__main__":
    main("summarize")
