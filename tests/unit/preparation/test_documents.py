"""What is said about the samples of a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vft.common.types import Conversation, Turn
from vft.data.dataset import prompts_of
from vft.preparation.documents import report_classes


def samples(labels: tuple[str, ...], answers: Sequence[str], question: str = "Which?") -> Any:
    """A data set, as far as it is read here: a sample for each answer."""
    asked = Turn("user", (question,))
    made = [Conversation(text, (asked, Turn("assistant", (text,))), text, labels) for text in answers]
    return SimpleNamespace(conversations=made, num_samples=len(made), prompts=prompts_of(made))


def test_classes_that_are_not_learnt_or_scored_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    labels = ("up", "down", "none", "Up")
    report_classes(samples(labels, ["up", "up", "down", "Up"]), samples(labels, ["up", "none"]))
    assert caplog.messages == [
        "classes (4), samples + held out: Up 1 + 0, down 1 + 0, none 0 + 1, up 2 + 1",
        "classes without a sample to train on: 'none'",
        "classes without a held-out sample, or a score: 'Up', 'down'",
        "classes that differ in case alone: 'Up', 'up'",
    ]


def test_texts_and_options_of_their_own_are_no_classes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    report_classes(samples((), ["a text", "another"]), None)
    mixed = samples(("a", "b"), ["a"])
    mixed.prompts += samples(("a", "c"), ["c"]).prompts
    report_classes(mixed, None)
    mixed = samples(("A", "B"), ["A", "B"])  # multiple choice: the letters mean something else in each question
    mixed.prompts += samples(("A", "B"), ["B"], "Who?").prompts
    report_classes(mixed, None)
    assert not caplog.messages
    report_classes(samples(("a",), ["a"]), None)
    assert caplog.messages == ["classes (1), samples: a 1", "the only class, so there is nothing to tell apart: 'a'"]
