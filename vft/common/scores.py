"""A score with its interval, and the samples that it was taken on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Samples:
    """Which samples a score was taken on."""

    names: tuple[str, ...]
    """One for each, all different; the same sample has the same name in another evaluation."""
    clusters: tuple[int, ...]
    """Samples with equal numbers are drawn together."""

    @staticmethod
    def apart(count: int) -> Samples:
        """`count` samples that are independent of one another."""
        return Samples(tuple(map(str, range(count))), tuple(range(count)))


@dataclass(frozen=True, eq=False)
class Parts:
    """What a score is made of: a row for each sample, and what rows that count more than once, or not at all, give."""

    samples: Samples
    kind: str
    """A key of KINDS."""
    table: Floats
    """[samples, columns]."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A score and the ends of its confidence interval, in the score's own units."""

    value: float
    """The score on the samples as they are."""
    low: float
    high: float
    parts: Parts | None = field(default=None, compare=False, repr=False)
    """What it was computed from, where it can be compared with another's."""
    tokenization: str = ""
    """How the texts were cut, for a score of texts: sacrebleu's name, or what the metric says."""

    @classmethod
    def point(cls, value: float) -> Interval:
        """A value without an interval."""
        return cls(value, value, value)

    @property
    def how_cut(self) -> str:
        """`tokenization` to stand behind the score: ` (zh)`, nothing where it isn't one of texts."""
        return f" ({self.tokenization})" if self.tokenization else ""

    def cut_by(self, tokenizers: Iterable[str]) -> Interval:
        """The same score with the names of the tokenizers of its texts, the most frequent first: `13a+zh`."""
        return replace(self, tokenization="+".join(name for name, _ in Counter(tokenizers).most_common()))


def clusters_of(items: Sequence[Iterable[Hashable]]) -> tuple[int, ...]:
    """A number for each sample, equal for samples that share an item (a video), directly or through others.

    A sample without items shares none.
    """
    parent = list(range(len(items)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[Hashable, int] = {}
    for number, own in enumerate(items):
        for item in own:
            parent[root(number)] = root(first.setdefault(item, number))
    return tuple(root(number) for number in range(len(items)))
