"""The times of a video's frames as text before it, for models without a notion of time and for very long videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vft.common.types import Conversation, MediaPlan, MediaRef, PlannedText


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
