"""The prompts and system texts of the training records, which a trained model knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vft.common.types import Conversation, MediaRef


@dataclass
class PromptCounts:
    """Counts of the first questions and system texts of the conversations that were trained on."""

    prompts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Text before and after the first medium of the first user turn."""
    systems: Counter[str | None] = field(default_factory=Counter)
    """None: no system turn. A template may add one."""

    def add(self, conversations: Iterable[Conversation]) -> None:
        """Count conversations, without text that depends on frames (times, subtitles): that belongs to the video."""
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

    def update(self, other: PromptCounts) -> None:
        """Add another process's counts."""
        self.prompts.update(other.prompts)
        self.systems.update(other.systems)

    def facts(self) -> dict[str, Any]:
        """For vft.json: the most frequent prompt (with the text before the media) and system text, the fraction of
        samples that had it, and how many others there were. Empty if nothing was counted."""
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
