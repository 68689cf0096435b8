"""What can't be trained on: each item with its reason, in `quarantine.jsonl`, and no more of them than is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vft.files import replace_text
from vft.types import UserError

MIN_BAD = 10
"""Bad items of a stream before their share is looked at: the first few say little."""


@dataclass(frozen=True, slots=True)
class BadItem:
    """Something that can't be trained on, as `quarantine.jsonl` records it."""

    id: str
    path: str
    reason: str
    message: str

    @property
    def key(self) -> str:
        """What tells it from others: the medium, or the record where that is at fault."""
        return self.path or self.id

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps({"id": self.id, "path": self.path, "reason": self.reason, "message": self.message})


def check_bad(bad: Sequence[BadItem], total: int, limit: float) -> None:
    """UserError where the share of bad items is above `limit`: both numbers, counts by reason, the first message."""
    if total and len(bad) / total > limit:
        counts: dict[str, int] = {}
        for item in bad:
            counts[item.reason] = counts.get(item.reason, 0) + 1
        by_reason = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        raise UserError(
            f"{bad[0].message} [{len(bad)} of {total} samples can't be used ({by_reason}), more than "
            f"data.max_bad_fraction = {limit}]"
        )


def check_bad_of_stream(bad: Sequence[BadItem], trained: int, limit: float) -> None:
    """`check_bad` where nobody knows how many samples there are: of `trained` and the bad ones among them."""
    if len(bad) >= MIN_BAD:
        check_bad(bad, trained + len(bad), limit)


def write_quarantine(folder: Path, items: Iterable[BadItem]) -> None:
    """Replace `quarantine.jsonl`."""
    replace_text(folder / "quarantine.jsonl", "".join(item.line() + "\n" for item in items))
