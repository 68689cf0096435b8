"""Text that depends on which frames are sampled: their times, and the subtitles (SubRip files, .srt) shown at them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vft.common.errors import UserError
from vft.common.types import Conversation, MediaPlan, MediaRef, PlannedText

Line = tuple[float, float, str]
"""When the line appears and disappears, in seconds from the start of the video; and its text, on one line."""

HEADING = "This video's subtitles are listed below:"
"""The words of Video-MME's official evaluation."""
EXAMPLE = "00:00:01,000 --> 00:00:02,500"

_TIME = r"(?:([0-9]{1,4}):)?([0-9]{1,2}):([0-9]{1,2})[,.]([0-9]{1,3})"
_TIMES = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_LOOKS_TIMED = re.compile(r".*-->|\s*[0-9]+:[0-9]+:[0-9]+[,.][0-9]")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|\{\\[^{}]*\}")
_NUMBER = re.compile(r"\s*[0-9]+\s*")


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """How long a video is and when its frames were taken, to a tenth of a second."""

    medium: int
    """Its number among the conversation's media."""

    def resolve(self, plans: Sequence[MediaPlan]) -> str:
        """One line with times from the start of the video."""
        plan = plans[self.medium]
        times = ", ".join(f"{time_s:.1f}" for time_s in plan.frame_times_s)
        return f"A video of {plan.info.duration_s:.1f} s, seen at {times} s:\n"


def with_frame_times(conversation: Conversation) -> Conversation:
    """The conversation with a line of `FrameTimes` before each video."""
    number, turns = 0, []
    for turn in conversation.turns:
        parts: list[str | MediaRef | PlannedText] = []
        for part in turn.parts:
            if isinstance(part, MediaRef):
                parts += [FrameTimes(number)] if part.kind == "video" else []
                number += 1
            parts.append(part)
        turns.append(replace(turn, parts=tuple(parts)))
    return replace(conversation, turns=tuple(turns))


@dataclass(frozen=True, slots=True)
class Subtitles:
    """A `PlannedText`: the `lines` that are on screen at the time of a sampled frame."""

    lines: tuple[Line, ...]
    media: int = 0
    """Number of the video among the conversation's media."""

    def resolve(self, plans: Sequence[MediaPlan]) -> str:
        """The heading and the lines, each on a line of its own; empty if there are none.

        A line is on screen from its start up to, but not at, its end, as in the official evaluation.
        """
        times_s = [*sorted(plans[self.media].frame_times_s), float("inf")]
        shown = [text for start, end, text in self.lines if times_s[bisect_left(times_s, start)] < end]
        return "".join(f"{line}\n" for line in (HEADING, *shown)) if shown else ""


def parse_srt(text: str, name: str) -> tuple[Line, ...]:
    """The subtitles in the text of an .srt file, in the file's order, without tags (`<i>`, `<font ...>`, `{\\an8}`).

    Numbers and blank lines may be missing or superfluous: the lines between two time lines belong to the first one.

    Raises:
        UserError: a malformed time line, or none at all; names the file as `name`, and the line.
    """
    subtitles: list[tuple[float, float, list[str]]] = []
    block: list[str] = []
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not _LOOKS_TIMED.match(line):
            block.append(line)
            continue
        match = _TIMES.fullmatch(line)
        if match is None:
            raise UserError(f"{name}:{number}: {line.strip()[:60]!r} must be times, as in {EXAMPLE!r}")
        _drop_number(block)
        block = []
        subtitles.append((_seconds(match.groups()[:4]), _seconds(match.groups()[4:]), block))
    if not subtitles and text.strip("\ufeff \r\n\t"):
        raise UserError(f"{name}:1: no time lines, such as {EXAMPLE!r}; give an .srt file")
    lines = ((start, end, " ".join(_TAG.sub("", " ".join(block)).split())) for start, end, block in subtitles)
    return tuple(line for line in lines if line[2])


def _drop_number(block: list[str]) -> None:
    """Remove the next subtitle's number from the end of the lines before its time line."""
    is_adjacent = bool(block) and bool(block[-1].strip())
    while block and not block[-1].strip():
        block.pop()
    # A text may be a number too: it comes directly after its time line or another text, and a blank line follows.
    if block and _NUMBER.fullmatch(block[-1]) and (is_adjacent or (len(block) > 1 and not block[-2].strip())):
        block.pop()


def _seconds(parts: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = (part or "0" for part in parts)
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}")
