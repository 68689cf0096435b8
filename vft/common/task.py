"""A task: how a sample becomes conversations, and how answers are scored. The training loop is the same for all."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vft.common.errors import UserError
from vft.common.files import digest
from vft.common.scores import Interval, Samples, clusters_of
from vft.common.types import ANSWER_KEYS, Conversation, MediaRef, Sample, Turn
from vft.common.unique import unique_names


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the right answers to it."""

    id: str
    prompt: Conversation
    """Ends before the answer."""
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to a question."""

    question: Question
    text: str
    """What was generated, without the reasoning. This is scored."""
    option_scores: tuple[float, ...] = ()
    """Log-probability of each option of the question as the whole answer, including the token that ends it."""
    option_scores_norm: tuple[float, ...] = ()
    """Log-probability of each option without that token, divided by its number of characters."""
    reasoning: str = ""
    """What was generated between the reasoning tags, before the text."""
    is_cut_off: bool = False
    """Whether generation stopped at the limit of tokens."""
    others: tuple[Answer, ...] = ()
    """Further answers to the question, if several were sampled."""

    @property
    def choice(self) -> int | None:
        """Index of the most likely option; None if the question has no options."""
        return likeliest(self.option_scores)

    @property
    def option_probabilities(self) -> tuple[float, ...]:
        """Probability of each option, if the answer is one of them: the softmax of `option_scores`."""
        weights = [math.exp(score - max(self.option_scores)) for score in self.option_scores]
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def right_options(self) -> frozenset[int]:
        """Indices of the options that are right."""
        options = self.question.prompt.options
        return frozenset(i for i, option in enumerate(options) if option in self.question.references)


def likeliest(scores: Sequence[float]) -> int | None:
    """Index of the largest score; None if there is none."""
    return max(range(len(scores)), key=scores.__getitem__) if scores else None


class Task(Protocol):
    """What a recipe needs besides its configuration. `vft/recipes/caption.py` is a short one."""

    @property
    def name(self) -> str:
        """Name of the module in `vft.recipes`."""

    @property
    def prompt(self) -> str:
        """The question for records that have none of their own."""

    @property
    def main_metric(self) -> str:
        """The metric that stands for all of them; larger is better."""

    def conversations(self, sample: Sample) -> Sequence[Conversation]:
        """The conversations to train on. Evaluation asks the first one; the others are additional supervision.

        Raises UserError, with the sample's origin, if the task cannot use the sample.
        """

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """Scores by the name of the metric, each with its 95 % interval. There is at least one answer."""


def main_conversation(task: Task) -> Callable[[Sample], Sequence[Conversation]]:
    """The conversation that evaluation asks, without additional supervision."""
    return lambda sample: task.conversations(sample)[:1]


def trained_conversations(task: Task, segment_questions: bool) -> Callable[[Sample], Sequence[Conversation]]:
    """The conversations to train on; additional supervision only if `data.segment_questions` is set."""
    return task.conversations if segment_questions else main_conversation(task)


def with_prompt(turns: Sequence[Turn], prompt: str, speech: str = "") -> tuple[Turn, ...]:
    """The turns, with `prompt` as the text of the first user turn if that turn has only media. `speech`, what is said
    in the video, comes after this question."""
    for i, turn in enumerate(turns):
        if turn.role == "user":
            parts = turn.parts
            if all(not isinstance(part, str) or not part.strip() for part in parts):
                parts = (*(part for part in parts if not isinstance(part, str)), prompt)
            if speech:
                text, last = f"What is said: {speech}", parts[-1]
                parts = (*parts[:-1], f"{last}\n{text}") if isinstance(last, str) else (*parts, text)
            return (*turns[:i], replace(turn, parts=parts), *turns[i + 1 :])
    return tuple(turns)


def narrate(sample: Sample, prompt: str) -> list[Conversation]:
    """A conversation that answers with the record's text, then one for each segment that the record describes.

    What is said in the video (`speech`) becomes part of the question.
    """
    segments = sample.fields.get("segments") or ()
    if not isinstance(segments, tuple):  # another format's key of the same name
        segments = ()
    speech = sample.fields.get("speech")
    facts = {"segments": tuple(text for _, _, text in segments), **answer_facts(sample)}
    turns = with_prompt(sample.turns, prompt, speech if isinstance(speech, str) else "")
    spans_s = tuple((start_s, end_s) for start_s, end_s, _ in segments)
    made = [Conversation(sample.id, turns, sample.origin, facts=facts, spans_s=spans_s)]
    system = tuple(turn for turn in sample.turns if turn.role == "system")
    media = tuple(part for turn in sample.turns for part in turn.parts if isinstance(part, MediaRef))
    for number, (start_s, end_s, text) in enumerate(segments, 1):
        question = Turn("user", (*media, f"What happens between {start_s:.1f} s and {end_s:.1f} s?"))
        segment_turns = (*system, question, Turn("assistant", (text,)))
        made.append(Conversation(f"{sample.id}/{number}", segment_turns, sample.origin, spans_s=spans_s))
    return made


def texts_of(answers: Sequence[Answer]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The generated texts, and the references of each."""
    return [answer.text for answer in answers], [answer.question.references for answer in answers]


