"""Samples that cannot be used, with a reason for each in `quarantine.jsonl`, and the limit on how many there may be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vft.common.errors import UserError, missing
from vft.common.files import replace_text
from vft.common.types import Document

MIN_BAD = 10
"""Bad items of a stream before their fraction is checked: the first few say little."""
MAX_NAMED = 3
"""Kinds of trouble that a message gives an example of."""
MAX_KNOWN = 10_000
"""Bad items of streams that are stored one by one. A stream has no end, so further ones are only counted."""


@dataclass(frozen=True, slots=True)
class BadItem:
    """Something that cannot be used, as `quarantine.jsonl` records it."""

    id: str
    path: str
    reason: str
    message: str
    samples: int = 1
    """How many samples are lost by it; 0 for an archive, which `Encountered` weighs."""
    source: str = ""
    """`path` of the streaming source that it comes from. Archives of two sources may have the same names."""

    @property
    def key(self) -> tuple[str, str]:
        """Identifies it: the medium, or the record if that is at fault."""
        return self.source, self.path or self.id

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps({"id": self.id, "path": self.path, "reason": self.reason, "message": self.message})


@dataclass(frozen=True, slots=True)
class ArchivePass:
    """A slot has reached the end of an archive that it read from the start."""

    samples: int
    """Samples in it, bad ones included; if several slots share the archive, those of this slot's part."""
    damaged: bool
    """The archive ended early."""


@dataclass
class Encountered:
    """What the streams of a run have come across, counted every time. Good samples are counted every time they are
    trained on too, so their ratio is that of one epoch at any time."""

    items: int = 0
    """Bad media, records and archives."""
    samples: dict[str, int] = field(default_factory=dict)
    """Bad samples, by reason."""
    whole: int = 0
    """Undamaged archives that were read to their end, with the samples in them."""
    whole_samples: int = 0
    damaged: int = 0
    damaged_samples: int = 0

    def add(self, bad: Iterable[BadItem], archives: Iterable[ArchivePass]) -> None:
        """Count the items and archives of one step."""
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
        """Bad samples by reason. A damaged archive is taken to have lost what it is short of an undamaged one, and at
        least one sample."""
        counts = dict(self.samples)
        if self.damaged:
            usual = self.whole_samples / self.whole if self.whole else 0.0
            counts["archive"] = max(self.damaged, round(self.damaged * usual) - self.damaged_samples)
        return counts


@dataclass
class LoadReport:
    """What a process has met besides good documents since the reports were last merged."""

    bad: list[BadItem] = field(default_factory=list)
    """Items of streams each time they are met, those of the index once."""
    archives: list[ArchivePass] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Lines for the user."""
    exhausted: list[str] = field(default_factory=list)
    """Paths of streaming sources that have no document for a row."""

    def __len__(self) -> int:
        return len(self.bad) + len(self.archives) + len(self.notes) + len(self.exhausted)


class BadItemLog:
    """The bad items of a run, known to all processes alike once their reports are merged."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], BadItem] = {}
        """By key: what has failed so far, in this run and before it was resumed."""
        self.encountered = Encountered()
        """By the streams of all processes."""
        self.report = LoadReport()
        """By this process alone."""
        self._agreed: frozenset[tuple[str, str]] = frozenset()

    def restore(self, items: Iterable[BadItem], encountered: Encountered) -> None:
        """Continue from what an earlier run knew, beside what this one has found before."""
        self.known |= {item.key: item for item in items}
        self.encountered = encountered
        self.begin_step()

    def begin_step(self) -> None:
        """From now on `agreed` uses what all processes know. What one finds during a step counts from the next on."""
        self._agreed = frozenset(self.known)

    @property
    def agreed_keys(self) -> frozenset[tuple[str, str]]:
        """Keys of what all processes knew of when the step began."""
        return self._agreed

    def agreed(self, document: Document, source: str) -> BadItem | None:
        """A bad medium of the document that all processes knew of when the step began."""
        keys = ((source, plan.ref.name) for plan in document.media)
        return next((self.known[key] for key in keys if key in self._agreed), None)

    def add(self, failed: Sequence[BadItem]) -> None:
        """Report media that could not be decoded, those of the index once."""
        reported = {item.key for item in self.report.bad} | self.known.keys()
        self.report.bad += (item for item in failed if item.source or item.key not in reported)

    def merge(self, reports: Sequence[LoadReport]) -> list[BadItem]:
        """Make known what all processes report, and return the items that are new. Every process calls it alike."""
        new = []
        for item in (item for report in reports for item in report.bad):
            if item.key not in self.known and (not item.source or len(self.known) < MAX_KNOWN):
                self.known[item.key] = item
                new.append(item)
        for report in reports:
            self.encountered.add(report.bad, report.archives)
        self.report = LoadReport()
        return new

    def check_streams(self, trained: int, passes: int, limit: float) -> None:
        """`check_bad` if nobody knows how many samples there are: of the `trained` ones and the bad ones among them.

        It takes ten bad items before it judges, or an epoch, which is `passes` passes through archives.
        """
        seen, counts = self.encountered, self.encountered.lost()
        if self.known and (seen.items >= MIN_BAD or seen.whole + seen.damaged >= passes):
            first = next(iter(self.known.values()))
            _check_fraction(first.message, counts, trained + sum(counts.values()), limit)


