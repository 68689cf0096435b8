"""A score with its confidence interval, and the samples that it was computed from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a score."""

    names: tuple[str, ...]
    """All different. A sample has the same name in every evaluation."""
    clusters: tuple[int, ...]
    """The bootstrap draws samples with equal numbers together."""

    @staticmethod
    def apart(count: int) -> Samples:
        """`count` independent samples."""
        return Samples(tuple(map(str, range(count))), tuple(range(count)))


@dataclass(frozen=True, eq=False)
class Parts:
    """What a score is computed from, so that the bootstrap can compute it again from resampled rows."""

    samples: Samples
    kind: str
    """How the rows make the score: a key of `metrics.bootstrap.KINDS`."""
    table: Floats
    """A row for each sample: [samples, columns]."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A score and its confidence interval, in the units of the score."""

    value: float
    """The score of all samples."""
    low: float
    high: float
    parts: Parts | None = field(default=None, compare=False, repr=False)
    """What it was computed from; needed to compare it with another score."""
    tokenization: str = ""
    """For a score of texts, how they were cut into words: a tokenizer's name in sacrebleu, or the metric's own."""

    @classmethod
    def point(cls, value: float) -> Interval:
        """A value without an interval."""
        return cls(value, value, value)

    @property
    def how_cut(self) -> str:
        """`tokenization` to follow the score: ` (zh)`; empty for scores of other things than texts."""
        return f" ({self.tokenization})" if self.tokenization else ""

    def cut_by(self, tokenizers: Iterable[str]) -> Interval:
        """The same score with the names of its tokenizers, the most frequent first: `13a+zh`."""
        return replace(self, tokenization="+".join(name for name, _ in Counter(tokenizers).most_common()))


def clusters_of(items: Sequence[Iterable[Hashable]]) -> tuple[int, ...]:
    """A cluster number for each sample, equal for samples that share an item (a video), directly or through others.

    A sample without items is a cluster of its own.
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
