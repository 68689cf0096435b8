"""CIDEr-D: how far captions use the words that people use for the same video and not for others.

Source: Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, equations 1-3
and the CIDEr-D variant of its section on gaming (n-gram counts clipped, a Gaussian penalty on the difference in
length). Constants as in the COCO evaluation server: n = 1..4, sigma = 6, times 10.

No PTB tokenizer: texts are split by `words.script_words` (lower case, punctuation removed, split at spaces; scripts
without spaces by characters), so figures differ somewhat from COCO's own, which run a Java program first. On the same
words they are equal to pycocoevalcap's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from vft.metrics.words import Japanese, check_references, count_ngrams, script_words

_SIZES = (1, 2, 3, 4)
_SIGMA = 6.0
"""Words: standard deviation of the penalty on the difference in length."""

_Counts = Counter[tuple[str, ...]]


def cider_d_text_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], japanese: Japanese = "char"
) -> list[float]:
    """CIDEr-D of each prediction, 0 to 10, against its references; texts are split by `script_words`.

    Raises ValueError as `cider_d_scores` does.
    """
    check_references(predictions, references)
    words = [script_words(text, japanese) for text in predictions]
    return cider_d_scores(words, [[script_words(text, japanese) for text in refs] for refs in references])


def cider_d_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each prediction, 0 to 10; all texts as words.

    The weight of an n-gram falls with the number of samples whose references hold it, so a score depends on the whole
    set, and is zero for any text in a set of one: ValueError for fewer than 2 samples, or where a prediction has no
    reference.
    """
    check_references(predictions, references)
    if len(predictions) < 2:
        raise ValueError(
            "CIDEr-D of 1 sample is always 0, for it weighs words by how few other samples use them; needs at least 2"
        )
    reference_counts = [[count_ngrams(words, _SIZES) for words in refs] for refs in references]
    holders: _Counts = Counter()
    for counts in reference_counts:
        holders.update(set().union(*counts))
    num_samples = len(predictions)
    # An n-gram that no reference holds counts as held by one (it still lengthens the prediction's vector).
    log_num_samples = math.log(num_samples)
    rarity = {ngram: log_num_samples - math.log(count) for ngram, count in holders.items()}

    def weigh(counts: _Counts) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in _SIZES]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * rarity.get(ngram, log_num_samples)
        return vectors

    scores = []
    for words, refs, refs_counts in zip(predictions, references, reference_counts, strict=True):
        vectors = weigh(count_ngrams(words, _SIZES))
        similarities = [
            math.exp(-((len(words) - len(ref)) ** 2) / (2 * _SIGMA**2)) * fmean(map(_cosine, vectors, weigh(counts)))
            for ref, counts in zip(refs, refs_counts, strict=True)
        ]
        scores.append(10.0 * fmean(similarities))
    return scores


def _cosine(prediction: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """Cosine of the angle between two vectors, the prediction's entries clipped to the reference's in the product."""
    norms = math.hypot(*prediction.values()) * math.hypot(*reference.values())
    if norms == 0.0:
        return 0.0
    # In the order of the words: a set's order, and with it the last digit, would change from run to run.
    return sum(min(value, reference[g]) * reference[g] for g, value in prediction.items() if g in reference) / norms
