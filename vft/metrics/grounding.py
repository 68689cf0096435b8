"""When things happen, scored: moments by the overlap of spans, dense captions by that and by their words.

Spans are (start, end) in seconds. A span overlaps another by their intersection over their union (IoU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from vft.common.event_times import Event, Span
from vft.metrics.coco import meteor_scores
from vft.metrics.text import cider_d_scores
from vft.metrics.words import Japanese

Worth = Callable[[Event, Event], float]
"""What a pair of a predicted and a right event counts, 0 to 1."""
MAP_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
DENSE_THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
_MAX_SPANS = 10
"""Spans of an answer that count in `average_precision`, as in moment_detr's script."""
_NO_WORD = "\0"
"""Stands for the random letters with which densevid_eval compares what matches nothing."""


def iou(one: Span, other: Span, epsilon: float = 0.0) -> float:
    """Intersection over union of two spans, 0 to 1; 0 if both are without length. `epsilon` is added to the union."""
    inter = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    union = one[1] - one[0] + other[1] - other[0] - inter + epsilon
    return inter / union if union > 0 else 0.0


def moment_iou(predicted: Sequence[Span], right: Sequence[Sequence[Span]]) -> float:
    """IoU of the first predicted span, 0 to 1; 0 if there is none.

    `right` holds the spans that each annotator gave. With several spans the one that overlaps most counts
    (QVHighlights, `standalone_eval/eval.py` of jayleicn/moment_detr); of several annotators the three that agree most
    are averaged (DiDeMo, `utils/eval.py` of LisaAnne/LocalizingMoments, whose chunks are of equal length).
    """
    if not predicted:
        return 0.0
    best = sorted(max(iou(predicted[0], span) for span in spans) for spans in right)
    return fmean(best[-3:])


def average_precision(predicted: Sequence[Span], right: Sequence[Span]) -> float:
    """Average precision of the predicted spans, the first one the surest, over `MAP_THRESHOLDS`, 0 to 1.

    Source: `compute_average_precision_detection` of jayleicn/moment_detr, `standalone_eval/utils.py`, after VOC 2011:
    a predicted span takes the right one that it overlaps most and that is still free, and precision is interpolated.
    The script leaves a query without a predicted span out; here it counts as 0.
    """
    return fmean(_average_precision(predicted[:_MAX_SPANS], right, threshold) for threshold in MAP_THRESHOLDS)


def _average_precision(predicted: Sequence[Span], right: Sequence[Span], threshold: float) -> float:
    free, hits = set(range(len(right))), []
    for span in predicted:
        overlaps = {place: value for place in free if (value := iou(span, right[place])) >= threshold}
        best = max(overlaps, key=lambda place: (overlaps[place], place), default=None)
        hits.append(best is not None)
        free.discard(-1 if best is None else best)
    precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
    return sum(max(precision[i:]) for i, hit in enumerate(hits) if hit) / len(right)


def dense_cider_d(predicted: Sequence[Event], right: Sequence[Sequence[Event]], japanese: Japanese = "char") -> float:
    """CIDEr-D of the events of a video over those that they match, 0 to 10, averaged over `DENSE_THRESHOLDS`.

    Source: `evaluate.py` of ranjaykrishna/densevid_eval. Each predicted event is compared with every right one, of any
    annotator (`right`), whose span it overlaps by the threshold, or with nothing. Words are weighed within the video,
    so a single pair has 0. Texts are split as in `cider_d_scores`, without the PTB tokenizer.
    """
    scores = []
    for threshold in DENSE_THRESHOLDS:
        pairs = []
        for start, end, text in predicted:
            spans = [event for events in right for event in events]
            matched = [one for *span, one in spans if iou((start, end), (span[0], span[1]), 1e-8) >= threshold]
            pairs += [(text, one) for one in matched or [_NO_WORD]]
        texts, references = [text for text, _ in pairs], [(one,) for _, one in pairs]
        scores.append(fmean(cider_d_scores(texts, references, japanese)) if len(pairs) > 1 else 0.0)
    return fmean(scores)


def soda(predicted: Sequence[Event], right: Sequence[Sequence[Event]], worth: Worth = lambda *_: 1.0) -> float:
    """F1 of the spans of a video's events, 0 to 1, the best over annotators: SODA_d, or with the likeness of two texts
    as `worth` SODA_c, by Fujita et al. 2020 ("SODA: Story Oriented Dense video cAptioning evaluation flow", ECCV) and
    `soda.py` of fujiso/SODA.

    Events are paired in the order of their starts so that the sum of IoU times worth is largest; that sum over the
    predicted events is the precision, over the right ones the recall.
    """
    ours = sorted(predicted, key=lambda event: event[0])
    if not ours:
        return 0.0
    sums = [(_in_order(ours, sorted(events, key=lambda event: event[0]), worth), len(events)) for events in right]
    return max(2 * total / (len(ours) + count) for total, count in sums)


def soda_c_scores(predicted: Sequence[Sequence[Event]], right: Sequence[Sequence[Sequence[Event]]]) -> list[float]:
    """SODA_c of each video, 0 to 1, with METEOR (`meteor_scores`, which says what it needs).

    As in the script, the right text is METEOR's hypothesis and the predicted one its reference. The script leaves out
    videos without a prediction; here they have 0.
    """
    pairs = {
        (one[2], other[2]): 0.0
        for ours, annotators in zip(predicted, right, strict=True)
        for events in annotators
        for one in ours
        for other in events
    }
    likeness = meteor_scores([other for _, other in pairs], [[one] for one, _ in pairs]) if pairs else []
    pairs = dict(zip(pairs, likeness, strict=True))
    return [soda(*each, lambda one, other: pairs[one[2], other[2]]) for each in zip(predicted, right, strict=True)]


def _in_order(ours: Sequence[Event], theirs: Sequence[Event], worth: Worth) -> float:
    """The largest sum of IoU times worth over pairs that keep both orders (dynamic programming over prefixes)."""
    best = [0.0] * (len(theirs) + 1)
    for one in ours:
        before, best = best, [0.0]
        for j, other in enumerate(theirs):
            paired = before[j] + iou(one[:2], other[:2], 1e-8) * worth(one, other)
            best.append(max(before[j + 1], best[j], paired))
    return best[-1]
