"""Scores of spans: the public scripts' rules written anew, and figures that those scripts gave."""

from __future__ import annotations

import importlib.util
import random
import shutil
from collections.abc import Sequence

import numpy as np
import pytest

from vft.common.event_times import Event, Span
from vft.metrics.grounding import Worth, average_precision, dense_cider_d, iou, moment_iou, soda, soda_c_scores

SAID = (
    (0.0, 10.0, "a man opens the red door"),
    (9.0, 21.0, "he walks into the room"),
    (30.0, 44.0, "a dog runs out"),
)
FIRST = (
    (0.0, 11.0, "a man opens a door"),
    (10.0, 20.0, "he walks into the dark room"),
    (31.0, 40.0, "the dog runs out of the house"),
)
SECOND = ((0.0, 22.0, "a man opens the door and walks in"), (33.0, 44.0, "a dog runs out"))


def spans(rng: random.Random, count: int, near: Sequence[Span] = ()) -> list[Span]:
    """Windows of two seconds' multiples, as in QVHighlights, or any; half of them close to one of `near`."""
    made = []
    for _ in range(count):
        start, end = (
            sorted(rng.sample(range(76), 2)) if rng.random() < 0.5 else sorted(rng.uniform(0, 75) for _ in "ab")
        )
        if near and rng.random() < 0.5:
            start, end = (edge / 2 + rng.choice((-2, -1, 0, 1, 2)) for edge in rng.choice(near))
        made.append((2.0 * min(start, end), 2.0 * max(start, end) + 1))
    return made


