"""How far a score may be off, given the samples it was taken on: confidence intervals by the bootstrap.

Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval) and section 8.3
(what depends on one another is drawn together); for BLEU and for paired comparison Koehn, "Statistical Significance
Tests for Machine Translation Evaluation", EMNLP 2004. Clusters of samples (the questions about one video) are drawn
with replacement, as many as there are, and the score is taken anew; the interval spans the middle of what comes out.
It speaks of the choice of samples alone, not of the seed of a training run, and is too narrow for a few clusters.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from vft.common.scores import Floats, Interval, Parts, Samples
from vft.metrics.text import cider_d_scores, rouge_l_scores
from vft.metrics.words import (
    Japanese,
    bleu_tokenizer,
    characters,
    checked_pairs,
    mecab,
    optional_module,
    rouge_l_tokenizer,
    word_tokenizer,
)

_CONFIDENCE, _RESAMPLES, _SEED = 0.95, 2000, 0
_MAX_VALUES = 1 << 19
"""Values held at a time, 8 bytes each, or one resample's where that is more."""


def mean_interval(scores: Sequence[float], samples: Samples | None = None) -> Interval:
    """The mean of `scores` and its percentile bootstrap interval; without `samples` each score stands alone.

    The same for the same arguments. With one score, all three are that score. Raises ValueError for no scores, or
    scores that are not finite.
    """
    if not scores:
        raise ValueError("no scores to average")
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"score {i} is {score}: needs a finite number")
    return table_interval("ratio", [(score, 1.0) for score in scores], samples, fmean(scores))


def ratio_interval(sums: Sequence[tuple[float, float]], samples: Samples | None = None) -> Interval:
    """All first numbers over all second ones (the losses and the tokens of documents), and its bootstrap interval.

    ValueError where the second ones come to nothing.
    """
    above, below = (math.fsum(pair[i] for pair in sums) for i in (0, 1))
    if not below > 0:
        raise ValueError(f"{above} over {below}: nothing to divide by")
    return table_interval("ratio", sums, samples, above / below)


def class_mean_interval(correct: Sequence[float], classes: Sequence[str], samples: Samples | None = None) -> Interval:
    """The mean over classes of each one's mean of `correct`; a class that a resample lacks doesn't count in it."""
    number = {name: i for i, name in enumerate(sorted(set(classes)))}
    table = [(float(score), float(number[name])) for score, name in zip(correct, classes, strict=True)]
    return table_interval("class mean", table, samples)


def bleu4_interval(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    samples: Samples | None = None,
    japanese: Japanese = "char",
) -> Interval:
    """Corpus BLEU of n-grams up to 4, 0 to 100, as sacrebleu computes it by default, its percentile bootstrap interval,
    and how the texts were cut.

    Case counts, smoothing is exponential. Predictions may have different numbers of references, and each is cut as its
    references are: by sacrebleu's `13a`; Chinese by its `zh`; Japanese, Thai, Lao, Khmer and Burmese by characters with
    their marks (`char`, which cuts marks off and Latin words up too), or Japanese by its `ja-mecab`. Texts are composed
    (NFC) first. BLEU is no mean over predictions: their n-gram counts and lengths are resampled, and it is computed
    from the sums.

    Raises UserError without the extra `eval`, or for `ja-mecab` without the extra `ja`; ValueError where a prediction
    has no reference.
    """
    pairs, bleu = checked_pairs(predictions, references), optional_module("sacrebleu", "BLEU", "sacrebleu").BLEU
    cut: dict[str, Callable[[str], str]] = {
        "13a": bleu(tokenize="13a").tokenizer,
        "zh": bleu(tokenize="zh").tokenizer,
        "char": lambda text: " ".join(characters(text)),
        "ja-mecab": lambda text: mecab()(text),
    }
    tokenizers = [bleu_tokenizer(refs, japanese) for refs in references]
    metric, rows = bleu(tokenize="none", force=True), []
    for (text, refs), name in zip(pairs, tokenizers, strict=True):
        prediction, *rights = (cut[name](unicodedata.normalize("NFC", one).rstrip()) for one in (text, *refs))
        parts = metric.corpus_score([prediction], [[right] for right in rights])
        rows.append([*parts.counts, *parts.totals, parts.sys_len, parts.ref_len])
    return table_interval("bleu", rows, samples).cut_by(tokenizers)


