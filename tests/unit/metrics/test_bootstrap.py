"""Intervals against a resampling loop, the normal approximation, sacrebleu's own and how often they hold the truth."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean, pstdev

import numpy as np
import pytest
import sacrebleu

from vft.common.scores import Interval, Samples, clusters_of
from vft.metrics import bleu4_interval, class_mean_interval, mean_interval, paired_difference, ratio_interval

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


def samples_in(clusters: Sequence[int]) -> Samples:
    return Samples(tuple(map(str, range(len(clusters)))), tuple(clusters))


def loop_interval(
    score: Callable[[Sequence[int]], float], clusters: Sequence[int], resamples: int = 3000
) -> tuple[float, float]:
    """The ends by a plain loop, with another generator: whole clusters are drawn, `score` takes indices of samples."""
    generator, numbers = random.Random(11), sorted(set(clusters))
    members = {number: [i for i, own in enumerate(clusters) if own == number] for number in numbers}
    drawn = (generator.choices(numbers, k=len(numbers)) for _ in range(resamples))
    low, high = np.quantile([score([i for number in some for i in members[number]]) for some in drawn], [0.025, 0.975])
    return float(low), float(high)


def clustered(count: int, per_cluster: int, seed: int) -> tuple[list[float], tuple[int, ...]]:
    """Right or wrong, mostly alike within a cluster; clusters of 1 to `per_cluster`."""
    generator = random.Random(seed)
    scores: list[float] = []
    clusters: list[int] = []
    for number in range(count):
        easy = generator.random()
        for _ in range(generator.randrange(1, per_cluster + 1)):
            scores.append(float(generator.random() < easy**2))
            clusters.append(number)
    return scores, tuple(clusters)


def test_mean_of_many_is_nearly_normal() -> None:
    generator = random.Random(1)
    scores = [float(generator.random() < 0.7) for _ in range(2000)]
    error = pstdev(scores) / 2000**0.5
    half = NormalDist().inv_cdf(0.975) * error
    found = mean_interval(scores)
    assert (found.low, found.high) == pytest.approx((fmean(scores) - half, fmean(scores) + half), abs=0.2 * error)
    assert found == mean_interval(scores)  # no chance from call to call


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = random.Random(2)
    found = [mean_interval([generator.gauss(0.5, 1) for _ in range(50)]) for _ in range(400)]
    # A standard deviation of the count is 4; percentile intervals of 50 samples are slightly narrow.
    assert 366 <= sum(interval.low <= 0.5 <= interval.high for interval in found) <= 390


def test_mean_of_one_or_of_equal_scores() -> None:
    assert mean_interval([0.3]) == Interval(0.3, 0.3, 0.3)
    equal = mean_interval([0.1] * 7)
    assert (equal.value, equal.low, equal.high) == pytest.approx((0.1, 0.1, 0.1))


def test_memory_is_bounded() -> None:
    scores = [i / 10_000 for i in range(10_000)]
    tracemalloc.start()
    try:
        mean_interval(scores)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 40e6  # all resamples at once would be 160 MB of indices


@pytest.mark.parametrize("per_cluster", [1, 4])
def test_bleu_equals_a_loop(per_cluster: int) -> None:
    predictions, references = captions(60, seed=6)
    clusters = [i // per_cluster for i in range(60)]

    def score(picked: Sequence[int]) -> float:
        refs = [[(references[i] * 3)[k] for i in picked] for k in range(3)]  # a reference twice changes nothing
        return sacrebleu.corpus_bleu([predictions[i] for i in picked], refs).score

    low, high = loop_interval(score, clusters, 600)
    found = bleu4_interval(predictions, references, samples_in(clusters))
    assert found.value == score(range(60))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12 * (high - low))


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
        ("café now or never", ["café now and then"]),  # smoothed: none of four matches
        ("", ["a dog"]),
    ],
)
def test_bleu_of_one(text: str, references: list[str]) -> None:
    score = sacrebleu.corpus_bleu([text], [[reference] for reference in references]).score
    found = bleu4_interval([text], [references])
    assert (found.value, found.low, found.high) == (score, score, score)


def test_scores_are_checked() -> None:
    with pytest.raises(ValueError, match="no scores"):
        mean_interval([])
    with pytest.raises(ValueError, match="score 1 is nan"):
        mean_interval([0.5, float("nan")])
    with pytest.raises(ValueError, match="2 scores, but 1 samples"):
        mean_interval([0.0, 1.0], samples_in([0]))


# ------------------------------------------------------------------------------------- clusters, ratios and differences


def test_samples_that_share_an_item_are_one_cluster() -> None:
    found = clusters_of([["a"], [], ["b"], ["a", "c"], ["b"], [], ["c"], ["d", "d"]])
    assert found[0] == found[3] == found[6] and found[2] == found[4]
    assert len(set(found)) == 5 and clusters_of([]) == ()
    assert len(set(clusters_of([[i, i + 1] for i in range(2000)]))) == 1  # a long chain


def test_mean_over_clusters_equals_a_loop() -> None:
    """And is wider than one that takes five questions about a video for five videos."""
    scores, clusters = clustered(60, 8, seed=3)
    found, naive = mean_interval(scores, samples_in(clusters)), mean_interval(scores)
    low, high = loop_interval(lambda picked: fmean(scores[i] for i in picked), clusters)
    assert found.value == naive.value == fmean(scores)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert found.high - found.low > 1.3 * (naive.high - naive.low)
    one = mean_interval(scores, samples_in([0] * len(scores)))  # of one video nothing can be said of others
    assert one.low == pytest.approx(one.value) and one.high == pytest.approx(one.value)


def test_ratio_of_documents_equals_a_loop() -> None:
    """Sum of losses by sum of tokens: long documents weigh more, and those about one video are drawn together."""
    generator = random.Random(8)
    tokens = [float(generator.choice([3, 5, 200])) for _ in range(50)]
    sums = [(count * generator.uniform(0.5, 3.0), count) for count in tokens]
    clusters = [i // 2 for i in range(50)]

    def ratio(picked: Sequence[int]) -> float:
        return sum(sums[i][0] for i in picked) / sum(sums[i][1] for i in picked)

    found = ratio_interval(sums, samples_in(clusters))
    low, high = loop_interval(ratio, clusters)
    assert found.value == pytest.approx(ratio(range(50)), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    with pytest.raises(ValueError, match="nothing to divide by"):
        ratio_interval([(1.0, 0.0)])


def test_mean_of_classes_equals_a_loop() -> None:
    scores, clusters = clustered(40, 3, seed=9)
    classes = ["abc"[i % 3] if i % 7 else "rare" for i in range(len(scores))]

    def mean(picked: Sequence[int]) -> float:
        return fmean(fmean(scores[i] for i in picked if classes[i] == c) for c in {classes[i] for i in picked})

    found = class_mean_interval(scores, classes, samples_in(clusters))
    low, high = loop_interval(mean, clusters)
    assert found.value == pytest.approx(mean(range(len(scores))))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_difference_is_paired() -> None:
    """Two models that find the same questions hard differ surely, though the interval of each is wide; against a loop.

    The second has its samples in another order, and one more.
    """
    scores, clusters = clustered(80, 4, seed=10)
    generator = random.Random(12)
    better = [max(score, float(generator.random() < 0.15)) for score in scores]
    names = tuple(f"q{i}" for i in range(len(scores)))
    before = mean_interval(scores, samples=Samples(names, clusters))
    order = generator.sample(range(len(scores)), len(scores))
    after = mean_interval(
        [0.0, *(better[i] for i in order)],
        samples=Samples(("another", *(names[i] for i in order)), (-1, *(clusters[i] for i in order))),
    )
    assert before.high > after.low  # the intervals overlap
    found = paired_difference(before, after)
    assert found is not None
    difference, common = found
    gains = [b - a for a, b in zip(scores, better, strict=True)]
    low, high = loop_interval(lambda picked: fmean(gains[i] for i in picked), clusters)
    assert common == len(scores) and difference.value == pytest.approx(fmean(gains)) and difference.low > 0
    assert (difference.low, difference.high) == pytest.approx((low, high), abs=0.06 * (high - low))
    alike = paired_difference(before, before)
    assert alike is not None and alike[0] == Interval(0, 0, 0)


def test_what_has_no_difference() -> None:
    mean = mean_interval([0.0, 1.0], Samples(("a", "b"), (0, 1)))
    other = mean_interval([0.0, 1.0], Samples(("c", "d"), (0, 1)))
    bleu = bleu4_interval(["a b"] * 2, [["a b"]] * 2, Samples(("a", "b"), (0, 1)))
    assert paired_difference(mean, other) is paired_difference(mean, bleu) is None
    assert paired_difference(mean, Interval(0.5, 0.4, 0.6)) is None
