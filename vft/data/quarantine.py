"""What can't be trained on: each item with its reason, in `quarantine.jsonl`, and no more of them than is allowed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vft.common.errors import UserError
from vft.common.files import replace_text

MIN_BAD = 10
"""Bad items of a stream before their share is looked at: the first few say little."""
NAMED = 3
"""Kinds of trouble that a message gives an example of."""


@dataclass(frozen=True, slots=True)
class BadItem:
    """Something that can't be trained on, as `quarantine.jsonl` records it."""

    id: str
    path: str
    reason: str
    message: str
    samples: int = 1
    """How many samples are lost by it; 0 of an archive, which `Encountered` weighs."""
    source: str = ""
    """`path` of the source that it came out of as a stream; archives of two sources may have the same names."""

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from others: the medium, or the record where that is at fault."""
        return self.source, self.path or self.id

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps({"id": self.id, "path": self.path, "reason": self.reason, "message": self.message})


@dataclass(frozen=True, slots=True)
class ArchivePass:
    """One slot has come to the end of an archive that it began to read at its start."""

    samples: int
    """Found there, bad ones included; where several slots share the archive, those of this slot's part."""
    damaged: bool
    """The archive ended before its time."""


@dataclass
class Encountered:
    """What the streams of a run have come across, counted every time, as are the samples that are trained on: so their
    ratio is that of one epoch, whichever epoch it is."""

    items: int = 0
    """Bad media, records and archives."""
    samples: dict[str, int] = field(default_factory=dict)
    """Bad samples, by reason."""
    whole: int = 0
    """Undamaged archives that were read to their end; below, the samples found in them."""
    whole_samples: int = 0
    damaged: int = 0
    damaged_samples: int = 0

    def add(self, bad: Iterable[BadItem], archives: Iterable[ArchivePass]) -> None:
        """Count one step's."""
        for item in bad:
            if item.samples:
                self.items += 1
                self.samples[item.reason] = self.samples.get(item.reason, 0) + item.samples
        for one in archives:
            if one.damaged:
                self.items += 1
                self.damaged += 1
                self.damaged_samples += one.samples
            else:
                self.whole += 1
                self.whole_samples += one.samples

    def lost(self) -> dict[str, int]:
        """Bad samples by reason. Behind the damage in an archive as many are taken to lie as it is short of an
        undamaged one; at least one."""
        counts = dict(self.samples)
        if self.damaged:
            usual = self.whole_samples / self.whole if self.whole else 0.0
            counts["archive"] = max(self.damaged, round(self.damaged * usual) - self.damaged_samples)
        return counts


def check_bad(bad: Sequence[BadItem], total: int, limit: float) -> None:
    """UserError where the share of bad samples is above `limit`: both numbers, counts by reason, the first message."""
    counts: Counter[str] = Counter()
    for item in bad:
        counts[item.reason] += item.samples
    if bad:
        _check_share(bad[0].message, counts, total, limit)


def check_bad_of_stream(seen: Encountered, first: BadItem, trained: int, passes: int, limit: float) -> None:
    """`check_bad` where nobody knows how many samples there are: of `trained` and the bad ones among them.

    Ten bad items are enough to tell, or an epoch, which are `passes` through archives.
    """
    counts = seen.lost()
    if seen.items >= MIN_BAD or seen.whole + seen.damaged >= passes:
        _check_share(first.message, counts, trained + sum(counts.values()), limit)


def _check_share(message: str, counts: Mapping[str, int], total: int, limit: float) -> None:
    count = sum(counts.values())
    if total and count / total > limit:
        by_reason = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        raise UserError(
            f"{message} [{count} of {total} samples can't be used ({by_reason}), more than "
            f"data.max_bad_fraction = {limit}]"
        )


def by_kind(bad: Iterable[BadItem]) -> str:
    """What is wrong with items, each kind with its number and an example, the most frequent first; one line."""
    kinds: dict[str, list[BadItem]] = {}
    for item in bad:
        # Of records the reason alone says nothing; what they lack stands before the semicolon.
        what = item.message.removeprefix(f"{item.id}: ").partition(";")[0] if item.reason == "record" else item.reason
        kinds.setdefault(what, []).append(item)
    sizes = {what: sum(item.samples for item in items) for what, items in kinds.items()}
    total = sum(sizes.values())
    things = sum(item.reason != "archive" for items in kinds.values() for item in items)
    unit = "clips" if things == total else "samples"
    order = sorted(kinds, key=lambda what: -sizes[what])
    told = []
    for what in order[:NAMED]:
        first = kinds[what][0]
        count = f"{sizes[what]} of {total} {unit}"
        if first.reason == "archive":
            count = f"{len(kinds[what])} archive(s)"
        own = first.message.removeprefix(f"{first.id}: ")
        told.append(f"{count}: {own}" + ("" if own == first.message else f" ({first.id})"))
    if order[NAMED:]:
        told.append(f"{sum(len(kinds[what]) for what in order[NAMED:])} others")
    return "; and ".join(told)


def write_quarantine(folder: Path, items: Iterable[BadItem]) -> None:
    """Replace `quarantine.jsonl`."""
    replace_text(folder / "quarantine.jsonl", "".join(item.line() + "\n" for item in items))
