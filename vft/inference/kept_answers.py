"""Answers of a long evaluation as they come, so that the same command goes on where it was interrupted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vft.common.files import append_text, digest, replace_text
from vft.common.task import Answer, Question
from vft.distributed.process_group import World, all_of
from vft.inference.engine import Failure

logger = logging.getLogger(__name__)
FIELDS = ("text", "option_scores", "option_scores_norm", "reasoning", "is_cut_off")
"""What a line holds of an answer."""


class KeptAnswers:
    """A file whose first line identifies what the answers depend on; the others are answers, in the order of the
    questions."""

    def __init__(self, file: Path, depends_on: str, world: World) -> None:
        self.file, self.head, self.world = file, json.dumps({"of": digest(depends_on)}), world

    def known(self, questions: Sequence[Question]) -> list[Answer | Failure]:
        """What the first questions were answered. Every process must call it; the file of the first one counts."""
        lines: list[dict[str, Any]] = []
        if self.world.is_main:
            lines = list(self._lines())[: len(questions)]
            text = "\n".join([self.head, *map(json.dumps, lines), ""])
            replace_text(self.file, text)  # without what was cut off, or belongs to other settings
            if lines:
                logger.info("%s: %d of %d questions answered before", self.file, len(lines), len(questions))
        return [
            Failure(**line["failure"]) if "failure" in line else Answer(question, **line)
            for question, line in zip(questions, all_of(lines)[0], strict=False)
        ]

    def add(self, result: Answer | Failure) -> None:
        """Add an answer; it is in the operating system's hands when this returns."""
        if self.world.is_main:
            line = {name: getattr(result, name) for name in FIELDS} if isinstance(result, Answer) else None
            append_text(self.file, json.dumps(line or {"failure": asdict(result)}) + "\n")

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            head, *lines = self.file.read_bytes().decode("utf-8", errors="replace").split("\n")
        except (FileNotFoundError, ValueError):
            return
        if head != self.head:
            logger.info("%s: answered with other settings, questions or weights; asked again", self.file)
            return
        for text in lines:
            try:
                line = json.loads(text)
            except ValueError:  # a killed process left it unfinished
                return
            for name in FIELDS[1:3]:
                line |= {name: tuple(line[name])} if name in line else {}
            yield line
