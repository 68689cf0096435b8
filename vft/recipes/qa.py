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
        """The record as it is; its last question is multiple choice where the record or its text gives options."""
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
        option's probability a character on average. `NAME/KEY/VALUE` are the groups that the data set names.
        """
        if not answers:
            return {}
        choice = [answer for answer in answers if answer.choice is not None]
        rest = [answer for answer in answers if answer.choice is None]
        normed = bool(choice) and all(answer.option_scores_norm for answer in choice)
        right = {id(answer): float(top_k(answer.option_scores, answer.right_options, 1)) for answer in choice}
        right_norm = {
            id(answer): float(top_k(answer.option_scores_norm, answer.right_options, 1)) for answer in choice * normed
        }
        scores: dict[str, Interval] = {}
        parts: dict[str, Interval] = {}
        if choice:
            samples = samples_of(choice)
            generated = [float(_generated_right(answer)) for answer in choice]
            scores["choice_accuracy"] = mean_interval(list(right.values()), samples=samples)
            if normed:
                scores["choice_accuracy_norm"] = mean_interval(list(right_norm.values()), samples=samples)
            scores["choice_accuracy_generated"] = mean_interval(generated, samples=samples)
            parts |= _by_group("choice_accuracy_generated", choice, generated)
            lettered = [(answer, letters) for answer in choice if (letters := _letters_of(answer))]
            taken = [(answer, official_letter(answer.text, letters)) for answer, letters in lettered]
            named = [(answer, letter) for answer, letter in taken if letter is not None]
            if lettered:
                held = [float(letter is not None) for _, letter in taken]
                official, those = [float(_is_right(*one)) for one in named], [answer for answer, _ in named]
                # Of none it is 0, as in the script.
                scores["choice_accuracy_official"] = (
                    mean_interval(official, samples=samples_of(those)) if named else Interval(0.0, 0.0, 0.0)
                )
                scores["choice_with_letter"] = mean_interval(held, samples=samples_of([a for a, _ in taken]))
                parts |= _by_group("choice_accuracy_official", those, official)
        if rest:
            samples = samples_of(rest)
            predictions, references = texts_of(rest)
            exact = exact_match_scores(predictions, references)
            right |= {id(answer): score for answer, score in zip(rest, exact, strict=True)}
            scores["open_exact_match"] = mean_interval(exact, samples=samples)
            token_f1 = mean_interval(token_f1_scores(predictions, references, self.japanese), samples=samples)
            scores["open_token_f1"] = token_f1.cut_by(word_tokenizer(refs, self.japanese) for refs in references)
            scores["open_anls"] = mean_interval(anls_scores(predictions, references), samples=samples)
        everything = [right[id(answer)] for answer in answers]
        whole = {"accuracy": mean_interval(everything, samples=samples_of(answers))}
        if normed:
            also = [(right | right_norm)[id(answer)] for answer in answers]
            whole["accuracy_norm"] = mean_interval(also, samples=samples_of(answers))
        return {**whole, **scores, **_by_group("accuracy", answers, everything), **parts}


def _by_group(name: str, answers: Sequence[Answer], correct: Sequence[float]) -> dict[str, Interval]:
    """A score within each group that the data set names."""
    groups = [answer.question.prompt.facts.get("groups", {}) for answer in answers]
    return {f"{name}/{group}": Interval(v, v, v) for group, v in breakdown(correct, groups).items()}


def written_options(question: str, answer: str) -> tuple[str, ...]:
    """The options that a question lists line by line, in the form in which it is answered.

    LLaVA-Video-178K answers `B. green.` to an option `B. green`; others with the letter alone. Empty where the text
    lists fewer than two, or the answer is none of them.
    """
    lines = OPTION_LINE.findall(question)
    letters = [letter for _, letter, _ in lines]
    if len(lines) < 2 or letters[0] not in "AaＡ" or letters != [chr(ord(letters[0]) + i) for i in range(len(lines))]:
        return ()
    said = answer.strip()
    forms = ("{1}", "{1}.", "({1})", "{0}", "{1}. {2}", "{1}. {2}.", "({1}) {2}", "{1}) {2}", "{1}: {2}", "{2}", "{2}.")
    for form in forms:
        options = tuple(form.format(*line) for line in lines)
        if said in options and len(set(options)) == len(options):
            return options
    return ()


def _generated_right(answer: Answer) -> bool:
    """Whether the text says a right option, by its words or by its letter."""
    if is_right_option(answer.text, answer.question.references, answer.question.prompt.options):
        return True
    letters = _letters_of(answer)
    return bool(letters) and _is_right(answer, extract_letter(answer.text, letters))


def _is_right(answer: Answer, letter: str | None) -> bool:
    """Whether it is the letter of a right option."""
    return letter is not None and letter in map(_letter_of, answer.question.references)


def _letters_of(answer: Answer) -> str:
    """`ABC` of three options that are lettered so; nothing of others."""
    letters = "".join(map(_letter_of, answer.question.prompt.options))
    return letters if letters == string.ascii_uppercase[: len(answer.question.prompt.options)] else ""


def _letter_of(option: str) -> str:
    """`B` of `B`, `(b) green` and `B. green`; of a text that only begins with a letter nothing."""
    found = LETTER.match(option)
    return unicodedata.normalize("NFKC", found[1]).upper() if found else ""


if __name__ == "__main__":
    main("qa")
