"""Intervals against a resampling loop, the normal approximation, sacrebleu's own and how often they hold the truth."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean, pstdev

import numpy as np
import pytest
import sacrebleu

from vft.metrics import Interval, bleu4, bleu4_interval, mean_interval

WORDS = [*"abcdefghijklmno", "café"]


def captions(count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Predictions that share more or fewer words with one to three references each; the last one is empty."""
    generator = random.Random(seed)
    predictions, references = [], []
    for _ in range(count):
        text = generator.choices(WORDS, k=generator.randrange(4, 12))
        predictions.append(" ".join(text))
        changed = generator.random() * 0.6
        references.append(
            [
                " ".join(generator.choice(WORDS) if generator.random() < changed else word for word in text)
                for _ in range(generator.randrange(1, 4))
            ]
        )
    predictions[-1] = ""
    return predictions, references


def loop_interval(score: Callable[[list[int]], float], count: int, resamples: int, confidence: float) -> Interval:
    """The same by a plain loop, with another generator; `score` takes the indices of a resample."""
    generator = random.Random(7)
    scores = sorted(score(generator.choices(range(count), k=count)) for _ in range(resamples))
    low, high = (scores[round(p * (resamples - 1))] for p in ((1 - confidence) / 2, (1 + confidence) / 2))
    return Interval(score(list(range(count))), low, high)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_mean_equals_a_loop(confidence: float) -> None:
    generator = random.Random(0)
    scores = [generator.expovariate(1) for _ in range(60)]  # lopsided, so that low and high differ
    expected = loop_interval(lambda picked: fmean(scores[i] for i in picked), 60, 4000, confidence)
    found = mean_interval(scores, confidence, resamples=4000)
    error = pstdev(scores) / 60**0.5
    assert found.value == fmean(scores)
    assert found.low == pytest.approx(expected.low, abs=0.15 * error)
    assert found.high == pytest.approx(expected.high, abs=0.15 * error)


def test_mean_of_many_is_nearly_normal() -> None:
    generator = random.Random(1)
    scores = [float(generator.random() < 0.7) for _ in range(2000)]
    error = pstdev(scores) / 2000**0.5
    for confidence in (0.8, 0.95):
        found = mean_interval(scores, confidence)
        half = NormalDist().inv_cdf((1 + confidence) / 2) * error
        assert found.low == pytest.approx(fmean(scores) - half, abs=0.2 * error)
        assert found.high == pytest.approx(fmean(scores) + half, abs=0.2 * error)


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = random.Random(2)
    found = [
        mean_interval([generator.gauss(0.5, 1) for _ in range(50)], 0.9, resamples=400, seed=i) for i in range(400)
    ]
    # A standard deviation of the count is 6; percentile intervals of 50 samples are slightly narrow.
    assert 340 <= sum(interval.low <= 0.5 <= interval.high for interval in found) <= 375


def test_mean_of_one_or_of_equal_scores() -> None:
    assert mean_interval([0.3]) == Interval(0.3, 0.3, 0.3)
    equal = mean_interval([0.1] * 7)
    assert (equal.value, equal.low, equal.high) == pytest.approx((0.1, 0.1, 0.1))


def test_one_resample_has_no_width() -> None:
    found = mean_interval([0.0, 1.0, 5.0], resamples=1)
    assert found.value == 2
    assert found.low == found.high


def test_same_seed_same_interval() -> None:
    scores = list(np.linspace(0, 1, 37) ** 3)
    assert mean_interval(scores) == mean_interval(scores, seed=0)
    assert mean_interval(scores) != mean_interval(scores, seed=1)
    assert mean_interval(scores).value == mean_interval(scores, seed=1).value


def test_memory_is_bounded() -> None:
    scores = [i / 10_000 for i in range(10_000)]
    tracemalloc.start()
    try:
        mean_interval(scores)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 40e6  # all resamples at once would be 160 MB of indices


def test_bleu_equals_a_loop() -> None:
    predictions, references = captions(40, seed=4)

    def score(picked: Sequence[int]) -> float:
        refs = [[(references[i] * 3)[k] for i in picked] for k in range(3)]  # a reference twice changes nothing
        return sacrebleu.corpus_bleu([predictions[i] for i in picked], refs).score

    expected = loop_interval(score, 40, 600, 0.9)
    found = bleu4_interval(predictions, references, 0.9)
    width = expected.high - expected.low
    assert found.value == bleu4(predictions, references)
    assert found.value == pytest.approx(expected.value)
    assert found.low == pytest.approx(expected.low, abs=0.08 * width)
    assert found.high == pytest.approx(expected.high, abs=0.08 * width)


def test_bleu_equals_the_interval_of_sacrebleu() -> None:
    predictions, references = captions(150, seed=5)
    streams = [[(refs * 3)[k] for refs in references] for k in range(3)]
    expected = sacrebleu.BLEU().corpus_score(predictions, streams, n_bootstrap=1000)
    found = bleu4_interval(predictions, references)
    half = expected._ci  # half the distance of the ends
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert (found.high + found.low) / 2 == pytest.approx(expected._mean, abs=0.1 * half)


@pytest.mark.parametrize(
    ("text", "references"),
    [
        ("the dog runs along the beach", ["the dog runs along the shore", "a dog"]),
        ("the dog runs along", ["the dog runs along the shore"]),  # shorter than the reference
        ("the dog", ["the dog runs"]),  # no n-gram of four
        ("café 犬 now or never", ["café 犬 now and then"]),  # smoothed: none of four matches
        ("", ["a dog"]),
    ],
)
def test_bleu_of_one(text: str, references: list[str]) -> None:
    score = bleu4([text], [references])
    assert bleu4_interval([text], [references]) == Interval(score, score, score)
    assert mean_interval([score]) == Interval(score, score, score)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="no scores"):
        mean_interval([])
    with pytest.raises(ValueError, match="score 1 is nan"):
        mean_interval([0.5, float("nan")])
    for confidence in (0, 1, 95):
        with pytest.raises(AssertionError, match=f"{confidence}"):
            mean_interval([0.5], confidence)
        with pytest.raises(AssertionError, match=f"{confidence}"):
            bleu4_interval(["a"], [["a"]], confidence)
    with pytest.raises(AssertionError, match="0"):
        mean_interval([0.5], resamples=0)
