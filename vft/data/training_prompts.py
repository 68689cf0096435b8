"""What the records of a training asked: the prompts and system texts that the model knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vft.common.types import Conversation, MediaRef


@dataclass
class Asked:
    """Counts of first questions and system texts, as they stood in the conversations that were trained on."""

    prompts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Text before the media of the first user's turn, and behind it."""
    systems: Counter[str | None] = field(default_factory=Counter)
    """None: no system turn, which a template may fill in."""

    def add(self, conversations: Iterable[Conversation]) -> None:
        """Count some more. What is planned text (times, subtitles) belongs to its video, not to the question."""
        for one in conversations:
            first = next((turn for turn in one.turns if turn.role == "user"), None)
            if first is None or one.is_part:
                continue
            media = [place for place, part in enumerate(first.parts) if isinstance(part, MediaRef)]
            start = media[0] if media else 0
            before, behind = (
                "".join(part for part in parts if isinstance(part, str))
                for parts in (first.parts[:start], first.parts[start:])
            )
            self.prompts[before, behind] += 1
            self.systems[next((turn.text for turn in one.turns if turn.role == "system"), None)] += 1

    def update(self, other: Asked) -> None:
        """Add another process's counts."""
        self.prompts.update(other.prompts)
        self.systems.update(other.systems)

    def facts(self) -> dict[str, Any]:
        """For vft.json: the most frequent of each (`prompt` with what stands before the media, `system`), how many of
        the samples had it, and how many others there were. Empty where nothing was counted."""
        if not self.prompts:
            return {}
        (((before, prompt), count),) = self.prompts.most_common(1)
        ((system, of_system),) = self.systems.most_common(1)
        return {
            "prompt": prompt,
            "prompt_before_media": before,
            "prompt_share": count / self.prompts.total(),
            "other_prompts": len(self.prompts) - 1,
            "system": system,
            "system_share": of_system / self.systems.total(),
            "other_systems": len(self.systems) - 1,
        }
