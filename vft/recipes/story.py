"""Video to story: a narrative from a video or a run of pictures.

torchrun --nproc-per-node N -m vft.recipes.story CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vft.common.scores import Interval
from vft.common.task import Answer, narrate, samples_of, texts_of
from vft.common.types import Conversation, Sample
from vft.metrics import Japanese, bleu4_interval, distinct_n, rouge_l_interval, word_tokenizer
from vft.recipes.main import main


@dataclass(frozen=True)
class Story:
    """A story, and a question about each segment where the record describes them."""

    prompt: str = "Tell a story about what you see."
    japanese: Japanese = "char"
    name = "story"
    main_metric = "rouge_l"

    def conversations(self, sample: Sample) -> list[Conversation]:
        """The story first, then what happens in each segment."""
        return narrate(sample, self.prompt)

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """ROUGE-L (0 to 1, beta 1), BLEU-4 (0 to 100), and the share of different word pairs among all (0 to 1): a low
        one means that all stories are alike."""
        predictions, references = texts_of(answers)
        samples = samples_of(answers)
        # A sample that is drawn twice repeats its own pairs: resamples say nothing about how alike the stories are.
        distinct = distinct_n(predictions, 2)
        return {
            "rouge_l": rouge_l_interval(predictions, references, samples),
            "bleu4": bleu4_interval(predictions, references, samples, self.japanese),
            "distinct_2": Interval.point(distinct).cut_by(map(word_tokenizer, references)),
        }


if __name__ == "__main__":
    main("story")