def cider_d_interval(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    samples: Samples | None = None,
    japanese: Japanese = "char",
) -> Interval:
    """The mean of `cider_d_scores`, 0 to 10, its interval, and how the texts were cut. Raises as `cider_d_scores`."""
    score = mean_interval(cider_d_scores(predictions, references, japanese), samples)
    return score.cut_by(word_tokenizer(refs, japanese) for refs in references)


def rouge_l_interval(
    predictions: Sequence[str], references: Sequence[Sequence[str]], samples: Samples | None = None
) -> Interval:
    """The mean of `rouge_l_scores`, 0 to 1, its interval, and how the texts were cut. Raises as `rouge_l_scores`."""
    score = mean_interval(rouge_l_scores(predictions, references), samples=samples)
    return score.cut_by(map(rouge_l_tokenizer, references))


def sample_values(score: Interval) -> dict[str, float]:
    """What the score would be on each of its samples alone, by the sample's name. CIDEr-D still weighs words by the
    whole set. Empty if it is not known what the score was computed from."""
    if score.parts is None:
        return {}
    value_of, once = KINDS[score.parts.kind], np.ones((1, 1))
    rows = zip(score.parts.samples.names, score.parts.table, strict=True)
    return {name: float(value_of(row[None], once)[0]) for name, row in rows}


def parts_to_json(scores: Mapping[str, Interval]) -> dict[str, Any]:
    """What scores were computed from, as `parts_from_json` reads it: samples that several share stand once."""
    kept = {name: score.parts for name, score in scores.items() if score.parts is not None}
    samples = list(dict.fromkeys(parts.samples for parts in kept.values()))
    return {
        "samples": [{"names": one.names, "clusters": one.clusters} for one in samples],
        "scores": {
            name: {"kind": parts.kind, "samples": samples.index(parts.samples), "table": parts.table.tolist()}
            for name, parts in kept.items()
        },
    }


def parts_from_json(plain: Mapping[str, Any]) -> dict[str, Parts]:
    """By score. Any of KeyError, TypeError, ValueError, IndexError where `plain` is something else."""
    samples = [Samples(tuple(map(str, one["names"])), tuple(map(int, one["clusters"]))) for one in plain["samples"]]
    found = {}
    for name, one in plain["scores"].items():
        parts = Parts(samples[one["samples"]], one["kind"], np.asarray(one["table"], dtype=np.float64))
        if parts.kind not in KINDS or parts.table.shape[:1] != (len(parts.samples.names),) or parts.table.ndim != 2:
            raise ValueError(f"{name}: a table of {parts.table.shape} for {len(parts.samples.names)} samples")
        found[name] = parts
    return found


def paired_difference(before: Interval, after: Interval) -> tuple[Interval, int] | None:
    """`after` less `before` on the samples that both were taken on, and their number; None where there are none.

    Both are taken on the same resamples, so that what makes a sample easy or hard for both cancels out.
    """
    one, two = before.parts, after.parts
    if one is None or two is None or one.kind != two.kind:
        return None
    rows = {name: row for row, name in enumerate(two.samples.names)}
    both = [row for row, name in enumerate(one.samples.names) if name in rows]
    if not both:
        return None
    tables = one.table[both], two.table[[rows[one.samples.names[row]] for row in both]]
    value_of, clusters = KINDS[one.kind], [one.samples.clusters[row] for row in both]
    value = float(value_of(tables[1], np.ones((1, len(both))))[0] - value_of(tables[0], np.ones((1, len(both))))[0])
    drawn = [value_of(tables[1], w) - value_of(tables[0], w) for w in _weights(clusters)]
    return _percentile(value, np.concatenate(drawn)), len(both)


