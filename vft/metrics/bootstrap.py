"""How far a score may be off, given the samples it was taken on: confidence intervals by the bootstrap.

Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval); for BLEU and for
paired comparison Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004. Samples are
drawn with replacement, as many as there are, and the score is taken anew; the interval spans the middle of what comes
out. It speaks of the choice of samples alone, not of the seed of a training run, and is too narrow for a few samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from vft.metrics.text import bleu4

_MAX_VALUES = 1 << 20
"""Values held at a time, 8 bytes each, or one resample's where that is more."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A score and the ends of its confidence interval, in the score's own units."""

    value: float
    """The score on the samples as they are."""
    low: float
    high: float


def mean_interval(scores: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of `scores` and its percentile bootstrap interval.

    The same for the same arguments. With one score, all three are that score. Raises ValueError for no scores, or
    scores that are not finite.
    """
    if not scores:
        raise ValueError("no scores to average")
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"score {i} is {score}: needs a finite number")
    column = np.asarray(scores, dtype=np.float64)[:, None]
    sums = np.concatenate(list(_resampled_sums(column, resamples, seed)))
    return _percentile(fmean(scores), sums[:, 0] / len(scores), confidence)


def bleu4_interval(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`bleu4` of the whole set, 0 to 100, and its percentile bootstrap interval.

    BLEU is no mean over predictions: their n-gram counts and lengths are resampled, and it is computed from the sums.
    Raises UserError without the extra `eval`, ValueError as `bleu4` does.
    """
    value = bleu4(predictions, references)  # First, for it checks the texts, and whether sacrebleu is there.
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    rows = []
    for text, refs in zip(predictions, references, strict=True):
        parts = metric.corpus_score([text], [[ref] for ref in refs])
        rows.append([*parts.counts, *parts.totals, parts.sys_len, parts.ref_len])
    table = np.asarray(rows, dtype=np.float64)  # Sums of counts stay exact up to 2**53.
    size = len(parts.counts)
    scores = []
    for sums in _resampled_sums(table, resamples, seed):
        for row in sums.astype(np.int64).tolist():
            counts, totals = row[:size], row[size : 2 * size]
            scores.append(BLEU.compute_bleu(counts, totals, row[-2], row[-1], smooth_method="exp").score)
    return _percentile(value, np.asarray(scores), confidence)


def _resampled_sums(table: NDArray[np.float64], resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Sums of rows drawn from `table` [samples, columns]; blocks of [some, columns], `resamples` rows in all."""
    assert resamples > 0, resamples
    generator = np.random.default_rng(seed)
    block = max(1, _MAX_VALUES // table.size)
    for start in range(0, resamples, block):
        drawn = generator.integers(len(table), size=(min(block, resamples - start), len(table)))
        yield table[drawn].sum(axis=1)


def _percentile(value: float, resampled: NDArray[np.float64], confidence: float) -> Interval:
    assert 0 < confidence < 1, confidence
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))
