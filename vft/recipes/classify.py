"""Action classification: one label of a closed set.

torchrun --nproc-per-node N -m vft.recipes.classify CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from vft import train
from vft.metrics import Interval, accuracy_by_class, exact_match_scores, mean_interval, top_k
from vft.task import Answer, options_of, texts_of, with_prompt
from vft.types import Conversation, Sample


@dataclass(frozen=True)
class Classify:
    """A video and its label; every label of the set is scored by its likelihood, which needs no parsing."""

    prompt: str = "Which action does the video show? Answer with its name."
    name = "classify"
    main_metric = "top1"

    def conversations(self, sample: Sample) -> list[Conversation]:
        """The label as the answer, the set's labels as the options."""
        turns = with_prompt(sample.turns, self.prompt)
        return [Conversation(sample.id, turns, sample.origin, options_of(sample))]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """`top1` and `top5` by likelihood, `mean_per_class`, `exact_match` of what is generated, all 0 to 1.

        `top1/LABEL` is the share of each class that is right. Without a set of labels the exact match alone.
        """
        if not answers:
            return {}
        scores = {}
        ranked = [answer for answer in answers if answer.choice is not None]
        if ranked:
            right = [answer.question.prompt.options.index(answer.question.references[0]) for answer in ranked]
            pairs = list(zip(ranked, right, strict=True))
            first = [float(top_k(answer.option_scores, label, 1)) for answer, label in pairs]
            scores["top1"] = mean_interval(first)
            scores["top5"] = mean_interval([float(top_k(answer.option_scores, label, 5)) for answer, label in pairs])
            by_class = accuracy_by_class(first, [answer.question.references[0] for answer in ranked])
            mean = fmean(by_class.values())
            scores["mean_per_class"] = Interval(mean, mean, mean)
        predictions, references = texts_of(answers)
        scores["exact_match"] = mean_interval(exact_match_scores(predictions, references))
        if ranked:
            scores |= {f"top1/{name}": Interval(share, share, share) for name, share in by_class.items()}
        return scores


if __name__ == "__main__":
    train.main(Classify())
