"""What distinguishes one recipe from another: how a sample becomes conversations, and how answers are scored."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

from vft.common.errors import UserError
from vft.common.files import digest
from vft.common.reasoning import split_reasoning
from vft.common.scores import Interval, Samples, clusters_of
from vft.common.types import ANSWER_KEYS, Conversation, MediaRef, Sample, Turn


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what would be right answers to it."""

    id: str
    prompt: Conversation
    """It ends where the answer begins."""
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to a question."""

    question: Question
    text: str
    """Generated, without its reasoning: this is scored."""
    option_scores: tuple[float, ...] = ()
    """Log-probability of each of the question's options as the whole answer, the token that closes it included."""
    option_scores_norm: tuple[float, ...] = ()
    """Log-probability of each option without that token, a character on average."""
    reasoning: str = ""
    """What was generated before the text, between the tags of reasoning."""
    is_cut_off: bool = False
    """Whether it ended at the limit of tokens."""

    @property
    def choice(self) -> int | None:
        """Number of the likeliest option; None where the question has none."""
        return likeliest(self.option_scores)

    @property
    def right_options(self) -> frozenset[int]:
        """Numbers of the question's options that are right."""
        options = self.question.prompt.options
        return frozenset(i for i, option in enumerate(options) if option in self.question.references)


def likeliest(scores: Sequence[float]) -> int | None:
    """Number of the largest; None where there is none."""
    return max(range(len(scores)), key=scores.__getitem__) if scores else None


Scores = Mapping[str, Interval]
"""Metrics by name, each with its 95 % interval."""


class Task(Protocol):
    """A recipe is one of these and a configuration; the loop is the same for all."""

    @property
    def name(self) -> str:
        """As in `vft.recipes.NAME`."""
        ...

    @property
    def prompt(self) -> str:
        """What is asked where a record has no question of its own."""
        ...

    @property
    def main_metric(self) -> str:
        """The one figure that stands for the others; larger is better."""
        ...

    def conversations(self, sample: Sample) -> Sequence[Conversation]:
        """What to train on. The first is what is asked in evaluation; the others are further supervision.

        UserError names the sample where it can't be made.
        """
        ...

    def score(self, answers: Sequence[Answer]) -> dict[str, Interval]:
        """Metrics of the answers; nothing where there are none."""
        ...


def main_conversation(task: Task) -> Callable[[Sample], Sequence[Conversation]]:
    """What `task` asks in evaluation, without the further supervision."""
    return lambda sample: task.conversations(sample)[:1]


def trained_conversations(task: Task, segment_questions: bool) -> Callable[[Sample], Sequence[Conversation]]:
    """What `task` trains on: with `segment_questions` (`data.segment_questions`) the further supervision too."""
    return task.conversations if segment_questions else main_conversation(task)


def with_prompt(turns: Sequence[Turn], prompt: str) -> tuple[Turn, ...]:
    """The turns with `prompt` as the text of the first user's turn, where that holds media alone."""
    for i, turn in enumerate(turns):
        if turn.role == "user":
            if all(not isinstance(part, str) or not part.strip() for part in turn.parts):
                turn = replace(turn, parts=(*(part for part in turn.parts if not isinstance(part, str)), prompt))
            return (*turns[:i], turn, *turns[i + 1 :])
    return tuple(turns)


def configured(task: Task, prompt: str, japanese: str) -> Task:
    """The task with what a configuration says of it: `data.prompt`, unless empty, and `eval.japanese`."""
    given = {"prompt": prompt or task.prompt, "japanese": japanese}
    known = {field.name for field in fields(cast(Any, task))}
    return replace(cast(Any, task), **{name: value for name, value in given.items() if name in known})


def narrate(sample: Sample, prompt: str) -> list[Conversation]:
    """The record's text as the answer, what is said in the video beside the question; then a question a segment."""
    segments = sample.fields.get("segments") or ()
    if not isinstance(segments, tuple):  # of records in another format, in a form of their own
        segments = ()
    speech = sample.fields.get("speech")
    facts = {"segments": tuple(text for _, _, text in segments), **answer_facts(sample)}
    turns = with_prompt(sample.turns, prompt)
    if isinstance(speech, str) and speech:
        turns = _with_speech(turns, speech)
    spans_s = tuple((start_s, end_s) for start_s, end_s, _ in segments)
    made = [Conversation(sample.id, turns, sample.origin, facts=facts, spans_s=spans_s)]
    system = tuple(turn for turn in sample.turns if turn.role == "system")
    media = tuple(part for turn in sample.turns for part in turn.parts if isinstance(part, MediaRef))
    for number, (start_s, end_s, text) in enumerate(segments, 1):
        asked = Turn("user", (*media, f"What happens between {start_s:.1f} s and {end_s:.1f} s?"))
        told = (*system, asked, Turn("assistant", (text,)))
        made.append(Conversation(f"{sample.id}/{number}", told, sample.origin, spans_s=spans_s))
    return made