def samples_of(answers: Sequence[Answer]) -> Samples:
    """The answered questions as samples of a score. The bootstrap draws questions about one file together."""
    questions = [answer.question for answer in answers]
    names = unique_names(_name_of(question) for question in questions)
    return Samples(tuple(names), clusters_of([files_of(q.prompt.media) for q in questions]))


def _name_of(question: Question) -> str:
    """Equal for the same media, prompt and right answers, whatever the order of records and options."""
    prompt = question.prompt
    turns = tuple((turn.role, turn.text) for turn in prompt.turns)
    content = prompt.media_key, turns, sorted(prompt.options), sorted(set(question.references))
    return digest(repr(content))


def files_of(media: Iterable[MediaRef]) -> tuple[str, ...]:
    """The files of some media."""
    return tuple(str(file) for ref in media for file in ref.files)


def answer_facts(sample: Sample) -> dict[str, tuple[str, ...]]:
    """`Conversation.facts` with the right `answers` of a record, if there are several."""
    answers = right_answers(sample)
    return {"answers": answers} if len(answers) > 1 else {}


def right_answers(sample: Sample) -> tuple[str, ...]:
    """All right answers to the last question of a record, each once: that of its last turn, then those that it lists.

    They are listed under `answers` or `references`, under `answer` or `label`, or under `labels` if there are
    `options`. Numbers count as their text.
    """
    answers = [split_reasoning(turn.text)[1] for turn in sample.turns if turn.role == "assistant"][-1:]
    if not answers:
        return ()
    lists = {key: sample.fields.get(key) for key in ANSWER_KEYS}
    if sample.fields.get("options"):  # without these, `labels` are the options
        lists["labels"] = sample.fields.get("labels")
    for key, values in lists.items():
        # In a user's own record the other keys may mean something else, so they must contain the answer.
        if isinstance(values, list) and (key in ("answers", "references") or answers[0] in values):
            texts = [str(value) if type(value) in (int, float) else value for value in values]
            answers += [text for text in texts if isinstance(text, str) and text]
    return tuple(dict.fromkeys(answers))


def options_of(sample: Sample) -> tuple[str, ...]:
    """The closed set of answers of a record (`options`, or the `labels` of its data set); empty if there is none.

    Raises UserError if the set contains an answer twice, or does not contain the record's own.
    """
    answer, *more = right_answers(sample)
    options, labels = sample.fields.get("options") or (), sample.fields.get("labels")
    # In a user's own record `labels` may mean something else: they are options if they contain the answer.
    if not options and (isinstance(labels, tuple) or (isinstance(labels, list) and answer in labels)):
        options = labels
    if not options:
        return ()
    if not isinstance(options, list | tuple) or not all(isinstance(one, str) and one.strip() for one in options):
        raise UserError(f"{sample.origin}: options: {options!r:.60} must be a list of texts")
    missing = next((right for right in (answer, *more) if right not in options), None)
    seen = {_as_read(option) for option in options}
    if missing is not None or len(seen) < len(options):
        alike = " (one differs from it in its form of Unicode, NFC or NFD, or in space around it: write both alike)"
        raise UserError(
            f"{sample.origin}: options: the answer {missing or answer!r:.60} must be among {len(options)} different "
            f"options, word for word; they are {', '.join(options):.80}" + alike * (_as_read(missing or "") in seen)
        )
    if more and len(more) + 1 == len(options):
        raise UserError(
            f"{sample.origin}: all {len(options)} options are listed as right answers too; list the right ones alone"
        )
    return tuple(options)


def _as_read(text: str) -> str:
    """Equal for texts that look the same to a reader."""
    return unicodedata.normalize("NFC", text).strip()


# ------------------------------------------------------------------------------------------------------- reasoning

OPEN, CLOSE = "<think>", "</think>"
"""Around reasoning before an answer, as in the templates of Qwen3 and DeepSeek-R1."""


def split_reasoning(text: str, opened: bool = False) -> tuple[str | None, str]:
    """The reasoning at the start of a text, and the answer after it; None and the whole text if there is no reasoning.

    `opened`: the prompt ends with the opening tag, so everything up to the closing tag is reasoning. Line breaks next
    to the tags are removed (the rule of Qwen3's template).
    """
    begins = text.lstrip().startswith(OPEN)
    if (begins or opened) and CLOSE in text:
        reasoning, _, answer = text.partition(CLOSE)
        if begins:
            reasoning = reasoning.partition(OPEN)[2]
        return reasoning.strip("\n"), answer.lstrip("\n")
    return None, text


def answer_in(text: str, opened: bool = False) -> str:
    """The answer in a generated text: what follows the reasoning; empty if the reasoning was not finished.

    `opened` as in `split_reasoning`.
    """
    if CLOSE not in text and (opened or text.lstrip().startswith(OPEN)):
        return ""
    return split_reasoning(text, opened)[1]
