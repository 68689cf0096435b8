"""Action classification: one label of a closed set.

torchrun --nproc-per-node N -m vft.recipes.classify CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vft.common.scores import Interval
from vft.common.task import Answer, answer_facts, options_of, samples_of, with_prompt
from vft.common.types import Conversation, Sample
from vft.metrics import breakdown, class_mean_interval, is_right_option, mean_interval, top_k
from vft.recipes.main import main


@dataclass(frozen=True)
class Classify:
    """A video and its label; every label of the set is scored by its likelihood, which needs no parsing."""

    prompt: str = "Which action does the video show? Answer with its name."
    name = "classify"
    main_metric = "top1"

    def conversations(self, sample: Sample) -> list[Conversation]:
        """The label as the answer, the set's labels as the options."""
        turns = with_prompt(sample.turns, self.prompt)
        return [Conversation(sample.id, turns, sample.origin, options_of(sample), answer_facts(sample))]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """`top1` and `top5` by the probability of each label as the whole answer, `..._norm` a character on average,
        `mean_per_class`, `exact_match` of what is generated, all 0 to 1. Of several right labels any one is right.

        `top1/LABEL` is the share of each class's clips that are right; one with several labels is in each of their
        classes. Without a set of labels the exact match alone.
        """
        scores: dict[str, Interval] = {}
        by_class: dict[str, Interval] = {}
        ranked = [answer for answer in answers if answer.choice is not None]
        if ranked:
            samples = samples_of(ranked)
            kinds = {"": [one.option_scores for one in ranked], "_norm": [one.option_scores_norm for one in ranked]}
            for kind, option_scores in kinds.items():
                for k in (1, 5) if all(option_scores) else ():
                    pairs = zip(option_scores, ranked, strict=True)
                    correct = [float(top_k(own, answer.right_options, k)) for own, answer in pairs]
                    scores[f"top{k}{kind}"] = mean_interval(correct, samples)
            # A clip with several right labels is in the class of each.
            labelled = [(one, one.question.prompt.options[i]) for one in ranked for i in sorted(one.right_options)]
            members, labels = zip(*labelled, strict=True)
            first = [float(top_k(answer.option_scores, answer.right_options, 1)) for answer in members]
            by_class = breakdown(first, [{"top1": label} for label in labels])
            scores["mean_per_class"] = class_mean_interval(first, labels, samples_of(members))
        exact = [
            float(is_right_option(answer.text, answer.question.references, answer.question.prompt.options))
            for answer in answers
        ]
        return {**scores, "exact_match": mean_interval(exact, samples_of(answers)), **by_class}


if __name__ == "__main__":
    main("classify")