def table_interval(
    kind: str, rows: Sequence[Sequence[float]], samples: Samples | None, value: float | None = None
) -> Interval:
    """The score of `kind`, a key of KINDS, from a row of numbers for each sample, and its bootstrap interval."""
    table = np.asarray(rows, dtype=np.float64)  # sums of counts stay exact up to 2**53
    parts = Parts(samples or Samples.apart(len(table)), kind, table)
    if len(parts.samples.names) != len(table):
        raise ValueError(f"{len(table)} scores, but {len(parts.samples.names)} samples")
    drawn = np.concatenate([KINDS[kind](table, w) for w in _weights(parts.samples.clusters)])
    value = float(KINDS[kind](table, np.ones((1, len(table))))[0]) if value is None else value
    return _percentile(value, drawn, parts)


def _weights(clusters: Sequence[int]) -> Iterator[Floats]:
    """How often each sample comes in a resample, [some, samples]; `_RESAMPLES` rows in all."""
    number_of = np.unique(np.asarray(clusters), return_inverse=True)[1]
    count = int(number_of.max()) + 1
    generator = np.random.default_rng(_SEED)
    block = max(1, _MAX_VALUES // len(clusters))
    for start in range(0, _RESAMPLES, block):
        size = min(block, _RESAMPLES - start)
        drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield times[:, number_of].astype(np.float64)


def _ratio(table: Floats, weights: Floats) -> Floats:
    sums = weights @ table
    return np.asarray(sums[:, 0] / sums[:, 1])


def _class_mean(table: Floats, weights: Floats) -> Floats:
    classes = table[:, 1].astype(np.int64)
    means = []
    for row in weights:
        counts = np.bincount(classes, row)
        means.append((np.bincount(classes, row * table[:, 0])[counts > 0] / counts[counts > 0]).mean())
    return np.asarray(means)


def _bleu(table: Floats, weights: Floats) -> Floats:
    from sacrebleu.metrics.bleu import BLEU

    size = table.shape[1] // 2 - 1
    scores = []
    for row in (weights @ table).round().astype(np.int64).tolist():
        scores.append(BLEU.compute_bleu(row[:size], row[size:-2], row[-2], row[-1], smooth_method="exp").score)
    return np.asarray(scores)


def _coco_bleu(table: Floats, weights: Floats) -> Floats:
    sums = weights @ table
    precisions = (sums[:, :4] + 1e-15) / (sums[:, 4:8] + 1e-9)
    ratio = (sums[:, 8] + 1e-15) / (sums[:, 9] + 1e-9)
    return np.asarray(100 * precisions.prod(1) ** 0.25 * np.exp(np.minimum(0, 1 - 1 / ratio)))


def _meteor(table: Floats, weights: Floats) -> Floats:
    """Denkowski, Lavie, "Meteor Universal", WMT 2014: section 2, with version 1.5's weights for English."""
    sums, tiny = weights @ table, 1e-300  # nothing over nothing is 0
    length, ref_length, function, ref_function, *_, chunks, matched, ref_matched = sums.T
    kinds = np.asarray([1, 0.6, 0.8, 0.6]) @ sums[:, 4:20].reshape(-1, 4, 4)  # exact, stem, synonym, paraphrase
    precision = kinds[:, [0, 2]] @ (0.75, 0.25) / (0.75 * (length - function) + 0.25 * function + tiny)
    recall = kinds[:, [1, 3]] @ (0.75, 0.25) / (0.75 * (ref_length - ref_function) + 0.25 * ref_function + tiny)
    mean = precision * recall / (0.85 * precision + 0.15 * recall + tiny)
    return np.asarray(mean * (1 - 0.6 * (chunks / ((matched + ref_matched) / 2 + tiny)) ** 0.2))


KINDS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "ratio": _ratio,
    "class mean": _class_mean,
    "bleu": _bleu,
    "coco bleu": _coco_bleu,
    "meteor": _meteor,
}
"""How a score is computed from a table [samples, columns] and how often each sample counts [resamples, samples]."""


def _percentile(value: float, resampled: Floats, parts: Parts | None = None) -> Interval:
    low, high = np.quantile(resampled, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Interval(value, float(low), float(high), parts)
