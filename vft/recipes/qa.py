"""Question answering: open questions and multiple choice about a video or a picture.

torchrun --nproc-per-node N -m vft.recipes.qa CONFIG.toml [section.key=value ...]
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from vft.common.reasoning import split_reasoning
from vft.common.scores import Interval
from vft.common.task import Answer, answer_facts, groups_of, options_of, samples_of, texts_of, with_prompt
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
        facts = {"groups": groups_of(sample), **answer_facts(sample)}
        return [Conversation(sample.id, turns, sample.origin, options, facts)]

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """`accuracy`, 0 to 1: the likeliest option is right, or an open answer matches exactly; its parts beside it.

        `choice_...` are questions with options: by the probability of each as the whole answer, `_generated` by the
        letter or the words of the text, and `_official` as Video-MME's script has it: over the answers that hold a
        letter, `choice_with_letter` of all. `open_...` are the others: exact match, token F1, ANLS. `..._norm` take an
        option's log-probability per character. `NAME/KEY/VALUE` are the groups that the data set names.
        """
        if not answers:
            return {}
        choices = [answer for answer in answers if answer.choice is not None]
        open_answers = [answer for answer in answers if answer.choice is None]
        correct = [_correct(answer) for answer in answers]
        scores = {"accuracy": _mean(correct, answers)}
        if choices and all(answer.option_scores_norm for answer in choices):
            scores["accuracy_norm"] = _mean([_correct(answer, norm=True) for answer in answers], answers)
        by_group = _by_group("accuracy", answers, correct)
        if choices:
            choice_scores, choice_groups = _score_choices(choices)
            scores |= choice_scores
            by_group |= choice_groups
        if open_answers:
            scores |= self._score_open(open_answers)
        return {**scores, **by_group}

    def _score_open(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        predictions, references = texts_of(answers)
        token_f1 = _mean(token_f1_scores(predictions, references, self.japanese), answers)
        return {
            "open_exact_match": _mean(exact_match_scores(predictions, references), answers),
            "open_token_f1": token_f1.cut_by(word_tokenizer(refs, self.japanese) for refs in references),
            "open_anls": _mean(anls_scores(predictions, references), answers),
        }


def _mean(scores: Sequence[float], answers: Sequence[Answer]) -> Interval:
    return mean_interval(scores, samples=samples_of(answers))


def _correct(answer: Answer, norm: bool = False) -> float:
    """1 if the likeliest option is right (`norm`: per character), or an open answer matches exactly; else 0."""
    if answer.choice is None:
        return exact_match_scores([answer.text], [answer.question.references])[0]
    return float(top_k(answer.option_scores_norm if norm else answer.option_scores, answer.right_options, 1))


def _score_choices(answers: Sequence[Answer]) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Scores of questions with options, and some of them by group."""
    scores = {"choice_accuracy": _mean([_correct(answer) for answer in answers], answers)}
    if all(answer.option_scores_norm for answer in answers):
        scores["choice_accuracy_norm"] = _mean([_correct(answer, norm=True) for answer in answers], answers)
    generated = [float(_generated_right(answer)) for answer in answers]
    scores["choice_accuracy_generated"] = _mean(generated, answers)
    by_group = _by_group("choice_accuracy_generated", answers, generated)
    lettered = [answer for answer in answers if _letters_of(answer)]
    if lettered:
        letters = [official_letter(answer.text, _letters_of(answer)) for answer in lettered]
        named = [(answer, letter) for answer, letter in zip(lettered, letters, strict=True) if letter is not None]
        official = [float(_is_right(answer, letter)) for answer, letter in named]
        with_letter = [answer for answer, _ in named]
        # 0 if no answer holds a letter, as in the script.
        scores["choice_accuracy_official"] = _mean(official, with_letter) if named else Interval(0.0, 0.0, 0.0)
        scores["choice_with_letter"] = _mean([float(letter is not None) for letter in letters], lettered)
        by_group |= _by_group("choice_accuracy_official", with_letter, official)
    return scores, by_group


def _by_group(name: str, answers: Sequence[Answer], correct: Sequence[float]) -> dict[str, Interval]:
    """A score within each group that the data set names."""
    groups = [answer.question.prompt.facts.get("groups", {}) for answer in answers]
    return {f"{name}/{group}": Interval.point(v) for group, v in breakdown(correct, groups).items()}


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