def _with_speech(turns: Sequence[Turn], speech: str) -> tuple[Turn, ...]:
    """The turns with what is said in the video behind the first question."""
    told = f"What is said: {speech}"
    for i, turn in enumerate(turns):
        if turn.role == "user":
            *before, last = turn.parts
            parts = (*before, f"{last}\n{told}") if isinstance(last, str) else (*turn.parts, told)
            return (*turns[:i], replace(turn, parts=parts), *turns[i + 1 :])
    return tuple(turns)


def texts_of(answers: Sequence[Answer]) -> tuple[list[str], list[tuple[str, ...]]]:
    """What was generated, and the references."""
    return [answer.text for answer in answers], [answer.question.references for answer in answers]


def samples_of(answers: Sequence[Answer]) -> Samples:
    """The answered questions as samples of a score; those about one video, whatever part of it, are drawn together."""
    questions = [answer.question for answer in answers]
    names = distinct(_name_of(question) for question in questions)
    return Samples(tuple(names), clusters_of([files_of(q.prompt.media) for q in questions]))


def _name_of(question: Question) -> str:
    """The same for the same media, prompt and right answers, whatever the order of records and options."""
    prompt = question.prompt
    turns = tuple((turn.role, turn.text) for turn in prompt.turns)
    content = prompt.media_key, turns, sorted(prompt.options), sorted(set(question.references))
    return digest(repr(content))


def files_of(media: Iterable[MediaRef]) -> tuple[str, ...]:
    """Their files, whatever is taken of each."""
    return tuple(str(file) for ref in media for file in ref.files)


def distinct(names: Iterable[str]) -> Iterator[str]:
    """The names; one that came before gets a number: `x`, `x#2`, ..."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


def answer_facts(sample: Sample) -> dict[str, tuple[str, ...]]:
    """`answers`, for a conversation's facts, where a record gives more than one."""
    answers = right_answers(sample)
    return {"answers": answers} if len(answers) > 1 else {}


def right_answers(sample: Sample) -> tuple[str, ...]:
    """Every right answer that a record gives for its last question: what is said there, then those that it lists
    (`answers`, `references`, or several under `answer` or `label`; `labels` beside `options`), each once; a number is
    its text."""
    said = [split_reasoning(turn.text)[1] for turn in sample.turns if turn.role == "assistant"][-1:]
    if not said:
        return ()
    lists = {key: sample.fields.get(key) for key in ANSWER_KEYS}
    if sample.fields.get("options"):  # else they are the options
        lists["labels"] = sample.fields.get("labels")
    listed = [
        one
        for key, some in lists.items()
        # Of a user's own record `labels` may mean something else.
        if isinstance(some, list) and (key in ("answers", "references") or said[0] in some)
        for one in (str(one) if type(one) in (int, float) else one for one in some)
        if isinstance(one, str) and one
    ]
    return tuple(dict.fromkeys([*said, *listed]))


def options_of(sample: Sample) -> tuple[str, ...]:
    """The closed set of answers that a record gives (`options`, or the `labels` of its set); empty where it gives none.

    UserError where the set holds the same answer twice, or not the record's own.
    """
    said, *more = right_answers(sample)
    options, labels = sample.fields.get("options") or (), sample.fields.get("labels")
    # Of a user's own record `labels` may mean something else: they are options where the answer is among them.
    if not options and (isinstance(labels, tuple) or (isinstance(labels, list) and said in labels)):
        options = labels
    if not options:
        return ()
    if not isinstance(options, list | tuple) or not all(isinstance(one, str) and one.strip() for one in options):
        raise UserError(f"{sample.origin}: options: {options!r:.60} must be a list of texts")
    missing = next((right for right in (said, *more) if right not in options), None)
    seen = {_as_read(option) for option in options}
    if missing is not None or len(seen) < len(options):
        alike = " (one differs from it in its form of Unicode, NFC or NFD, or in space around it: write both alike)"
        raise UserError(
            f"{sample.origin}: options: the answer {missing or said!r:.60} must be among {len(options)} different "
            f"options, word for word; they are {', '.join(options):.80}" + alike * (_as_read(missing or "") in seen)
        )
    if more and len(more) + 1 == len(options):
        raise UserError(
            f"{sample.origin}: all {len(options)} options are listed as right answers too; list the right ones alone"
        )
    return tuple(options)


def _as_read(text: str) -> str:
    """The same for texts between which a reader sees no difference."""
    return unicodedata.normalize("NFC", text).strip()


def groups_of(sample: Sample) -> dict[str, str]:
    """What a data set's scores are broken down by (`groups`), as texts."""
    groups = sample.fields.get("groups")
    return {str(key): str(value) for key, value in groups.items()} if isinstance(groups, dict) else {}
