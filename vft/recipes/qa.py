"""Question answering: open questions and multiple choice about a video or a picture.

torchrun --nproc-per-node N -m vft.recipes.qa CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from vft.common.scores import Interval
from vft.common.task import Answer, answer_facts, options_of, samples_of, split_reasoning, texts_of, with_prompt
from vft.common.types import Conversation, Sample
from vft.metrics import (
    Japanese,
    anls_scores,
    breakdown,
    exact_match_scores,
    extract_letter,
    is_right_option,
    mean_interval,
    official_letter,
    token_f1_scores,
    top_k,
    word_tokenizer,
)
from vft.recipes.main import main

OPTION_LINE = re.compile(r"^[ \t]*([(（]?([A-Za-zＡ-Ｚ])[.):、．：）]\s*(\S.*?))\s*$", re.MULTILINE)
"""An option in the text of a question: `A. red`, `(B) green`, `C、蓝`, `d) white`."""

LETTER = re.compile(r"[(（]?([A-Za-zＡ-Ｚ])(?:[.):、．：）]|$)")
"""The letter of an option: alone, or before its text."""


@dataclass(frozen=True)
class QuestionAnswering:
    """The record's own questions and answers. Options are scored by likelihood, and by what is generated."""

    prompt: str = "What happens in the video?"
    japanese: Japanese = "char"
    name = "qa"
    main_metric = "accuracy"

    def conversations(self, sample: Sample) -> list[Conversation]:
        """The record as it is. Its last question is multiple choice if the record or its text gives options."""
        turns = with_prompt(sample.turns, self.prompt)
        given = options_of(sample)
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=0)
        options = given or written_options(turns[last - 1].text, split_reasoning(turns[last].text)[1])
        facts = {"groups": _groups_of(sample), **answer_facts(sample)}
        return [Conversation(sample.id, turns, sample.origin, options, facts)]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """`accuracy`, 0 to 1: the likeliest option is right, or an open answer matches exactly; its parts beside it.

        `choice_...` are questions with options: by the probability of each as the whole answer, `_generated` by the
        letter or the words of the text, and `_official` as Video-MME's script has it: over the answers that hold a
        letter, `choice_with_letter` of all. `open_...` are the others: exact match, token F1, ANLS. `..._norm` take an
        option's log-probability per character. `NAME/KEY/VALUE` are the groups that the data set names.
        """
        choices = [one for one in answers if one.choice is not None]
        lettered = [one for one in choices if _letters_of(one)]
        open_answers = [one for one in answers if one.choice is None]
        has_norm = bool(choices) and all(one.option_scores_norm for one in choices)
        scores: dict[str, Interval] = {}
        by_group: dict[str, Interval] = {}

        def add(name: str, some: Sequence[Answer], correct: Sequence[float], in_groups: bool = False) -> None:
            # 0 if no answer holds a letter, as in Video-MME's script.
            scores[name] = mean_interval(correct, samples_of(some)) if correct else Interval.point(0.0)
            if in_groups:
                groups = [one.question.prompt.facts.get("groups", {}) for one in some]
                by_group.update({f"{name}/{group}": score for group, score in breakdown(correct, groups).items()})

        add("accuracy", answers, [_correct(one) for one in answers], in_groups=True)
        if has_norm:
            add("accuracy_norm", answers, [_correct(one, norm=True) for one in answers])
        if choices:
            add("choice_accuracy", choices, [_correct(one) for one in choices])
            if has_norm:
                add("choice_accuracy_norm", choices, [_correct(one, norm=True) for one in choices])
            add("choice_accuracy_generated", choices, [float(_generated_right(one)) for one in choices], in_groups=True)
        if lettered:
            letters = [official_letter(one.text, _letters_of(one)) for one in lettered]
            named = [(one, letter) for one, letter in zip(lettered, letters, strict=True) if letter is not None]
            right = [float(_is_right(one, letter)) for one, letter in named]
            add("choice_accuracy_official", [one for one, _ in named], right, in_groups=True)
            add("choice_with_letter", lettered, [float(letter is not None) for letter in letters])
        if open_answers:
            predictions, references = texts_of(open_answers)
            add("open_exact_match", open_answers, exact_match_scores(predictions, references))
            add("open_token_f1", open_answers, token_f1_scores(predictions, references, self.japanese))
            cut = (word_tokenizer(refs, self.japanese) for refs in references)
            scores["open_token_f1"] = scores["open_token_f1"].cut_by(cut)
            add("open_anls", open_answers, anls_scores(predictions, references))
        return scores | by_group


def _correct(answer: Answer, norm: bool = False) -> float:
    """1 if the likeliest option is right (`norm`: per character), or an open answer matches exactly; else 0."""
    if answer.choice is None:
        return exact_match_scores([answer.text], [answer.question.references])[0]
    return float(top_k(answer.option_scores_norm if norm else answer.option_scores, answer.right_options, 1))


def _groups_of(sample: Sample) -> dict[str, str]:
    """The `groups` of a record, by which scores are broken down, as texts."""
    groups = sample.fields.get("groups")
    return {str(key): str(value) for key, value in groups.items()} if isinstance(groups, dict) else {}


def written_options(question: str, answer: str) -> tuple[str, ...]:
    """The options that a question lists line by line, in the form in which it is answered.

    LLaVA-Video-178K answers `B. green.` to an option `B. green`, others with the letter alone. Empty if the text lists
    fewer than two, or if the answer is none of them.
    """
    lines = OPTION_LINE.findall(question)
    letters = [letter for _, letter, _ in lines]
    if len(lines) < 2 or letters[0] not in "AaＡ" or letters != [chr(ord(letters[0]) + i) for i in range(len(lines))]:
        return ()
    answer = answer.strip()
    forms = ("{1}", "{1}.", "({1})", "{0}", "{1}. {2}", "{1}. {2}.", "({1}) {2}", "{1}) {2}", "{1}: {2}", "{2}", "{2}.")
    for form in forms:
        options = tuple(form.format(*line) for line in lines)
        if answer in options and len(set(options)) == len(options):
            return options
    return ()


def _generated_right(answer: Answer) -> bool:
    """Whether the text says a right option, by its words or by its letter."""
    if is_right_option(answer.text, answer.question.references, answer.question.prompt.options):
        return True
    letters = _letters_of(answer)
    return bool(letters) and _is_right(answer, extract_letter(answer.text, letters))


def _is_right(answer: Answer, letter: str | None) -> bool:
    """Whether `letter` is that of a right option."""
    return letter is not None and letter in map(_letter_of, answer.question.references)


def _letters_of(answer: Answer) -> str:
    """`ABC` for three options with these letters; empty for other options."""
    letters = "".join(map(_letter_of, answer.question.prompt.options))
    return letters if letters == string.ascii_uppercase[: len(answer.question.prompt.options)] else ""


def _letter_of(option: str) -> str:
    """`B` for `B`, `(b) green` and `B. green`; empty for a text that only begins with a letter."""
    found = LETTER.match(option)
    return unicodedata.normalize("NFKC", found[1]).upper() if found else ""


if __name__ == "__main__":
    main("qa")