def check_bad(bad: Sequence[BadItem], total: int, limit: float) -> None:
    """UserError if the fraction of bad samples is above `limit`: both numbers, counts by reason, the first message."""
    counts: Counter[str] = Counter()
    for item in bad:
        counts[item.reason] += item.samples
    if bad:
        near = missing(bad[0].path, "file") if bad[0].reason == "missing" else ""
        _, meant, name = near.partition("; did you mean ")
        _check_fraction(bad[0].message + meant + name, counts, total, limit)


def _check_fraction(message: str, counts: Mapping[str, int], total: int, limit: float) -> None:
    count = sum(counts.values())
    if total and count / total > limit:
        by_reason = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        raise UserError(
            f"{message} [{count} of {total} samples can't be used ({by_reason}), more than "
            f"data.max_bad_fraction = {limit}]"
        )


def by_kind(bad: Iterable[BadItem]) -> str:
    """One line about what is wrong with the items: each kind with its count and an example, the most frequent first."""
    kinds: dict[str, list[BadItem]] = {}
    for item in bad:
        # For records the reason alone says nothing: what they lack stands before the semicolon of the message.
        what = item.message.removeprefix(f"{item.id}: ").partition(";")[0] if item.reason == "record" else item.reason
        kinds.setdefault(what, []).append(item)
    sizes = {what: sum(item.samples for item in items) for what, items in kinds.items()}
    total = sum(sizes.values())
    num_clips = sum(item.reason != "archive" for items in kinds.values() for item in items)
    unit = "clips" if num_clips == total else "samples"
    order = sorted(kinds, key=lambda what: -sizes[what])
    parts = []
    for what in order[:MAX_NAMED]:
        first = kinds[what][0]
        count = f"{sizes[what]} of {total} {unit}"
        if first.reason == "archive":
            count = f"{len(kinds[what])} archive(s)"
        own = first.message.removeprefix(f"{first.id}: ")
        parts.append(f"{count}: {own}" + ("" if own == first.message else f" ({first.id})"))
    if order[MAX_NAMED:]:
        parts.append(f"{sum(len(kinds[what]) for what in order[MAX_NAMED:])} others")
    return "; and ".join(parts)


def write_quarantine(folder: Path, items: Iterable[BadItem]) -> None:
    """Replace `quarantine.jsonl`."""
    replace_text(folder / "quarantine.jsonl", "".join(item.line() + "\n" for item in items))