def their_overlap(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of a span with each row of `others`."""
    shared = np.clip(np.minimum(one[1], others[:, 1]) - np.maximum(one[0], others[:, 0]), 0, None)
    return shared / (one[1] - one[0] + others[:, 1] - others[:, 0] - shared)


def their_average_precision(predicted: Sequence[Span], right: Sequence[Span]) -> float:
    """VOC's area under the interpolated curve of precision over recall, by its corners."""
    areas, truth = [], np.array(right)
    for threshold in [float(f"{value:.2f}") for value in np.linspace(0.5, 0.95, 10)]:
        taken, hit = np.zeros(len(right), bool), []
        for span in np.array(predicted[:10]):
            overlap = their_overlap(span, truth)
            candidates = [
                i for i in np.argsort(overlap, kind="stable")[::-1] if overlap[i] >= threshold and not taken[i]
            ]
            taken[candidates[:1]] = True
            hit.append(bool(candidates))
        found = np.cumsum(hit)
        recall = np.concatenate([[0], found / len(right), [1]])
        precision = np.concatenate([[0], found / np.arange(1, len(hit) + 1), [0]])
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        corners = np.flatnonzero(recall[1:] != recall[:-1])
        areas.append(np.sum((recall[corners + 1] - recall[corners]) * precision[corners + 1]))
    return float(np.mean(areas))


def test_moments_of_random_spans_are_scored_by_the_public_rules() -> None:
    rng = random.Random(0)
    for _ in range(400):
        right = spans(rng, rng.randint(1, 6))
        predicted = spans(rng, rng.randint(1, 14), right)
        assert average_precision(predicted, right) == pytest.approx(their_average_precision(predicted, right), abs=1e-9)
        best = their_overlap(np.array(predicted[0]), np.array(right)).max()
        assert moment_iou(predicted, [right]) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(
    ("predicted", "right", "expected"),
    [
        ([(2, 16)], [(0, 16)], 0.8),
        ([(41, 59), (0, 9), (63, 70), (0, 15)], [(0, 16), (40, 60), (62, 70)], 0.75),
        ([(12, 22), (11, 21), (90, 99)], [(10, 20), (14, 30)], 0.275),
        ([], [(0, 16)], 0.0),
    ],
)
def test_average_precision_is_that_of_moment_detrs_script(
    predicted: list[Span], right: list[Span], expected: float
) -> None:
    """The first three figures are what `compute_average_precision_detection` gave for these spans."""
    assert (average_precision(predicted, right) if predicted else 0.0) == pytest.approx(expected, abs=1e-9)


def test_three_of_didemos_annotators_count() -> None:
    """By chunks of 5 s, from the first to the last one's end: the rule of its `utils/eval.py`."""
    rng = random.Random(1)
    for _ in range(100):
        chunks = [tuple(sorted(rng.choices(range(6), k=2))) for _ in range(5)]
        predicted, *annotated = [((a * 5.0, (b + 1) * 5.0),) for a, b in chunks]
        a, b = chunks[0]
        theirs = sorted(max(0, min(b, d) + 1 - max(a, c)) / (max(b, d) + 1 - min(a, c)) for c, d in chunks[1:])
        assert moment_iou(predicted, annotated) == pytest.approx(sum(theirs[-3:]) / 3, abs=1e-9)


def test_overlap_at_the_edges() -> None:
    assert iou((0, 4), (4, 8)) == iou((3, 3), (3, 3)) == moment_iou([], [[(0, 1)]]) == 0.0
    assert iou((0, 4), (2, 6)) == pytest.approx(1 / 3) and iou((1, 2), (1, 2)) == 1.0


@pytest.mark.parametrize(
    ("right", "expected"),
    [((FIRST,), 3.365614070147072), ((SECOND,), 2.7931767619141947), ((FIRST, SECOND), 3.981604754912804)],
)
def test_words_of_matched_events(right: Sequence[Sequence[Event]], expected: float) -> None:
    """What densevid_eval's rule gave with pycocoevalcap's CIDEr, for texts that it cuts as we do."""
    assert dense_cider_d(SAID, right) == pytest.approx(expected, abs=1e-9)
    assert dense_cider_d(SAID[:1], right[:1]) == dense_cider_d([], right) == 0.0


def in_order(overlap: np.ndarray) -> float:
    """The largest sum over pairs that keep both orders: every choice is tried."""
    if not overlap.size:
        return 0.0
    later = [overlap[0, j] + in_order(overlap[1:, j + 1 :]) for j in range(overlap.shape[1])]
    return max(in_order(overlap[1:]), *later)


def their_soda(said: Sequence[Event], right: Sequence[Sequence[Event]], worth: Worth) -> float:
    """The best F1 over annotators of the sum of IoU times worth, divided by the number of events on either side."""
    f1 = []
    for one in right:
        ours, theirs = (sorted(each, key=lambda event: event[0]) for each in (said, one))
        edges = np.array([event[:2] for event in theirs])
        worths = np.array([[worth(event, other) for other in theirs] for event in ours])
        total = in_order(worths * [their_overlap(np.array(event[:2]), edges) for event in ours])
        precision, recall = total / len(ours), total / len(theirs)
        f1.append(2 * precision * recall / (precision + recall) if total else 0.0)
    return max(f1)


def test_order_of_events_as_in_soda(monkeypatch: pytest.MonkeyPatch) -> None:
    """SODA_d, and SODA_c with any likeness of texts in the place of METEOR, which takes the right text first."""
    asked: list[tuple[str, str]] = []

    def alike(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        asked.extend((text, only) for text, (only,) in zip(texts, references, strict=True))
        return [likeness(text, only) for text, (only,) in zip(texts, references, strict=True)]

    def likeness(text: str, reference: str) -> float:
        return (len(text) + 2 * len(reference)) % 7 / 7

    monkeypatch.setattr("vft.metrics.grounding.meteor_scores", alike)
    rng = random.Random(2)
    said, right = [], []
    for _ in range(60):
        sides = [[(*span, rng.choice(("p", "pq", "pqr"))) for span in spans(rng, rng.randint(1, 5))] for _ in range(3)]
        said.append(sides[0])
        right.append([[(start, end, text.upper()) for start, end, text in one] for one in sides[1:]])
        # The script adds 1e-8 to each union.
        assert soda(said[-1], right[-1]) == pytest.approx(their_soda(said[-1], right[-1], lambda *_: 1.0), abs=1e-8)
    expected = [
        their_soda(*each, lambda one, other: likeness(other[2], one[2])) for each in zip(said, right, strict=True)
    ]
    assert soda_c_scores(said, right) == pytest.approx(expected, abs=1e-8)
    assert all(text.isupper() and only.islower() for text, only in asked) and len(asked) == len(set(asked))
    assert soda_c_scores([[], []], [[FIRST], [SECOND]]) == [0.0, 0.0]
    assert soda([], [FIRST]) == 0.0 and soda(FIRST[::-1], [FIRST]) == pytest.approx(1.0)


@pytest.mark.skipif(not (importlib.util.find_spec("pycocoevalcap") and shutil.which("java")), reason="needs METEOR")
def test_soda_c_with_meteor() -> None:
    """By SODA's rule with pycocoevalcap 1.2 and Java 17."""
    assert soda_c_scores([SAID], [[FIRST]]) == pytest.approx([0.328085203938206], abs=1e-9)
