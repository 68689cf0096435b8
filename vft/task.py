"""What distinguishes one recipe from another: how a sample becomes conversations, and how answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from vft.metrics import Interval
from vft.types import Conversation, MediaRef, Sample, Turn, UserError


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
    """Generated."""
    option_scores: tuple[float, ...] = ()
    """Log-likelihood, a token on average, of each of the question's options."""

    @property
    def choice(self) -> int | None:
        """Number of the likeliest option; None where the question has none."""
        if not self.option_scores:
            return None
        return max(range(len(self.option_scores)), key=self.option_scores.__getitem__)


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


def with_prompt(turns: Sequence[Turn], prompt: str) -> tuple[Turn, ...]:
    """The turns with `prompt` as the text of the first user's turn, where that holds media alone."""
    for i, turn in enumerate(turns):
        if turn.role == "user":
            if all(not isinstance(part, str) or not part.strip() for part in turn.parts):
                turn = replace(turn, parts=(*(part for part in turn.parts if not isinstance(part, str)), prompt))
            return (*turns[:i], turn, *turns[i + 1 :])
    return tuple(turns)


def asking(task: Task, prompt: str) -> Task:
    """The task with another prompt; with its own where `prompt` is empty."""
    return replace(cast(Any, task), prompt=prompt) if prompt else task


def narrate(sample: Sample, prompt: str) -> list[Conversation]:
    """The record's text as the answer, what is said in the video beside the question; then a question a segment."""
    segments = sample.fields.get("segments") or ()
    if not isinstance(segments, tuple):  # of records in another format, in a form of their own
        segments = ()
    speech = sample.fields.get("speech")
    facts = {"segments": tuple(text for _, _, text in segments)}
    turns = with_prompt(sample.turns, f"{prompt}\nWhat is said: {speech}" if speech else prompt)
    made = [Conversation(sample.id, turns, sample.origin, facts=facts)]
    media = tuple(part for turn in sample.turns for part in turn.parts if isinstance(part, MediaRef))
    for number, (start_s, end_s, text) in enumerate(segments, 1):
        asked = Turn("user", (*media, f"What happens between {start_s:.1f} s and {end_s:.1f} s?"))
        made.append(Conversation(f"{sample.id}/{number}", (asked, Turn("assistant", (text,))), sample.origin))
    return made


def texts_of(answers: Sequence[Answer]) -> tuple[list[str], list[tuple[str, ...]]]:
    """What was generated, and the references."""
    return [answer.text for answer in answers], [answer.question.references for answer in answers]


def options_of(sample: Sample) -> tuple[str, ...]:
    """The closed set of answers that a record gives (`options`, or the `labels` of its set); empty where it gives none.

    UserError where the set holds the same answer twice, or not the record's own.
    """
    right = [turn.text for turn in sample.turns if turn.role == "assistant"][-1]
    options, labels = sample.fields.get("options") or (), sample.fields.get("labels")
    # Of a user's own record `labels` may mean something else: they are options where the answer is among them.
    if not options and (isinstance(labels, tuple) or (isinstance(labels, list) and right in labels)):
        options = labels
    if not options:
        return ()
    if not isinstance(options, list | tuple) or not all(isinstance(one, str) and one for one in options):
        raise UserError(f"{sample.origin}: options: {options!r:.60} must be a list of texts")
    if right not in options or len(set(options)) < len(options):
        raise UserError(
            f"{sample.origin}: options: the answer {right!r:.60} must be among {len(options)} different options, "
            f"word for word; they are {', '.join(options):.80}"
        )
    return tuple(options)


def groups_of(sample: Sample) -> dict[str, str]:
    """What a data set's scores are broken down by (`groups`), as texts."""
    groups = sample.fields.get("groups")
    return {str(key): str(value) for key, value in groups.items()} if isinstance(groups, dict) else {}
